"""This package against the 2021 one in a folder of the user's, through the names that both have.

Each side is a process of its own (`worker.py`) with the same weights, inputs and noise; they take turns. On a CPU another
process runs a second copy of the 2021 package: how far its ratio is from 1 shows what the machine's noise alone does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .shapes import Shape
from .timing import Plan, Row, alternate, as_rows

HERE = Path(__file__).resolve().parents[1]
HOST = "host"
"""A forward pass and an update that take as long as the host needs to begin their operations."""
WORKS = ("forward", "sampling", "training", HOST)
ORIGINAL, AGAIN, OURS = "2021", "2021, a second copy", "this package"


def check(folder: str) -> None:
    """Refuse a folder without the package, in words."""
    for name in ("script_util", "train_util", "dist_util", "logger"):
        if not (Path(folder) / "guided_diffusion" / f"{name}.py").is_file():
            raise ValueError(
                f"--against {folder} holds no guided_diffusion/{name}.py; give the root of a checkout of "
                "openai/guided-diffusion, the folder that contains guided_diffusion/"
            )


class Worker:
    """A process that runs one side's work each time it is asked."""

    def __init__(self, name: str, order: dict[str, Any]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        threads = {} if order["device"] != "cpu" else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        hidden = {} if order["device"] != "cpu" else {"CUDA_VISIBLE_DEVICES": ""}
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | threads | hidden
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(order)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=env)

    def answer(self) -> Any:
        """The next thing that it says; an error with the end of its traceback if it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.name}: {self._errors.read()[-1500:].strip() or 'the process ended'}")
        return json.loads(line)

    def ask(self, words: str) -> Any:
        """Send a command, and wait for the answer to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def measure(work: str, shape: Shape, plan: Plan, folder: str) -> Iterator[Row]:
    """Time and peak memory of "forward", "sampling" (guided DDIM) or "training" (an update by TrainLoop) of all sides."""
    requests = plan.requests(shape) if plan.on_gpu else [(shape.batch, plan.steps)]
    for batch, steps in requests if work == "sampling" else [(shape.batch, plan.steps)]:
        batch = shape.train_batch if work == "training" else batch
        title = {"sampling": f"guided DDIM, {steps} steps", "training": "TrainLoop.run_step"}.get(work, work)
        what = f"{title}, {shape.name}, {'float16' if plan.on_gpu else 'float32'}, batch {batch}"
        order = {"work": work, "device": plan.device, "steps": steps, "batch": batch}
        order |= {"model": dict(shape.model), "classifier": dict(shape.classifier)}
        yield from _compared(what, order, plan, folder)


def _compared(what: str, order: dict[str, Any], plan: Plan, folder: str) -> list[Row]:
    roots = {ORIGINAL: folder, AGAIN: folder, OURS: str(HERE)}
    if plan.on_gpu:  # two of them and this package do not fit into its memory
        del roots[AGAIN]
    workers: dict[str, Worker] = {}
    try:
        for name, root in roots.items():
            workers[name] = Worker(name, {**order, "folder": os.path.abspath(root)})
        for worker in workers.values():
            worker.answer()
        notes = _differences(workers)
        times = alternate(
            {name: lambda worker=worker: worker.ask("time") for name, worker in workers.items()},  # type: ignore[misc]
            rounds=plan.rounds,
            limit=plan.limit,
        )
        peaks = {name: worker.ask("peak") for name, worker in workers.items()}
        fitting = {name: worker.ask("fits") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    for name, peak in peaks.items():
        said = [f"peak {peak / 2**20:.0f} MiB above the weights"] if peak else []
        said += [f"about {fitting[name]} images would fit"] if fitting[name] else []
        notes[name] = "; ".join(filter(None, [notes.get(name, ""), *said]))
    return as_rows(what, times, notes)


def _differences(workers: dict[str, Worker]) -> dict[str, str]:
    """How far each side's output lies from that of the original, in norm; this is also the first call, which warms up."""
    import torch

    notes = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, str(place)) for place, name in enumerate(workers)}
        saved = [worker.ask(f"save {paths[name]}") for name, worker in workers.items()]  # of all: it warms them up
        if not all(saved):
            return {}
        base = torch.load(paths[ORIGINAL])
        for name, path in paths.items():
            notes[name] = f"differs {float((torch.load(path) - base).norm() / base.norm()):.1e} in norm"
    return {name: note for name, note in notes.items() if name != ORIGINAL}
