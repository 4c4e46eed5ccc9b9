"""What samplers cost besides their networks, and what an interval of guidance saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from .networks import inputs, ready
from .shapes import Shape
from .timing import Plan, Row, compare

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 25
INTERVAL = (0.3, 5.0)
"""Noise levels sigma/alpha in which guidance acts."""


def chains(shape: Shape, plan: Plan) -> Iterator[Row]:
    """Multistep samplers against DDIM on as many steps: of a network that costs nothing, and of a guided network."""
    import torch

    import guided_diffusion as gd
    from guided_diffusion.diffusion.denoiser import Denoised, Spread

    process = gd.respace(gd.make_process(gd.SCHEDULES["linear"](1000)), gd.space_timesteps(1000, str(STEPS)))
    process = process.to(plan.device)
    batch = 32 * shape.batch  # so that numbers of the host, made once for a chain, weigh as little as in use
    x, _, _ = inputs(shape, batch, plan.device)
    zero = torch.zeros((), device=plan.device)

    def constant(x: Tensor, i: Tensor) -> Any:
        return Denoised(x, Spread(zero, zero))

    def alone(run: Callable[..., Any], **options: Any) -> Tensor:
        with torch.inference_mode():
            return gd.last(run(constant, x, process, **options))

    runs: dict[str, Any] = {
        "ddim": gd.ddim,
        "dpm_solver": gd.dpm_solver,
        "unipc": gd.unipc,
        "deis": gd.deis,
        "ipndm 4": gd.ipndm,
    }
    what = f"{STEPS} steps of a network that costs nothing, {batch} x 3 x {x.shape[-1]} x {x.shape[-1]}"
    yield from compare(what, {name: partial(alone, run) for name, run in runs.items()}, plan)

    model, classifier = (ready(shape, kind, plan.device) for kind in ("diffusion", "classifier"))
    steps = plan.steps
    x, _, y = inputs(shape, shape.batch, plan.device)

    def guided(sampler: str, scale: Any = 1.0) -> Callable[[], Any]:
        sample = gd.make_pipeline(
            model, guidance=gd.classifier(classifier, scale=scale), sampler=sampler, steps=f"{steps}"
        )
        zeros = torch.zeros_like(x)
        return lambda: sample(x, lambda like, step, draw=0: zeros, {"y": y})

    samplers = {name: guided(name) for name in ("ddim", "dpm_solver", "unipc", "ipndm")}
    yield from compare(f"{shape.name}: guided, {steps} steps", samplers, plan)

    within = gd.interval(1.0, *INTERVAL)
    levels = gd.make_pipeline(model, sampler="ddim", steps=f"{steps}").chain.levels()
    count = sum(within(sigma) is not None for sigma in levels)
    ways: dict[str, Callable[[], Any]] = {
        "all steps guided": guided("ddim"),
        f"{count} of {steps} guided": guided("ddim", within),
        "none guided": guided("ddim", 0.0),
    }
    yield from compare(f"{shape.name}: ddim, {steps} steps", ways, plan)
