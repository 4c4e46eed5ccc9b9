"""Signals that reach every process of a job: a scheduler's, those of `timeout`, Ctrl-C, a closed terminal. Nothing is lost or left over."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .faults import NETWORK
from .jobs import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
CRITIC = (
    "--image_size 4 --classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1 "
    "--classifier_attention_resolutions 4 --classifier_num_head_channels 32 --diffusion_steps 40"
).split()
LARGE = " ".join(NETWORK).replace("--image_size 4", "--large_size 8 --small_size 4").split()
MAIN = ["-m", "guided_diffusion"]
COMMANDS = {
    "train": [*MAIN, "train", *NETWORK, "--sample_interval", "-1"],
    "train-classifier": [*MAIN, "train-classifier", *CRITIC],
    "train-upsampler": [*MAIN, "train-upsampler", *LARGE, "--sample_interval", "-1"],
    "image_train": [str(ROOT / "scripts" / "image_train.py"), *NETWORK, "--sample_interval", "-1"],
}
REST = "--batch_size 4 --log_interval 1 --save_interval 1000000 --max_steps 1000000 --workers 2".split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


class Started:
    """A command in a session of its own; all its processes carry a mark in their environment."""

    def __init__(self, words: list[str], folder: Path, **options: object) -> None:
        self.mark, self.folder, self.log = uuid.uuid4().hex, folder, folder.parent / "log"
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MARK": self.mark}
        options = {"stdout": self.log.open("w"), "stderr": subprocess.STDOUT, "start_new_session": True, **options}
        self.process = subprocess.Popen(words, env=environ, **options)  # type: ignore[call-overload]

    def alive(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ended = path.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not ended and f"MARK={self.mark}".encode() in path.joinpath("environ").read_bytes():
                    found.append(int(path.name))
        return found

    def wait_for(self, ready: Callable[[], bool], seconds: float = 120.0, *, running: bool = True) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end and (not running or self.process.poll() is None), self.log.read_text()
            time.sleep(0.05)

    def trains(self) -> bool:
        table = self.folder / "progress.csv"
        return table.exists() and len(table.read_text().splitlines()) > 2

    def saved(self) -> bool:
        return len(list(self.folder.glob("run*.json"))) == 1 and len(list(self.folder.glob("model*.pt"))) == 1


@pytest.fixture
def start(photos: Path, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    jobs = []

    def starts(command: str, *before: str, launcher: tuple[str, ...] = (), **options: object) -> Started:
        words = [*before, sys.executable, *launcher, *COMMANDS[command], *REST, "--data_dir", str(photos)]
        jobs.append(Started([*words, "--out", str(tmp_path / "run")], tmp_path / "run", **options))
        return jobs[-1]

    yield starts
    for job in jobs:
        for pid in job.alive():
            os.kill(pid, signal.SIGKILL)
        job.process.wait()


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("train", signal.SIGTERM, 85),
        ("train", signal.SIGINT, 130),
        ("train-classifier", signal.SIGUSR1, 85),
        ("train-upsampler", signal.SIGHUP, 85),
        ("image_train", signal.SIGTERM, 85),
    ],
)
def test_a_signal_to_the_whole_group_saves_once_and_leaves_nothing_running(command, number, code, start):
    job = start(command)
    job.wait_for(job.trains)
    assert len(job.alive()) == 3
    os.killpg(job.process.pid, number)
    assert job.process.wait(60) == code, job.log.read_text()
    said = job.log.read_text()
    assert job.saved() and f"all saved in {job.folder}" in said and "Traceback" not in said, said
    job.wait_for(lambda: not job.alive(), 10, running=False)


def test_timeout_signals_twice_and_that_is_one_request(start):
    """GNU timeout signals its child and then its group, which the child is in."""
    job = start("train", "timeout", "-s", "TERM", "600")
    job.wait_for(job.trains)
    os.kill(job.process.pid, signal.SIGTERM)  # as its clock would
    job.wait_for(job.saved, 60, running=False)
    job.process.wait(30)
    job.wait_for(lambda: not job.alive(), 10, running=False)
    assert "stopped on request after" in job.log.read_text()


def test_ranks_below_torchrun_are_signalled_with_it(start):
    job = start("train", launcher=TORCHRUN)
    job.wait_for(job.trains)
    for pid in job.alive():  # as Slurm does: each process of the step
        os.kill(pid, signal.SIGTERM)
    job.process.wait(60)
    said = job.log.read_text()
    assert job.saved() and said.count("stopped on request after") == 1, said
    job.wait_for(lambda: not job.alive(), 10, running=False)


def test_nothing_outlives_a_killed_parent(start):
    job = start("train")
    job.wait_for(job.trains)
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait(10)
    job.wait_for(lambda: not job.alive(), 10, running=False)


def test_two_interrupts_at_once_are_one_and_a_later_one_ends_at_once(start):
    job = start("train")
    job.wait_for(job.trains)
    for _ in range(2):
        os.killpg(job.process.pid, signal.SIGINT)
    assert job.process.wait(60) == 130 and job.saved()
    # A process that is busy with what it does.
    code = "import time\nfrom guided_diffusion.runtime.signals import *\n"
    code += "with Stop(TRAINING_SIGNALS):\n    print('ready', flush=True)\n    while True: time.sleep(0.1)"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    busy = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environ)
    assert busy.stdout is not None and busy.stdout.readline() == "ready\n"
    busy.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert busy.poll() is None
    busy.send_signal(signal.SIGINT)
    assert busy.wait(5) == -signal.SIGINT
    assert busy.stderr is not None and "once more ends at once" in busy.stderr.read()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_the_program_that_reads_the_output_may_end_first(number, code, start):
    """`guided-diffusion train ... | tee log`: the signal reaches both."""
    tee = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    job = start("train", stdout=tee.stdin, stderr=tee.stdin)
    tee.stdin.close()
    job.wait_for(job.trains)
    tee.kill()
    tee.wait()
    os.killpg(job.process.pid, number)
    assert job.process.wait(60) == code and job.saved()


def test_a_closed_terminal_saves(start):
    """The terminal hangs up, and every word said after that is an error."""
    main, side = pty.openpty()

    def take_terminal() -> None:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    job = start("train", stdin=side, stdout=side, stderr=side, preexec_fn=take_terminal)
    os.close(side)
    job.wait_for(job.trains)
    os.close(main)
    job.process.wait(60)
    assert job.saved() and job.process.returncode == 85
    job.wait_for(lambda: not job.alive(), 10, running=False)
