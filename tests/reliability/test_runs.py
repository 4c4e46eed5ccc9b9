"""Training and sampling as jobs of real processes, under everything that a cluster does to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from . import workers
from .faults import REQUEUE, compare_saves, make_images, sample_words, saves, train_words
from .jobs import ROOT, Job

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals and forks")
STEPS = 10
USER_ERROR = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Path:
    """A run of one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("model")
    assert Job(1, [train_words(data, folder, STEPS)], folder / "logs").wait() == [0]
    return folder


@pytest.fixture
def logs(tmp_path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def ended(logs) -> Callable[..., str]:
    """The output of a job that ends as it should."""

    def end(size: int, *arguments: Any, code: int = 0, within_s: float = 120, **options: Any) -> str:
        job = Job(size, arguments, logs, **options)
        assert job.wait(within_s) == [code] * size, job.text()
        return job.text()

    return end


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"model{step:06d}.pt")


def averages_of_gradients(folder: Path) -> torch.Tensor:
    entries = torch.load(folder / f"opt{STEPS:06d}.pt")["state"].values()
    return torch.cat([entry["exp_avg"].flatten() for entry in entries])


def test_one_two_and_four_ranks_see_the_same_and_end_the_same(data, tmp_path, ended):
    seen = {}
    for size in (1, 2, 4):
        words = train_words(data, tmp_path / str(size), STEPS, STEPS, "--dropout", "0", "--schedule_sampler", "uniform")
        ended(size, words, str(tmp_path / f"seen{size}"), run=workers.recorded)
        seen[size] = [set(json.loads((tmp_path / f"seen{size}_{rank}.json").read_text())) for rank in range(size)]
    assert len(seen[1][0]) == 8 * STEPS
    for size in (2, 4):
        assert set().union(*seen[size]) == seen[1][0]
        assert sum(map(len, seen[size])) == 8 * STEPS  # no example twice
        ours, alone = averages_of_gradients(tmp_path / str(size)), averages_of_gradients(tmp_path / "1")
        assert (ours - alone).norm() < 5e-6 * alone.norm()
        # AdamW divides by the root of a moving average: where a gradient is 0 but for rounding, a weight moves by up to lr a step.
        ours, alone = (torch.cat([v.flatten() for v in weights(tmp_path / name).values()]) for name in (str(size), "1"))
        assert (ours - alone).abs().quantile(0.999) < 1e-5 and (ours - alone).norm() < 5e-4 * alone.norm()


def test_a_run_goes_on_with_its_batches_on_another_number_of_ranks(data, tmp_path, ended):
    """Started on two ranks with --batch_size, without --global_batch_size; continued by the same words on one."""
    words = train_words(
        data, tmp_path / "run", 5, 5, "--dropout", "0", "--batch_size", "4", "--schedule_sampler", "uniform"
    )
    at = words.index("--global_batch_size")
    del words[at : at + 2]
    alone = list(words)
    alone[alone.index("--out") + 1] = str(tmp_path / "alone")
    seen = []
    jobs = [(2, words, 5, "two"), (1, words, STEPS, "one"), (1, [*alone, "--batch_size", "8"], STEPS, "alone")]
    for size, these, steps, name in jobs:
        ended(size, [*these, "--max_steps", str(steps)], str(tmp_path / name), run=workers.recorded)
        seen.append({h for rank in range(size) for h in json.loads((tmp_path / f"{name}_{rank}.json").read_text())})
    assert len(seen[0]) == len(seen[1]) == 40 and seen[0] | seen[1] == seen[2]


@pytest.mark.parametrize(("number", "victims"), [(signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1])])
def test_a_signal_saves_once_on_all_ranks_and_asks_to_be_started_again(data, tmp_path, logs, ended, number, victims):
    words = train_words(data, tmp_path / "run", 2000, 1000)
    job = Job(2, [words], logs)
    job.wait_for(lambda: "| step" in job.text())
    job.signal(number, victims)
    assert job.wait(40) == [REQUEUE, REQUEUE], job.text()
    assert job.text().count("stopped on request after") == 1
    (step,) = saves(tmp_path / "run")
    assert step > 0
    assert f"at step {step}" in ended(2, [*words, "--max_steps", str(step + 1)])


def test_a_rank_that_fails_ends_the_job_with_its_traceback_first(data, tmp_path, logs):
    job = Job(2, [train_words(data, tmp_path / "run", 2000), 9], logs, run=workers.failing)
    codes = job.wait(60)
    told, other = job.logs[1].read_text(), job.logs[0].read_text()
    assert all(codes) and "RuntimeError: a bug in rank 1" in told and "[rank 1 of 2, step" in told
    assert "Traceback" not in other and "[rank 0 of 2, step" in other, other


def test_a_rank_that_stands_still_is_an_error_with_rank_operation_and_step(data, tmp_path, logs):
    job = Job(2, [train_words(data, tmp_path / "run", 2000, 1000, "--timeout_s", "5")], logs)
    job.wait_for(lambda: "| step" in job.text())
    job.signal(signal.SIGSTOP, [1])
    began = time.monotonic()
    job.ranks[0].join(60)
    seconds, told = time.monotonic() - began, job.logs[0].read_text()
    job.signal(signal.SIGKILL)
    job.wait()
    assert job.ranks[0].exitcode == 1 and seconds < 40
    assert "[rank 0 of 2, step" in told and ("got no answer" in told or "no sign of life" in told), told


def test_ranks_with_other_images_are_refused(data, tmp_path, ended):
    shutil.copytree(data, tmp_path / "less")
    (tmp_path / "less" / "picture0007.png").unlink()
    words, less = train_words(data, tmp_path / "run", 5), str(tmp_path / "less")
    output = ended(2, words, less, code=USER_ERROR, within_s=60, run=workers.with_other_data)
    assert output.count("the processes see different data: rank 0 has 40 images") == 1, output
    assert "Traceback" not in output and "39 images" in output


def test_a_second_job_on_the_folder_is_refused(data, model, tmp_path, logs, ended):
    first = Job(1, [train_words(data, tmp_path / "run", 100000)], logs)
    first.wait_for(lambda: (tmp_path / "run" / "run000005.json").exists())
    output = ended(2, train_words(data, tmp_path / "run", 100000), code=USER_ERROR, within_s=60)
    assert "another job writes to" in output
    assert first.running()
    first.signal(signal.SIGKILL)
    first.wait()

    words = sample_words(model, tmp_path / "samples", 100000, 4)
    first = Job(1, [words], logs)
    first.wait_for(lambda: any((tmp_path / "samples" / "parts").glob("images_*")))
    assert "another job writes to" in ended(1, words, code=USER_ERROR, within_s=60)
    first.signal(signal.SIGTERM)
    assert first.wait(60) == [REQUEUE] and "images are in" in first.text()


def test_numbers_that_are_not_end_the_run_with_the_evidence(data, tmp_path, ended):
    calls = 2 * 7  # two microbatches a step
    words = train_words(data, tmp_path / "run", 2000)
    output = ended(2, words, calls, code=USER_ERROR, within_s=60, run=workers.poisoned)
    assert "10 steps in a row, up to step 17" in output, output
    # The saves at 10 and 15 had bad steps behind them.
    assert "The last good save is" in output and "run000005.json" in output, output
    assert "Traceback" not in output
    (incident,) = (tmp_path / "run").glob("incident_*")
    report = json.loads((incident / "report_rank0.json").read_text())
    assert report["step"] == 16 and len(report["layers"]) > 20
    assert all(layer["largest"] > 0 for layer in report["layers"][:3])
    assert len(torch.load(incident / "batch_rank1.pt")["images"]) == 4
    # Bad steps never reached the weights, so the later ones are good as well, and the run can go on from them.
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run", 15).values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "progress.json").read_text().splitlines()]
    assert rows[1]["skipped_steps"] == 3 and rows[2]["skipped_steps"] == 5


def test_damaged_saves_are_passed_over_with_a_word(data, model, tmp_path, ended):
    run = tmp_path / "run"
    words = train_words(data, run, STEPS, 2)
    ended(1, words)
    with open(run / "model000010.pt", "r+b") as file:
        file.truncate(1000)
    with open(run / "opt000008.pt", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    (run / "ema_0.9_000006.pt").unlink()
    (run / ".model000012.pt.0123abcd.tmp").write_bytes(b"half")
    output = ended(1, words)
    for step, reason in ((10, "bytes instead of"), (8, "SHA-256"), (6, "is missing")):
        assert re.search(f"passing over the save at step {step}.*{reason}", output), output
    assert "resuming from" in output and "at step 4" in output
    assert not list(run.glob(".*.tmp"))
    count, differing = compare_saves(model, run)
    assert count == 5 and not differing


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_saves_but_neither_the_run_nor_the_good_ones(data, tmp_path, ended):
    with small_disk(tmp_path / "disk", "7m") as disk:
        words = train_words(data, disk / "run", 30, 5, "--keep_last", "1", "--keep_every", "5")
        told = ended(1, words, code=USER_ERROR)
        good = max(saves(disk / "run"))
        assert 5 <= good < 30 and "No space left on device" in told and "MiB free" in told
        assert "Training goes on" in told and f"The last good save is {disk}/run/run{good:06d}.json" in told, told
        assert "| step              | 30" in told or "| 30 " in told
        assert not list((disk / "run").glob(".*.tmp")) and "Traceback" not in told
        # Nothing torn: what is there loads, and after some room is made the run goes on from it and ends.
        for path in (disk / "run").glob("model*.pt"):
            torch.load(path)
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        assert f"at step {good}" in ended(1, words)
        assert 30 in saves(disk / "run")


def test_a_disk_that_becomes_read_only_and_a_folder_that_vanishes(data, tmp_path, logs):
    with small_disk(tmp_path / "disk", "64m") as disk:
        words = train_words(data, disk / "run", 100000, 5, "--keep_last", "2")
        job = Job(2, [words], logs)
        job.wait_for(lambda: (disk / "run" / "run000005.json").exists())
        subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True)
        if not os.statvfs(disk).f_flag & os.ST_RDONLY:  # refused while a file is open for writing: forbid it otherwise
            shutil.rmtree(disk / "run")
            (disk / "run").write_text("in the way")
        job.wait_for(lambda: "could not be written" in job.text())
        assert job.running()
        subprocess.run(["mount", "-o", "remount,rw", disk], capture_output=True)
        if (disk / "run").is_file():
            (disk / "run").unlink()
        told = len(job.text())
        job.wait_for(lambda: len(saves(disk / "run")) >= 2)
        job.signal(signal.SIGTERM)
        assert job.wait(60) == [REQUEUE] * 2, job.text()[told:]
        assert "Training goes on" in job.text() and "Traceback" not in job.text()


def test_sampling_makes_cut_parts_again_and_does_not_repeat_a_finished_job(model, tmp_path, ended):
    words = sample_words(model, tmp_path / "s", 22, 4)
    ended(1, words)
    (npz,) = (tmp_path / "s").glob("*.npz")
    expected = npz.read_bytes()
    with np.load(npz) as content:
        images = content["arr_0"]
    npz.unlink()
    # As a job leaves it that was killed: a good part, one that a failing disk cut short, and a half one.
    parts = tmp_path / "s" / "parts"
    np.save(parts / "images_00000005_00000006.npy", images[5:7])
    np.save(parts / "images_00000008_00000011.npy", images[8:12])
    with open(parts / "images_00000008_00000011.npy", "r+b") as file:
        file.truncate(200)
    (parts / ".images_00000012_00000015.npy.01234567.tmp").write_bytes(b"half")
    output = ended(2, words)
    assert "is cut short" in output and "2 of 22 images are there" in output, output
    assert npz.read_bytes() == expected and not list(parts.iterdir())
    assert "is there already" in ended(2, words)
    # Another batch size gives the same images to rounding: at most the last bit of a pixel.
    ended(1, sample_words(model, tmp_path / "t", 22, 5))
    with np.load(tmp_path / "t" / npz.name) as content:
        assert np.abs(content["arr_0"].astype(int) - images).max() <= 1


RESTARTED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from guided_diffusion.training.trainer import Trainer
from guided_diffusion.cli.main import main
step = Trainer.step
def dies_once(self, batch):
    if self.steps_done == 7 and self.world.rank == 1 and not os.path.exists({marker!r}):
        self.checkpoints.wait()
        open({marker!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
Trainer.step = dies_once
if __name__ == "__main__":
    sys.exit(main({words!r}))
"""


def test_restarts_of_torchrun_resume_by_themselves(data, tmp_path, ended):
    ended(2, train_words(data, tmp_path / "calm", STEPS))
    script, marker = tmp_path / "job.py", str(tmp_path / "died")
    script.write_text(RESTARTED.format(root=str(ROOT), marker=marker, words=train_words(data, tmp_path / "run", STEPS)))
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=1".split()
    done = subprocess.run(
        [sys.executable, *torchrun, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and Path(marker).exists(), done.stdout + done.stderr
    assert "at step 5" in done.stdout
    count, differing = compare_saves(tmp_path / "calm", tmp_path / "run")
    assert count >= 10 and not differing
