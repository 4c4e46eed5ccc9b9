"""Jobs of several real processes that can be killed: forked from a server that has imported torch already, so a start takes milliseconds.

Each rank is a process of its own with the environment that torchrun would give it, its own output file, and no share in the test's memory.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Names that launchers set: a test that itself runs under one must not pass them on.
_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PRELOAD = (
    "torch numpy PIL.Image guided_diffusion.build guided_diffusion.cli.training_run guided_diffusion.cli.sample "
    "guided_diffusion.training.trainer guided_diffusion.training.saver guided_diffusion.sampling.queue"
).split()


def command(words: Sequence[str]) -> int:
    """What a rank runs by default: the command line, `guided-diffusion WORDS`."""
    from guided_diffusion.cli.main import main

    return main(words)


class Job:
    """One job of `size` ranks, running since construction. `run(*arguments)` is what every rank calls; its int is the exit code."""

    def __init__(self, size: int, arguments: Sequence[Any], logs: Path, *, run: Callable[..., Any] = command) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.glob("job*_rank0.log")))
        self.logs = [logs / f"job{number:03d}_rank{rank}.log" for rank in range(size)]
        self.started = time.monotonic()
        context = _server()
        port = _free_port()
        self.ranks = []
        for rank, log in enumerate(self.logs):
            place = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            if size > 1:
                place |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_WORLD_SIZE": str(size),
                }
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            log.touch()
            self.ranks.append(context.Process(target=_rank, args=(run, tuple(arguments), place, str(log))))
        for process in self.ranks:
            process.start()

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, or all."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            pid = self.ranks[rank].pid
            if pid is not None and self.ranks[rank].is_alive():
                os.kill(pid, number)

    def running(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """Exit codes of all ranks (minus the signal's number for killed ones); TimeoutError after killing those that go on."""
        end = time.monotonic() + timeout_s
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.signal(signal.SIGCONT)
        if late:
            self.signal(signal.SIGUSR2)  # every thread's stack into the output
            time.sleep(1.0)
        self.signal(signal.SIGKILL)
        for process in self.ranks:
            process.join()
        if late:
            raise TimeoutError(f"ranks {late} still ran after {timeout_s:.0f} s\n{self.text()}")
        return [int(process.exitcode) for process in self.ranks]

    def met(self) -> bool:
        """Whether all ranks have found each other."""
        return len(self.ranks) == 1 or "rank  host" in self.logs[0].read_text(errors="replace")

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def text(self) -> str:
        """All output so far, rank by rank."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self.logs)

    def wait_for(self, ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Return once `ready()`; AssertionError with the output if the job ends before."""
        end = time.monotonic() + timeout_s
        while not ready():
            assert self.running() and time.monotonic() < end, self.text()
            time.sleep(0.01)


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)  # does nothing once the server runs
    # What is imported there reads these once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
    if str(ROOT) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return context


def _rank(run: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str], log: str) -> None:
    """The life of one process."""
    for name in _INHERITED:
        os.environ.pop(name, None)
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", buffering=1, closefd=False),
        os.fdopen(2, "w", buffering=1, closefd=False),
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    import torch

    torch.set_num_threads(1)
    sys.exit(run(*arguments) or 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
