"""Real processes: kill -9 and continue, one against two, a divided optimizer. One and two processes, gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from guided_diffusion.training.saver import Checkpoints

from .toys import Counter, assert_same_state, make, toy_net, weights_of

WORKER = str(Path(__file__).with_name("worker.py"))


def start(size, *arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    place |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, WORKER, *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]


def kill_after(processes, path):
    """kill -9 all of them once `path` exists."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end and all(p.poll() is None for p in processes), processes[0].stderr.read()
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


def test_kill_and_continue_on_one_process(tmp_path):
    kill_after(start(1, tmp_path, "endless"), tmp_path / "killed" / "run000006.json")

    def trainer(folder):
        checkpoints = Checkpoints(str(tmp_path / folder))
        return make(toy_net(dropout=0.5), checkpoints=checkpoints, schedule_sampler=Counter())

    whole, continued = trainer("whole"), trainer("killed")
    saved = continued.checkpoints.find("auto")
    assert saved.step >= 6
    continued.restore(saved)
    until = saved.step + 4
    continued.run(until)
    whole.run(until)
    assert_same_state(whole.state_dict(), continued.state_dict())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder in which two processes ran, were killed, and proved the rest of worker.proofs."""
    folder = tmp_path_factory.mktemp("two")
    kill_after(start(2, folder, "endless"), folder / "killed" / "run000003.json")
    processes = start(2, folder, "proofs")
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(errors)
    return folder


@pytest.mark.parametrize(("name", "options"), [("plain", {}), ("micro", {"microbatch": 3})])
def test_two_processes_compute_what_one_does(two_processes, name, options):
    weights, seen = torch.load(two_processes / f"{name}.pt")
    alone = make(schedule_sampler=Counter(), **options)
    alone.run(4)
    for a, b in zip(weights_of(alone), weights):
        torch.testing.assert_close(a, b)
    for (i, losses), (i2, losses2) in zip(alone.schedule_sampler.seen, seen):
        assert torch.equal(i, i2)
        torch.testing.assert_close(losses, losses2)


def test_a_run_of_two_processes_continues_on_one(two_processes, tmp_path):
    """`sharded` was saved by two processes at steps 4 and 6, without dropout."""
    alone = make(schedule_sampler=Counter(), checkpoints=Checkpoints(str(tmp_path)))
    alone.restore(alone.checkpoints.find(str(two_processes / "sharded" / "run000004.json")))
    alone.run(6)
    theirs = torch.load(two_processes / "sharded" / "model000006.pt")
    for name, value in alone.net.state_dict().items():
        torch.testing.assert_close(value, theirs[name])
    assert alone.samples_seen == 48


def test_weights_in_the_layout_of_convolutions_train_the_same_on_two_processes(tmp_path):
    processes = start(2, tmp_path, "laid_out")
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(errors)
    assert "strides" not in "".join(errors)  # DistributedDataParallel copies gradients of another layout, and warns
