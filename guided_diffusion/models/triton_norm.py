"""Group norm, scale and shift, and SiLU of a channels_last image as one operation on NVIDIA GPUs, by the kernels of norm_kernels.py.

Apart they read and write the image three or four times and keep as many copies of it for backward, and torch's group norm
answers in another layout, which costs two copies more. As one they read it twice and write it once, and keep the image and
two numbers per group.

Legend: N batch, C channels, H height, W width, G groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import channels_last

_TILE = 4096  # numbers that a program holds at a time
_CHUNKS = 64  # into how many pieces a large image is cut for its sums, at most
_WHOLE = 1024  # rows of the largest image whose groups are one program each: at 64 x 64 chunks are faster, measured on an H100


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float,
    silu: bool = True,
) -> Tensor:  # fmt: skip
    """What `fused` computes, written out: the reference of its tests, and its derivative where that is derived again."""
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float,
    silu: bool = True,
) -> Tensor:  # fmt: skip
    """`plain` by Triton kernels: computed in float32, answered in the dtype and layout of x, which is channels_last.

    x: [N, C, H, W] with C a multiple of `groups`; weight, bias: [C]; scale, shift: [N, C, 1, 1] or None. The result for an
    image does not depend on the others in the batch, and repeats bit for bit, as do all gradients.
    """
    if scale is not None and shift is not None:
        scale, shift = scale.flatten(1), shift.flatten(1)
        if scale.stride() != shift.stride() or scale.stride(1) != 1:  # the kernels know one stride for both
            scale, shift = scale.contiguous(), shift.contiguous()
    with torch.cuda.device_of(x):  # Triton starts its programs on the current device
        y = _Fused.apply(channels_last(x), weight, bias, scale, shift, groups, eps, silu)
    assert isinstance(y, Tensor)
    return y


class _Plan(NamedTuple):
    """How an image of `rows` x `channels` is cut into tiles and chunks. Nothing here depends on the batch."""

    rows: int
    channels: int
    tile_rows: int
    tile_channels: int
    per_chunk: int
    whole: bool
    """Whether one program works through a whole group, and tiles are as wide as that."""

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.per_chunk)

    @property
    def tiles(self) -> int:
        """Tiles beside each other."""
        return -(-self.channels // self.tile_channels)


def _plan(x: Tensor, groups: int) -> _Plan:
    rows, channels = x.shape[2] * x.shape[3], x.shape[1]
    whole = rows <= _WHOLE
    tile_channels = _power(channels // groups) if whole else min(128, _power(channels))
    tile_rows = min(max(1, _TILE // tile_channels), _power(rows))
    per_chunk = tile_rows * -(-rows // (_CHUNKS * tile_rows))
    return _Plan(rows, channels, tile_rows, tile_channels, per_chunk, whole)


def _power(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int,
        eps: float, silu: bool,
    ) -> Tensor:  # fmt: skip
        from . import norm_kernels as kernels

        y, plan = torch.empty_like(x), _plan(x, groups)
        mean, rstd = torch.empty(2, len(x) * groups, dtype=torch.float32, device=x.device)
        scale_, shift_, stride = _rows_of(scale, shift, weight)
        known = (x, y, mean, rstd, weight, bias, scale_, shift_, plan.rows, plan.channels, stride)
        how = {"GROUPS": groups, "SCALED": scale is not None, "SILU": silu}
        how |= {"ROWS": plan.tile_rows, "CHANNELS": plan.tile_channels}
        if plan.whole:
            kernels.forward_whole[(len(mean),)](*known, eps, **how)
        else:
            _statistics(x, mean, rstd, plan, groups, eps)
            kernels.forward[-(-plan.rows // plan.tile_rows), plan.tiles, len(x)](*known, **how)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself may be derived: only the written-out form can
            given = (x, weight, bias, scale, shift)
            asked = [tensor for tensor, wanted in zip(given, ctx.needs_input_grad) if wanted]
            wide: list[Any] = [None if tensor is None else tensor.float() for tensor in given]
            if scale is not None:
                wide[3:] = [tensor[:, :, None, None] for tensor in wide[3:]]
            x_, weight_, bias_, scale_, shift_ = wide
            y = plain(x_, weight_, bias_, scale_, shift_, ctx.groups, ctx.eps, ctx.silu)
            found = iter(torch.autograd.grad(y, asked, g.float(), create_graph=True))
            return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:5]), None, None, None
        return *_gradients(ctx, channels_last(g), x, weight, bias, scale, shift, mean, rstd), None, None, None


def _rows_of(scale: Tensor | None, shift: Tensor | None, otherwise: Tensor) -> tuple[Tensor, Tensor, int]:
    """scale and shift [N, C], and how far apart images are in both. A kernel needs an address even for what it does not read."""
    if scale is None or shift is None:
        return otherwise, otherwise, 0
    return scale, shift, scale.stride(0)


def _statistics(x: Tensor, mean: Tensor, rstd: Tensor, plan: _Plan, groups: int, eps: float) -> None:
    """Fill in mean and 1 / standard deviation of every group, float32 [N * G] each, of large images."""
    from . import norm_kernels as kernels

    means = torch.empty(len(x), plan.chunks, plan.channels, dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    kernels.chunk_moments[plan.chunks, plan.tiles, len(x)](
        x, means, squares, plan.rows, plan.channels, plan.per_chunk, plan.chunks,
        ROWS=plan.tile_rows, CHANNELS=plan.tile_channels,
    )  # fmt: skip
    kernels.group_moments[(len(mean),)](
        means, squares, mean, rstd, plan.rows, plan.channels, plan.per_chunk, plan.chunks, eps,
        GROUPS=groups, CHUNKS=_power(plan.chunks), CHANNELS=_power(plan.channels // groups),
    )  # fmt: skip


def _gradients(
    ctx: Any, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias, scale and shift; None for those that nobody asked for."""
    from . import norm_kernels as kernels

    plan, n, groups = _plan(x, ctx.groups), len(x), ctx.groups
    of_x, of_weight, of_bias, of_scale, of_shift = ctx.needs_input_grad[:5]
    scale_, shift_, stride = _rows_of(scale, shift, weight)
    known = (mean, rstd, weight, bias, scale_, shift_)
    how = {"GROUPS": groups, "SCALED": scale is not None}
    tile = {"SILU": ctx.silu, "ROWS": plan.tile_rows, "CHANNELS": plan.tile_channels}
    s1, s2 = torch.empty(2, n, plan.channels, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if of_x or plan.whole else None  # backward_whole writes it anyway
    if plan.whole:
        kernels.backward_whole[(len(mean),)](
            g, x, dx, *known, s1, s2, plan.rows, plan.channels, stride, **how, **tile
        )  # fmt: skip
    else:
        sums, products = torch.empty(2, n, plan.chunks, plan.channels, dtype=torch.float32, device=x.device)
        m1, m2 = torch.empty(2, len(mean), dtype=torch.float32, device=x.device)
        kernels.chunk_gradients[plan.chunks, plan.tiles, n](
            g, x, *known, sums, products, plan.rows, plan.channels, plan.per_chunk, plan.chunks, stride, **how, **tile
        )
        kernels.group_gradients[(len(mean),)](
            sums, products, weight, scale_, s1, s2, m1, m2, plan.rows, plan.channels, plan.chunks, stride,
            **how, CHUNKS=_power(plan.chunks), CHANNELS=_power(plan.channels // groups),
        )  # fmt: skip
        if of_x:
            kernels.backward[-(-plan.rows // plan.tile_rows), plan.tiles, n](
                g, x, dx, *known, m1, m2, plan.rows, plan.channels, stride, **how, **tile
            )
    widened = 1.0 if scale is None else 1 + scale.float()
    return (
        dx if of_x else None,
        (widened * s2).sum(0).to(weight.dtype) if of_weight else None,
        (widened * s1).sum(0).to(bias.dtype) if of_bias else None,
        (weight.float() * s2 + bias.float() * s1).to(scale.dtype) if of_scale and scale is not None else None,
        s1.to(shift.dtype) if of_shift and shift is not None else None,
    )
