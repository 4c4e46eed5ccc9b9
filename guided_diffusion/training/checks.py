"""Checks before training: data, memory and speed for `doctor`; `check_same_everywhere` at every start of training."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..data.listing import Records
from ..data.loader import Batches
from ..runtime import devices
from ..runtime.doctor import FAIL, OK, WARN, Finding, format_bytes
from ..runtime.world import World
from .memory import StepPlan, attempts, can_recompute, copied_bytes, kept_bytes, set_recompute


def check_data(list_them: Callable[[], Records]) -> tuple[Finding, Records | None]:
    """List the images; an error in that becomes a FAIL finding without records."""
    start = time.perf_counter()
    try:
        records = list_them()
    except (ValueError, OSError, ImportError) as error:
        return Finding(FAIL, "data", str(error)), None
    text = f"{len(records)} images in {records.root}, listed in {time.perf_counter() - start:.1f} s; "
    text += f"labels: {records.label_source}"
    text += f", {len(records.class_names)} classes" if records.class_names else ""
    return Finding(OK, "data", text), records


def check_batches(make: Callable[[], Batches], records: Records, batch_size: int, processes: int) -> Finding:
    """Read two batches as one of the `processes` would; `batch_size` counts the global batch."""
    seconds = []
    try:
        start = time.perf_counter()
        batches = make()
        try:
            for _ in range(2):
                local = len(next(batches).images)
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
        finally:
            batches.close()
    except (ValueError, OSError) as error:
        return Finding(FAIL, "batch", str(error))
    text = f"{batch_size} images per step over {processes} processes, {len(records) / batch_size:.1f} steps per epoch; "
    # The faster of the two, as the time of the first includes the start of workers.
    text += f"read at {local / min(seconds):.0f} images/s here"
    if len(records) < 2 * batch_size:
        return Finding(WARN, "batch", text + ": fewer than two steps per epoch")
    return Finding(OK, "batch", text)


def check_memory(
    net: nn.Module,
    forward: Callable[[int], Any],
    images: int,
    world: World,
    *,
    recompute: str,
    shrink: bool,
    compiled: bool,
    averages: int,
    shard_optimizer: bool,
    shard_ema: bool,
    limit_gb: float,
    precision: str,
) -> tuple[Finding, StepPlan]:
    """Compare the bytes that a step on `images` images needs with those that are free, and name flags that make it fit.

    `forward(n)`: runs `net`, on the meta device, on n images. `recompute`: as --recompute; with "auto", and if `shrink`, the plans
    are those that training tries. `averages`: the copies of the EMA.
    Returns (finding, the first plan that fits, or the requested one if none does).
    """
    on_gpu, auto = world.device.type == "cuda", recompute == "auto"
    free = devices.available_memory(world.device) // (1 if on_gpu else max(1, world.local_size))  # 0: unknown
    if limit_gb:
        free = min(free, max(1, int(limit_gb * 2**30) - devices.used_memory(world.device)))
    # torch.compile itself chooses what to recompute between norms.
    can = [way for way in can_recompute(net) if way != "norms" or not compiled]
    plans = attempts(can if auto else [recompute], images, shrink=shrink and (on_gpu or auto))
    requested, copied = plans[0], copied_bytes(net, precision)
    # Bytes per weight on this process: float32 weights, gradients (which are the buckets of all-reduce), Adam's moments, EMA copies.
    moments = 8 / (world.size if shard_optimizer else 1)
    copies = 4 * averages / (world.size if shard_ema else 1)
    state = int(sum(p.numel() for p in net.parameters()) * (8 + moments + copies))

    @functools.cache
    def activations(way: str) -> tuple[int, int]:
        """(fixed bytes, bytes per image)"""
        set_recompute(net, way)
        return kept_bytes(forward, net.parameters(), copied=copied)

    def need(plan: StepPlan) -> int:
        fixed, per_image = activations(plan.recompute)
        return state + fixed + plan.images * per_image

    def most_images(recompute: str) -> int:
        fixed, per_image = activations(recompute)
        return max(0, int((free - state - fixed) // max(per_image, 1)))

    _, per_image = activations(requested.recompute)
    needed = need(requested)
    text = (
        f"about {format_bytes(needed)} to train {requested.images} images at a time: {format_bytes(state)} weights, gradients, "
        f"Adam, EMA + {format_bytes(needed - state)} activations ({format_bytes(per_image)} per image); {format_bytes(free)} free"
    )
    if not free or needed <= free:
        return Finding(WARN if free and needed > 0.85 * free else OK, "memory", text), requested
    for plan in plans[1:]:
        if need(plan) <= free:
            fewer = plan.images < requested.images
            how = f"--microbatch auto will make it fit, {plan.images} images at a time" if fewer else ""
            return Finding(WARN, "memory", f"{text}. {how or '--recompute auto will make it fit'}"), plan
    # No automatic plan fits: name the first recompute that does (the fastest, as `can` is sorted) or the largest batch.
    remedies = [f"--recompute {way}" for way in can if most_images(way) >= requested.images][:1]
    if most := most_images(plans[-1].recompute):
        remedies.append(f"--microbatch {most}")
    elif not remedies and (most := most_images(can[-1])):
        remedies.append(f"--recompute {can[-1]} --microbatch {most}")
    if remedies:
        return Finding(FAIL, "memory", f"{text}. {' or '.join(remedies)} would fit"), requested
    smaller = "fewer channels" if precision == "bf16" else "--precision bf16, or fewer channels"
    return Finding(FAIL, "memory", f"{text}. Not even one image fits: {smaller}"), requested


def check_speed(
    make: Callable[[], tuple[nn.Module, Callable[[], Any]]],
    plan: StepPlan,
    device: torch.device,
    *,
    last_step: int,
    own_batch: int,
) -> Finding:
    """Time three steps of forward, backward and AdamW after one of warm-up; communication between processes is not included.

    `make` returns a network on the device, and a function that runs it on `plan.images` images.
    A run takes `last_step` steps (0: no end) of `own_batch` images on this process.
    """
    steps = 3
    try:
        net, forward = make()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
        for step in range(steps + 1):
            if step == 1:  # step 0 was the warm-up
                _wait_for(device)
                start = time.perf_counter()
            optimizer.zero_grad()
            forward().float().square().mean().backward()
            optimizer.step()
        _wait_for(device)
    except RuntimeError as error:  # out of memory, most of all
        return Finding(FAIL, "speed", f"{plan.images} images at a time: {str(error).splitlines()[0]}")
    rate = plan.images * steps / (time.perf_counter() - start)
    text = f"{rate:.3g} images/s on this process"
    if device.type == "cuda":
        text += f", {format_bytes(torch.cuda.max_memory_allocated(device))} at most in use"
    if last_step:
        text += f"; {last_step} steps of {own_batch} images take {last_step * own_batch / rate / 86400:.3g} days"
    return Finding(OK, "speed", text)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_same_everywhere(world: World, records: Records, settings: Any) -> None:
    """ValueError on all ranks if one of them has other images or other `settings` (picklable) than rank 0."""
    if world.size == 1:
        return
    mine = (records.digest(), f"{len(records)} images in {records.root}", settings)
    rows = world.all_gather_object(mine, "do all see the same data?")
    for rank, (digest, images, rank_settings) in enumerate(rows):
        if digest != rows[0][0]:
            raise ValueError(
                f"the processes see different data: rank 0 has {rows[0][1]}, rank {rank} {images}, and names, order or labels "
                "differ; give all of them the same folder, on storage that every machine sees, or complete the copies"
            )
        if rank_settings != rows[0][2]:
            raise ValueError(
                f"rank {rank} has another configuration than rank 0; start all with the same flags, and put --out on storage "
                "that every machine sees"
            )
