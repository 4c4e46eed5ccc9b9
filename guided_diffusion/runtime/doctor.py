"""Checks of the machine before a long run: versions, arithmetic of the device, all-reduce between the processes, free disk space."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from . import storage
from .devices import describe_products
from .world import World

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """One line of the report. `status` is "ok", "warn" (works, but look at it) or "fail" (the run would not work)."""

    status: str
    what: str
    text: str


def format_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def check_versions() -> Finding:
    """The versions of Python and torch; a warning if there is an NVIDIA driver but torch was built without CUDA."""
    text = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}"
    if torch.version.cuda is None and Path("/proc/driver/nvidia").exists():
        return Finding(
            WARN, "versions", f"{text}: this host has an NVIDIA driver, but this torch is built without CUDA"
        )
    return Finding(OK, "versions", text)


def check_device(world: World) -> Finding:
    """Multiply two matrices on the device and compare with the CPU in float64."""
    device = world.device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    text = f"{device} {name}" + (f", CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "")
    try:
        a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        error = (a.float().to(device) @ b.float().to(device)).double().cpu().sub_(a @ b).abs().max().item()
    except RuntimeError as problem:
        return Finding(FAIL, "device", f"{text}: cannot compute: {problem}")
    if not error < 0.5:  # TF32 leaves about 0.05 here, float32 1e-4
        return Finding(FAIL, "device", f"{text}: a matrix product is off by {error:.3g}; the device is faulty")
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return Finding(WARN, "device", f"{text}, {threads} threads: fine for small trials, far too slow for real sizes")
    free, total = torch.cuda.mem_get_info(device)
    text = f"{text}, {format_bytes(free)} of {format_bytes(total)} free; float32: {describe_products(device)}"
    if free < 0.9 * total:
        return Finding(WARN, "device", f"{text}: another program holds memory on it")
    return Finding(OK, "device", text)


def check_all_reduce(world: World, num_bytes: int = 16 << 20, repeats: int = 4) -> Finding:
    """Time a gradient-sized sum over all processes and check its value. A collective."""
    if world.size == 1:
        return Finding(OK, "processes", f"one process ({world.launcher}); no process group is needed")
    tensor = torch.ones(num_bytes // 4, device=world.device)
    world.all_reduce_sum_(tensor, name="doctor: first all-reduce")
    right = bool((tensor == world.size).all())
    world.barrier("doctor: barrier")
    start = time.perf_counter()
    for _ in range(repeats):
        world.all_reduce_sum_(tensor, name="doctor: timed all-reduce")
    world.barrier("doctor: barrier")
    seconds = max((time.perf_counter() - start) / repeats, 1e-9)
    speed = 2 * (world.size - 1) / world.size * num_bytes / seconds / 1e9  # bytes that each process sends in a ring
    text = (
        f"{world.size} processes by {world.launcher} over {world.backend}: {format_bytes(num_bytes)} summed in "
        f"{seconds * 1e3:.1f} ms ({speed:.2f} GB/s each)"
    )
    if not right:
        return Finding(FAIL, "processes", f"{text}, and the sum is wrong; try NCCL_P2P_DISABLE=1")
    if world.backend == "nccl" and speed < 1:
        return Finding(WARN, "processes", f"{text}: slow for GPUs; look at NCCL_DEBUG=INFO for the path it takes")
    return Finding(OK, "processes", text)


def check_disk(folder: str, one_save: int, num_saves: int | None) -> Finding:
    """Whether `num_saves` checkpoints of `one_save` bytes each fit on the disk of `folder` (None: the number has no limit)."""
    each = f"a checkpoint takes {format_bytes(one_save)}"
    if storage.is_remote(folder):
        return Finding(OK, "disk", f"{folder} is remote, its room unknown; {each}")
    existing = Path(folder).absolute()  # the folder itself may not have been made yet
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        return Finding(FAIL, "disk", f"{existing} cannot be written")
    free = shutil.disk_usage(existing).free
    text = f"{format_bytes(free)} free at {existing}; {each}"
    if free < one_save * 1.1:
        return Finding(FAIL, "disk", f"{text}: not even one fits")
    if num_saves is None:
        count = int(free // max(one_save, 1))
        return Finding(
            WARN, "disk", f"{text}; the run has no last step and keeps all: full after {count}. Set --keep_last"
        )
    if free < one_save * (num_saves + 1):
        return Finding(
            WARN, "disk", f"{text}; {num_saves} are kept, {format_bytes(one_save * num_saves)}. Set --keep_last"
        )
    return Finding(OK, "disk", f"{text}; kept: {num_saves}")


def planned_saves(last_step: int, save_interval: int, keep_last: int, keep_every: int) -> int | None:
    """How many checkpoints a run keeps in the end; None if it keeps all and has no last step."""
    saves = last_step // save_interval + 1 if last_step else None
    if not keep_last:
        return saves
    return min(saves or keep_last, keep_last) + (last_step // keep_every if keep_every else 0)


def report(findings: Iterable[Finding]) -> str:
    """The findings as a table, with a verdict."""
    findings = list(findings)
    width = max(len(finding.what) for finding in findings)
    lines = [f"{f.status:<4}  {f.what:<{width}}  {f.text}" for f in findings]
    counts = {status: sum(f.status == status for f in findings) for status in (FAIL, WARN)}
    verdict = f"{counts[FAIL]} to repair, {counts[WARN]} to look at" if any(counts.values()) else "all well"
    return "\n".join([*lines, verdict])
