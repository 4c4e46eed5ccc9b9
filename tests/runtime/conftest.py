"""Real processes for the tests of this folder: torchrun and mpiexec as a user would type them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
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


@pytest.fixture
def environ() -> dict[str, str]:
    """This process's environment, free of any launcher, with the package on the path and one thread per process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(SPOKEN_BY_LAUNCHERS)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def launch(tmp_path: Path, environ: dict[str, str]) -> Callable[..., Finished]:
    """Run a script on two processes. Skips the test where the launcher is not installed beside this Python."""

    def run(launcher: str, script: str, *args: str) -> Finished:
        (tmp_path / "job.py").write_text(script)
        words = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()]
        if launcher == "mpiexec":
            program = Path(sys.executable).parent / "mpiexec"
            if not program.exists():
                pytest.skip(f"no mpiexec beside {sys.executable} (pip install mpich)")
            words = [str(program), "-n", "2", sys.executable]
        start = time.monotonic()
        done = subprocess.run(
            [*words, "job.py", *args], cwd=tmp_path, env=environ, timeout=150, text=True, stdout=-1, stderr=-2
        )
        return Finished(done.returncode, done.stdout, time.monotonic() - start)

    return run
