"""Programs of this project as users start them: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python")
_NOT_PASSED_ON = ("PYTHONPATH", "OPENAI_LOGDIR", "RANK", "WORLD", "LOCAL", "MASTER")


def run_script(
    name: str, words: str, folder: Path, *, code: int = 0, before: tuple[str, ...] = (), **environ: str
) -> str:
    """Run `scripts/NAME.py` from a folder that is not the repository, as `before` starts it; returns everything it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
    done = subprocess.run(
        [*before, sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words.split()],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
