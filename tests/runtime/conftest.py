"""Real processes for the tests of this folder: torchrun and mpiexec as a user would type them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SPOKEN_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_", "TORCHELASTIC_")


class Finished(NamedTuple):
    """A job that has ended: exit code, stdout and stderr of all ranks together, seconds it took."""

    code: int
    text: str
    seconds: float


def clean_environment() -> dict[str, str]:
    """This process's environment, free of any launcher, with the package on the path and one thread per process."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(SPOKEN_BY_LAUNCHERS)}
    return environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def launcher_command(launcher: str, num_processes: int) -> list[str]:
    """The words before the script. Skips the test where the launcher is not installed beside this Python."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    program = Path(sys.executable).parent / "mpiexec"
    if not program.exists():
        pytest.skip(f"no mpiexec beside {sys.executable} (pip install mpich)")
    return [str(program), "-n", str(num_processes), sys.executable]


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Finished]:
    def run(launcher: str, script: str, *args: str, num_processes: int = 2, timeout_s: float = 150) -> Finished:
        path = tmp_path / "job.py"
        path.write_text(script)
        command = [*launcher_command(launcher, num_processes), str(path), *args]
        start = time.monotonic()
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=clean_environment(),
            timeout=timeout_s,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return Finished(done.returncode, done.stdout, time.monotonic() - start)

    return run


@pytest.fixture
def launch_with() -> Callable[[Sequence[dict[str, str]], str], list[Finished]]:
    """Start one process per given environment, as a launcher that is not installed here would."""

    def run(environments: Sequence[dict[str, str]], script: str) -> list[Finished]:
        start = time.monotonic()
        jobs = [
            subprocess.Popen(
                [sys.executable, "-c", script],
                env=clean_environment() | extra,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for extra in environments
        ]
        try:
            texts = [job.communicate(timeout=150)[0] for job in jobs]
        finally:
            for job in jobs:
                job.kill()
        return [Finished(job.returncode, text, time.monotonic() - start) for job, text in zip(jobs, texts)]

    return run
