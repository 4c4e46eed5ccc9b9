"""Programs of this project as users start them: in processes of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python")
_OF_LAUNCHERS = ("RANK", "WORLD", "LOCAL", "MASTER", "OMPI_", "PMI", "MPI_", "SLURM_")


def mpiexec() -> tuple[str, ...]:
    """The words before a command that start it twice; skips the test where there is no mpiexec."""
    program = shutil.which(
        "mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if program is None:
        pytest.skip("mpiexec is not installed (pip install mpich)")
    return (program, "-n", "2")


def clean_environment(**more: str) -> dict[str, str]:
    """Without what a launcher, a run or a test set; one thread each, and `more`."""
    left_out = (*_OF_LAUNCHERS, "PYTHONPATH", "OPENAI_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**clean, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **more}


def start_ranks(command: Sequence[str], size: int = 2, **options: Any) -> list[subprocess.Popen[str]]:
    """Start the command `size` times, with the variables of torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    ranks = [clean_environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]
    return [subprocess.Popen(command, env=environ, **options) for environ in ranks]


def run_forked(*programs: str) -> str:
    """Run each program in a fork of one process that has torch, as torch takes seconds to import; returns what they print."""
    each = """
import os, sys, torch, torch.distributed
for program in sys.argv[1:]:
    if not os.fork():
        exec(program, {})
        sys.stdout.flush()
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
    done = subprocess.run(
        [sys.executable, "-c", each, *programs], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(
    name: str, words: str, folder: Path, *, code: int = 0, before: Sequence[str] = (), **environ: str
) -> str:
    """Run `scripts/NAME.py` from a folder that is not the repository, as `before` starts it; returns everything it printed."""
    command = [*before, sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words.split()]
    done = subprocess.run(
        command, cwd=folder, env=clean_environment(**environ), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
