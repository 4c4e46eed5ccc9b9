"""What the machine can do at best, measured: matrix products, convolutions, and moving bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from .timing import clock_of


def seconds(call: Callable[[], object], device: str, rounds: int = 5) -> float:
    """Median time of a call, after one to warm up."""
    now = clock_of(device)
    call()
    times = []
    for _ in range(rounds):
        begin = now()
        call()
        times.append(now() - begin)
    return median(times)


def rates(device: str = "cpu", quick: bool = False) -> dict[str, float]:
    """GFLOP/s of products and 3x3 convolutions in float32 and bfloat16, and GB/s of a copy (read and written bytes)."""
    side = 8192 if device.startswith("cuda") else 512 if quick else 1024
    pixels, images = (64, 32) if device.startswith("cuda") else (32, 2)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            a = torch.randn(side, side, device=device).to(dtype)
            found[f"matmul {name} GFLOP/s"] = 2e-9 * side**3 / seconds(partial(torch.matmul, a, a), device)
            x = torch.randn(images, 192, pixels, pixels, device=device).to(dtype, memory_format=torch.channels_last)
            weight = torch.randn(192, 192, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
            flops = 2e-9 * images * pixels**2 * 192**2 * 9
            took = seconds(partial(F.conv2d, x, weight, padding=1), device)
            found[f"convolution {name} GFLOP/s"] = flops / took
        words = (1 << 26) if not quick else (1 << 24)
        source = torch.ones(words, device=device)
        target = torch.empty_like(source)
        found["copy GB/s"] = 2e-9 * 4 * words / seconds(lambda: target.copy_(source), device)
    return found


def best(found: dict[str, float], dtype: str = "float32") -> float:
    """The higher of the two arithmetic rates, FLOP/s."""
    return 1e9 * max(found[f"matmul {dtype} GFLOP/s"], found[f"convolution {dtype} GFLOP/s"])


def flops(call: Callable[[], Any]) -> float:
    """Multiplications and additions of the matrix products and convolutions in a call (two per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def wall(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
