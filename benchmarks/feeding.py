"""Training fed by the real loader: from packed data and from picture files, with few and with all cores."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import networks
from .files import write_pictures
from .timing import Plan, Row

FEW_CORES = 4


def feeding(plan: Plan) -> Iterator[Row]:
    """Images per second of training, and the share of its time that it waits for images; and of the loader alone, per core."""
    from guided_diffusion.data.listing import list_records
    from guided_diffusion.data.loader import make_batches
    from guided_diffusion.data.packed import pack

    shape = plan.shapes[0]
    size, batch = shape.model["image_size"], shape.train_batch
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    warm, steps = (2, 3) if plan.quick else (10, 40)
    trainer, _ = networks.updates(shape, plan.device, networks.formats(plan)[0])
    with tempfile.TemporaryDirectory() as folder:
        files, packed = Path(folder) / "files", Path(folder) / "packed"
        write_pictures(files, 32 if plan.quick else 512)
        pack(list_records(str(files)), str(packed), size)
        few = min(FEW_CORES, cores)
        for name, path, workers in (
            ("packed data", packed, 0),
            ("packed data", packed, few),
            ("files", files, few),
            *([("files", files, cores)] if cores > few else []),
        ):
            batches = make_batches(list_records(str(path)), image_size=size, batch_size=batch, workers=workers)
            try:
                alone = _rate(batches, warm, steps) * batch
                fed, share = _fed(trainer, batches, warm, steps, plan)
            finally:
                batches.close()
            per_core = alone / max(1, min(workers, cores))
            note = f"waiting {share:.1%} of the time; the loader alone {alone:.0f} images/s, {per_core:.0f} per core"
            yield Row(f"training, {shape.name}, from {name}, {workers} workers", fed * batch, "images/s", note=note)


def _rate(batches: Any, warm: int, steps: int) -> float:
    """Batches per second of the loader alone, once those made ahead are used up."""
    for _ in range(warm + 4):
        next(batches)
    begin = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps / (time.perf_counter() - begin)


def _fed(trainer: Any, batches: Any, warm: int, steps: int, plan: Plan) -> tuple[float, float]:
    """(steps per second, share of waiting) of training between two log lines."""
    for count in (warm, steps):  # the figures of the second remain
        plan.wait()
        begin, waited = time.perf_counter(), batches.wait_seconds
        for _ in range(count):
            trainer.step(next(batches))
        plan.wait()
        spent = time.perf_counter() - begin
    return steps / spent, (batches.wait_seconds - waited) / spent
