"""Where the time of a forward pass and of a training step goes: kernels by kind, from torch.profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from . import networks
from .shapes import Shape
from .timing import Plan, Row

KINDS = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("optimizer, averages, casts of all weights", ("multi_tensor", "foreach", "adam", "lerp")),
    ("layout", ("nchwtonhwc", "nhwctonchw", "transpose")),
    ("convolutions and products", (
        "conv", "gemm", "gemv", "cutlass", "xmma", "wgrad", "dgrad", "implicit", "nvjet", "cudnn", "cublas", "splitk",
        "aten::mm", "addmm", "bmm", "mkldnn",
    )),
    ("cat", ("catarray", "aten::cat")),
    ("copies and casts", ("copy", "memcpy")),
    ("random numbers", ("distribution", "normal_", "uniform_", "philox")),
    ("sums (bias gradients, losses, norms of tensors)", ("reduce", "sum", "mean", "norm")),
    ("resizing", ("pool", "upsample")),
    ("memory set", ("memset", "fill", "zero_")),
    ("elementwise (bias adds, residual sums)", ("elementwise", "aten::add", "aten::mul", "silu")),
)  # fmt: skip
"""Kinds and parts of the names of kernels (on a CPU of operators); the first kind that fits counts."""
NORM, COMPILED, OTHER = "norms and sums of models/kernels", "compiled (Triton, by Inductor)", "other"


class Kernel(NamedTuple):
    """A kernel, the seconds it took in all calls, and their number."""

    name: str
    seconds: float
    calls: int


def kind_of(name: str) -> str:
    """Which of the KINDS a kernel is; this package's Triton kernels are private functions."""
    if re.match("_[a-z]|FusedNorm", name):
        return NORM
    if name.startswith("triton_"):
        return COMPILED
    return next((kind for kind, parts in KINDS if any(part in name.lower() for part in parts)), OTHER)


def table(what: str, kernels: Iterable[Kernel]) -> Iterator[Row]:
    """A row for each kind, the longest first: milliseconds, number of kernels, share, and the longest kernel."""
    kinds: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        kinds.setdefault(kind_of(kernel.name), []).append(kernel)
    seconds = {kind: sum(kernel.seconds for kernel in members) for kind, members in kinds.items()}
    total = sum(seconds.values())
    calls = sum(kernel.calls for members in kinds.values() for kernel in members)
    yield Row(f"{what}: all kernels", 1e3 * total, note=f"{calls} kernels")
    for kind in sorted(kinds, key=lambda kind: -seconds[kind]):
        longest = max(kinds[kind], key=lambda kernel: kernel.seconds)
        count = sum(kernel.calls for kernel in kinds[kind])
        note = f"{seconds[kind] / total:.1%} in {count}; {1e3 * longest.seconds:.2f} ms in {longest.calls} {longest.name[:60]}"
        yield Row(f"{what}: {kind}", 1e3 * seconds[kind], note=note.replace("|", "/"))


def profiled(call: Callable[[], object], plan: Plan) -> list[Kernel]:
    """The kernels (on a CPU the operators, without what they call) of one call, after two that are not counted."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        call()
    plan.wait()
    with profile(activities=[ProfilerActivity.CUDA if plan.on_gpu else ProfilerActivity.CPU]) as session:
        call()
        plan.wait()
    wanted = torch.autograd.DeviceType.CUDA if plan.on_gpu else torch.autograd.DeviceType.CPU
    found: dict[str, list[float]] = {}
    event: Any
    for event in session.events() or []:
        annotation = getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "## "))
        if event.device_type == wanted and not annotation:
            spent = event.time_range.elapsed_us() if plan.on_gpu else event.self_cpu_time_total
            found.setdefault(event.name, []).append(1e-6 * spent)
    return [Kernel(name, sum(each), len(each)) for name, each in found.items() if sum(each)]


def profile(shape: Shape, plan: Plan) -> Iterator[Row]:
    """Kernel time by kind of a forward pass and of a training step."""
    import torch

    dtype = networks.formats(plan)[-1]
    net = networks.ready(shape, "diffusion", plan.device, dtype).net
    inputs = networks.inputs(shape, shape.batch, plan.device)
    with torch.inference_mode():
        kernels = profiled(partial(net, *inputs), plan)
    yield from table(f"profile of forward, {shape.name}, {dtype}, batch {shape.batch}", kernels)
    del net
    trainer, batch = networks.updates(shape, plan.device, dtype)
    kernels = profiled(partial(trainer.step, batch), plan)
    yield from table(f"profile of a training step, {shape.name}, {dtype}, batch {shape.train_batch}", kernels)
