"""Norm, scale and shift, and SiLU of residual blocks: the ways to compute them, at the sizes of a network.

What `Network.set_fused_norm` brings is measured here: the Triton kernels against what blocks do without them, beside
torch's norm on NCHW memory and torch.compile of the same, at the sizes that make up most of a pass, with a sum in which
each counts as often as a pass comes to it; and then in the whole network.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion import build
from guided_diffusion.models import fused_norm
from guided_diffusion.models.layers import channels_last, normalization
from guided_diffusion.models.unet import ResBlock

from . import floor, networks, shapes
from .gpu import Result, Setting, peaks
from .shapes import Shape
from .timing import Ratio, compare

NOW = "as blocks do it"
MOST = 8
"""Kinds of norm that are measured one by one: compiling each takes seconds."""


class Place(NamedTuple):
    """A norm of a network: its channels, the side of its image, and whether time scales and shifts it."""

    channels: int
    side: int
    scaled: bool


def places(shape: Shape) -> Counter[Place]:
    """How often a forward pass of the generator comes to each kind of norm in its residual blocks; nothing is computed."""
    found: Counter[Place] = Counter()
    with torch.device("meta"), torch.no_grad():
        net: Any = build.build_empty(shape.model, shape.diffusion)
        size, channels = shape.model.image_size, shape.model.image_channels
        for block in net.modules():
            if isinstance(block, ResBlock):
                for layers, scaled in ((block.in_layers, False), (block.out_layers, block.use_scale_shift_norm)):
                    layers[0].register_forward_pre_hook(_noting(found, scaled))
        net(torch.empty(1, channels, size, size), torch.empty(1), torch.empty(1, dtype=torch.int64))
    return found


def _noting(found: Counter[Place], scaled: bool) -> Callable[[nn.Module, Any], None]:
    def note(_: nn.Module, given: Any) -> None:
        (x,) = given
        found[Place(x.shape[1], x.shape[2], scaled)] += 1

    return note


def as_now(layers: nn.Sequential, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """As models/unet.py does without Triton."""
    y = layers[0](x)
    return layers[1](y if scale is None or shift is None else torch.addcmul(shift, y, 1 + scale))


def in_nchw(layers: nn.Sequential, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """On memory whose channels are outermost, where torch's norm needs no transposition."""
    norm: Any = layers[0]
    y = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return F.silu(y if scale is None or shift is None else torch.addcmul(shift, y, 1 + scale))


def in_triton(layers: nn.Sequential, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """By models/fused_norm.py."""
    return fused_norm.norm_silu(x, layers, scale, shift)


def ways(x: Tensor, at: Setting) -> dict[str, Callable[..., Tensor]]:
    """What is compared with `as_now` on this machine. On a CPU compiling stops short of making code, which takes minutes."""
    found: dict[str, Callable[..., Tensor]] = {}
    if fused_norm.available() and fused_norm.on_device(x):
        found["Triton"] = in_triton
    found["torch.compile" if at.on_gpu else "torch.compile's graph, not compiled"] = torch.compile(
        as_now, fullgraph=True, dynamic=False, backend="inductor" if at.on_gpu else "eager"
    )
    found["NCHW memory"] = in_nchw
    return found


def weightiest(found: Counter[Place], most: int = MOST) -> tuple[list[Place], float]:
    """The kinds with most numbers in a pass, largest first, and which share of all numbers they have."""

    def numbers(place: Place) -> int:
        return found[place] * place.channels * place.side**2

    chosen = sorted(found, key=numbers, reverse=True)[:most]
    return chosen, sum(map(numbers, chosen)) / sum(map(numbers, found))


def norms(shape: Shape, at: Setting) -> Result:
    """The weightiest kinds of norm of the generator at the shape's batch in bfloat16: forward, and backward too."""
    rows: list[Ratio] = []
    total: dict[str, list[float]] = {}
    found = places(shape)
    chosen, share = weightiest(found)
    for backward in (False, True):
        for place in chosen:
            torch._dynamo.reset()  # graphs of more than eight sizes would not be made
            for way, row in _against_now(place, shape.batch, backward, at):
                rows.append(row)
                what = f"norms of a pass{' and back' if backward else ''} ({share:.0%} of them), {shape.name}, {way}"
                sums = total.setdefault(what, [0.0, 0.0])
                sums[0] += found[place] * row.ours_seconds
                sums[1] += found[place] * row.other_seconds
    figures: dict[str, float] = {}
    for what, (ours, now) in total.items():
        figures |= {f"{what}, ms": 1e3 * ours, f"{what}, {NOW} / so": now / ours}
    whole, more = within(shape, at)
    return rows + whole, figures | more


def within(shape: Shape, at: Setting) -> Result:
    """What `Network.set_fused_norm` does to a whole pass of the generator, and to one forward and backward: time and memory."""
    rows: list[Ratio] = []
    figures: dict[str, float] = {}
    for backward, batch in ((False, shape.batch), (True, shape.train_batch)):
        now = shapes.generator(shape, at.device)
        fused = copy.deepcopy(now)
        for net in (now, fused):
            net.set_compute_dtype(torch.bfloat16) if backward else networks.ready(net, "bfloat16")
        now.set_fused_norm(False)
        x, t, y = shapes.inputs(shape, batch, at.device)
        one, other = (_pass(net, x, t, y, backward) for net in (fused, now))
        name = f"forward{' and backward' if backward else ''}, {shape.name}, bfloat16, norms in Triton, batch {batch}"
        note = f"differs {networks.difference(one(), other()):.1e}"
        if not (fused_norm.available() and fused_norm.on_device(x)):
            note += "; NOT in Triton, which does not run here"
        figures |= peaks(name, one, other, at)
        row = compare(name, one, other, against=NOW, rounds=at.rounds, device=at.device, limit=at.limit)
        rows.append(networks.noted(row, note))
    return rows, figures


def _pass(net: Any, x: Tensor, t: Tensor, y: Tensor, backward: bool) -> Callable[[], Tensor]:
    def once() -> Tensor:
        with torch.set_grad_enabled(backward):
            answer: Tensor = net(x, t, y)
            if backward:
                net.zero_grad(set_to_none=True)
                answer.square().mean().backward()
        return answer.detach()

    return once


def _against_now(place: Place, batch: int, backward: bool, at: Setting) -> list[tuple[str, Ratio]]:
    layers = nn.Sequential(normalization(place.channels), nn.SiLU()).to(at.device)
    size = (batch, place.channels, place.side, place.side)
    x = torch.randn(size, device=at.device, dtype=torch.bfloat16)
    emb = torch.randn(batch, 2 * place.channels, 1, 1, device=at.device, dtype=torch.bfloat16) if place.scaled else None
    g = channels_last(torch.randn_like(x))
    rows = []
    x = channels_last(x)
    now = _call(as_now, layers, x, emb, g if backward else None)
    for way, function in ways(x, at).items():
        plain_memory = function is in_nchw
        call = _call(
            function, layers, x.contiguous() if plain_memory else x, emb,
            None if not backward else g.contiguous() if plain_memory else g,
        )  # fmt: skip
        apart = max(networks.difference(ours, theirs) for ours, theirs in zip(call(), now()))
        kind = "norm, scale, shift, SiLU" if place.scaled else "norm, SiLU"
        name = f"{kind}{', backward too' if backward else ''}, {way}, {place.channels} channels, {place.side}px, batch {batch}"
        row = compare(
            name, call, now, against=NOW, rounds=at.rounds, device=at.device, inner=10 if at.on_gpu else 1, limit=at.limit / 12
        )  # fmt: skip
        # The image is read and written, and in backward two are read and one is written.
        work = floor.Work(0.0, (2 + 3 * backward) * 2 * x.numel())
        share = work.seconds(at.rates.flops, at.rates.bytes) / row.ours_seconds
        rows.append((way, networks.noted(row, f"differs {apart:.1e}; {share:.0%} of the bandwidth of a copy")))
    return rows


def _call(
    function: Callable[..., Tensor], layers: nn.Sequential, x: Tensor, emb: Tensor | None, g: Tensor | None
) -> Callable[[], Sequence[Tensor]]:
    """A pass forward, or forward and backward to everything that learns, from the gradient `g` of its answer."""
    given = [tensor.detach().clone().requires_grad_(g is not None) for tensor in (x, emb) if tensor is not None]

    def once() -> Sequence[Tensor]:
        scale, shift = given[1].chunk(2, dim=1) if emb is not None else (None, None)
        if g is None:
            with torch.no_grad():
                return (function(layers, given[0], scale, shift),)
        y = function(layers, given[0], scale, shift)
        return (y.detach(), *torch.autograd.grad(y, [*given, *layers.parameters()], g))

    return once
