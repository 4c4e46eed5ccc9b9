"""Group norm, scale, shift and SiLU on a CPU: a few images at a time, so that they stay in the cache from step to step.

torch's own channels-last norm computes the variance as mean of squares minus square of mean. That cancels where the mean is
large against the standard deviation, as in a flat or white image. Here everything is computed in the dtype of `a` and `b`, float32
or float64, and rounded once. The formulas are those of norm_triton.py.

Legend: N batch, T pixels of an image (tokens), C channels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lines import Lines

_CACHED = 1 << 18  # how many numbers of x fit into a core's cache together with their intermediate results


def forward(
    x: Tensor, lines: Lines, groups: int, eps: float, silu: bool = True, known: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(a * (x - mean) * rstd + b), and mean and rstd of each channel's group, [N, C] both.

    x: [N, C, ...] in channels-last memory. There is always a SiLU and no offset. `known` statistics are computed again.
    """
    assert silu and lines.offset is None
    a, b = (line.expand(len(x), -1) for line in lines.factors(torch.promote_types(x.dtype, torch.float32)))
    y, mean, rstd = torch.empty_like(x), *a.new_empty(2, *a.shape)
    tokens = _tokens(x)
    pixels = tokens.shape[1]
    # A sparse grid of inner pixels; border pixels of a flat image, next to zero padding, would be far from the mean.
    grid: Any = (..., *(slice(length // 8, None, max(1, length // 4)) for length in x.shape[2:]))
    for few, values, out, space in _few_images(tokens, _tokens(y), a.dtype, 1):
        # Subtract an estimate of the mean first, from those few pixels, so that the variance does not cancel.
        sample = x[few][grid].to(a.dtype).flatten(2)
        estimate = _group_mean(sample.sum(2), sample.shape[2], groups)
        centred = _minus(values, estimate, space)
        rest = _group_mean(centred.sum(1), pixels, groups)
        square = _group_mean(centred.mul_(centred).sum(1), pixels, groups)
        mean[few] = estimate + rest
        rstd[few] = torch.addcmul(square, rest, rest, value=-1).add_(eps).rsqrt_()
        slope = rstd[few] * a[few]
        v = torch.addcmul((b[few] - rest * slope)[:, None], _minus(values, estimate, out), slope[:, None], out=out)
        _tokens(y)[few] = F.silu(v, inplace=True)
    return y, mean, rstd


def backward(
    g: Tensor, x: Tensor, lines: Lines, mean: Tensor, rstd: Tensor, groups: int, silu: bool = True
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Gradient of x, and those of the `lines` in each image: [N, C] or None.

    g: the gradient of `forward`'s y; the other arguments are `forward`'s inputs and statistics.
    """
    assert silu
    a, b = (line.expand(len(x), -1) for line in lines.factors(mean.dtype))
    dx, da, db = torch.empty_like(x), *a.new_empty(2, *a.shape)
    pixels, dy = x[0, 0].numel(), _tokens(g)
    for few, values, out, xhat, dv in _few_images(_tokens(x), _tokens(dx), a.dtype, 2):
        rstd_ = rstd[few, None]
        _minus(values, mean[few], xhat).mul_(rstd_)
        v = torch.addcmul(b[few, None], xhat, a[few, None], out=out)
        torch.ops.aten.silu_backward(dv.copy_(dy[few]), v, grad_input=dv)
        db[few] = dv.sum(1)
        da[few] = torch.mul(dv, xhat, out=out).sum(1)
        m1 = _group_mean(a[few] * db[few], pixels, groups)[:, None]
        m2 = _group_mean(a[few] * da[few], pixels, groups)[:, None]
        torch.addcmul(-rstd_ * m1, xhat, -rstd_ * m2, out=out).addcmul_(dv, rstd_ * a[few, None])
        _tokens(dx)[few] = out
    return dx, lines.gradients(da, db)


def _tokens(x: Tensor) -> Tensor:
    """x [N, C, ...] as [N, T, C]: a view of channels-last memory."""
    return x.movedim(1, -1).flatten(1, -2)


def _few_images(tokens: Tensor, results: Tensor, dtype: torch.dtype, buffers: int) -> Iterator[Any]:
    """Split tokens [N, T, C] into sub-batches that fit the cache, of at least one image.

    Yields of each: its slice of the batch; its tokens; an output buffer in `dtype`, which is part of `results` if that has this
    dtype; and `buffers` uninitialised buffers of the same size, which the sub-batches share.
    """
    few = min(len(tokens), max(1, _CACHED // tokens[0].numel()))
    memory = tokens.new_empty(buffers + (results.dtype != dtype), few, *tokens.shape[1:], dtype=dtype)
    for start in range(0, len(tokens), few):
        which = slice(start, start + few)
        parts = memory[:, : len(tokens) - start].unbind()
        yield which, tokens[which], results[which] if results.dtype == dtype else parts[-1], *parts[:buffers]


def _minus(values: Tensor, mean: Tensor, out: Tensor) -> Tensor:
    """values [N, T, C] minus mean [N, C], into `out` and in its dtype. Cast first: torch.sub of mixed dtypes is slow."""
    if values.dtype == out.dtype:
        return torch.sub(values, mean[:, None], out=out)
    return out.copy_(values).sub_(mean[:, None])


def _group_mean(sums: Tensor, pixels: int, groups: int) -> Tensor:
    """Sums over the pixels, [N, C] -> for each channel the mean of its group, [N, C]."""
    n, channels = sums.shape
    means = sums.view(n, groups, -1).sum(2, keepdim=True).div_(pixels * (channels // groups))
    return means.expand(-1, -1, channels // groups).reshape(n, channels)
