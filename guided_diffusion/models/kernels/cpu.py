"""Group norm, scale, shift and SiLU on a CPU: a few images at a time, so that between the steps they stay in the cache.

torch's own channels-last norm takes the variance as the mean of squares less the square of the mean. That loses its digits
where the mean is large against the deviation, as in a flat or white image. Here nearly the mean, that of a few places, is taken off first. All is computed
in the dtype of `a` and `b`, float32 or float64, and rounded once. The formulas are those of norm_triton.py.

Legend: N batch, T places of an image, C channels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED = 1 << 18  # numbers that stay in a core's cache while they are worked on


def forward(x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """silu(a * (x - mean) * rstd + b), and mean and rstd of each channel's group, [N, C] both.

    x: [N, C, ...] in channels-last memory. a, b: [N, C].
    """
    y, mean, rstd = torch.empty_like(x), *a.new_empty(2, *a.shape)
    tokens, answers = _tokens(x), _tokens(y)
    places = tokens.shape[1]
    for few in _few_images(x):
        values = tokens[few].to(a.dtype)
        sample = values[:, places // 32 :: max(1, places // 16)]
        start = _group_mean(sample.sum(1), sample.shape[1], groups)
        away = values - start[:, None]
        rest, square = (_group_mean(numbers.sum(1), places, groups) for numbers in (away, away * away))
        mean[few] = start + rest
        rstd[few] = torch.addcmul(square, rest, rest, value=-1).add_(eps).rsqrt_()
        slope = rstd[few] * a[few]
        v = torch.addcmul((b[few] - rest * slope)[:, None], away, slope[:, None], out=away)
        answers[few] = F.silu(v, inplace=True)
    return y, mean, rstd


def backward(
    g: Tensor, x: Tensor, a: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b, from the gradient `g` of `forward`'s answer and from what it was given and found."""
    dx, da, db = torch.empty_like(x), *a.new_empty(2, *a.shape)
    tokens, slopes, found = _tokens(x), _tokens(g), _tokens(dx)
    for few in _few_images(x):
        sharp = rstd[few, None]
        xhat = (tokens[few].to(a.dtype) - mean[few, None]).mul_(sharp)
        v = torch.addcmul(b[few, None], xhat, a[few, None])
        dv = torch.ops.aten.silu_backward(slopes[few].to(a.dtype), v)
        db[few] = dv.sum(1)
        da[few] = torch.mul(dv, xhat, out=v).sum(1)
        m1 = _group_mean(a[few] * db[few], tokens.shape[1], groups)[:, None]
        m2 = _group_mean(a[few] * da[few], tokens.shape[1], groups)[:, None]
        found[few] = torch.addcmul(-sharp * m1, xhat, -sharp * m2, out=v).addcmul_(dv, sharp * a[few, None])
    return dx, da, db


def _tokens(x: Tensor) -> Tensor:
    """x [N, C, ...] as [N, T, C]: a view of channels-last memory."""
    return x.movedim(1, -1).flatten(1, -2)


def _few_images(x: Tensor) -> Iterator[slice]:
    """Which images of x are worked on together: as many as fit the cache, one at least."""
    few = max(1, _CACHED // max(1, x[:1].numel()))
    return (slice(start, start + few) for start in range(0, len(x), few))


def _group_mean(sums: Tensor, places: int, groups: int) -> Tensor:
    """Sums over the places, [N, C] -> for each channel the mean of its group, [N, C]."""
    n, channels = sums.shape
    means = sums.view(n, groups, -1).sum(2, keepdim=True).div_(places * (channels // groups))
    return means.expand(-1, -1, channels // groups).reshape(n, channels)
