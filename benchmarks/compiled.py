"""What Inductor (torch.compile) adds to the eager networks and to a whole guided step, and how long it takes to compile them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import Denoiser, make_denoiser
from guided_diffusion.sampling.execution import Compiled, Cond

from . import shapes
from .networks import ready, short_process
from .shapes import Shape
from .timing import Ratio, compare


def _against_eager(
    name: str, compiled: Callable[[], Tensor], eager: Callable[[], Tensor], *, rounds: int, device: str
) -> list[Ratio]:
    """Compile (with nothing taken from files of earlier compilations), then time both."""
    from torch._inductor import config as inductor  # loads the compiler

    torch.compiler.reset()
    with inductor.patch(force_disable_caches=True):
        begin = time.perf_counter()
        found = compiled()
        took = time.perf_counter() - begin
    expected = eager()
    apart = float((found - expected).norm() / expected.norm())
    print(f"{name}: compiled in {took:.0f} s", flush=True)
    row = compare(name, compiled, eager, against="eager", rounds=rounds, device=device)
    return [replace(row, note=f"compiled in {took:.0f} s of wall time; differs {apart:.1e} in norm")]


@torch.no_grad()
def forward(shape: Shape, *, device: str, rounds: int, dtype: str) -> list[Ratio]:
    """One forward pass of the frozen network, through Inductor and without."""
    net = ready(shapes.generator(shape, device), dtype)
    x, t, y = shapes.inputs(shape, shape.batch, device)
    compiled: Any = torch.compile(net, fullgraph=True, dynamic=False)
    name = f"compiled forward, {shape.name}, {dtype}, batch {shape.batch}"
    return _against_eager(name, lambda: compiled(x, t, y), lambda: net(x, t, y), rounds=rounds, device=device)


def guided(shape: Shape, *, device: str, rounds: int, dtype: str, steps: int = 2) -> list[Ratio]:
    """Guided DDIM, every step of which is one compiled graph, against the same steps in eager mode."""
    net = ready(shapes.generator(shape, device), dtype)
    critic = ready(shapes.critic(shape, device), dtype)
    process = short_process(shape, steps, device)
    x, _, y = shapes.inputs(shape, shape.batch, device)

    def plain(cond: Cond) -> Denoiser:
        denoise = make_denoiser(net, process, {"y": cond["y"]})
        return guidance.classifier(denoise, process, guidance.log_prob_gradient(critic, cond["y"]), 1.0)

    def run(make: Callable[[Cond], Denoiser]) -> Tensor:
        return samplers.last(samplers.ddim(make({"y": y}), x, process))

    whole = Compiled(plain)
    name = f"compiled guided DDIM-{steps}, {shape.name}, {dtype}, batch {shape.batch}"
    return _against_eager(name, lambda: run(whole), lambda: run(plain), rounds=rounds, device=device)
