"""Group norm, scale, shift and SiLU on a CPU: a few images at a time, so that between the steps they stay in the cache.

torch's own channels-last norm takes the variance as the mean of squares less the square of the mean. That loses its digits
where the mean is large against the deviation, as in a flat or white image. Here all is computed in the dtype of `a` and `b`,
float32 or float64, and rounded once. The formulas are those of norm_triton.py.

Legend: N batch, T places of an image, C channels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED = 1 << 18  # numbers that stay in a core's cache while they are worked on


def forward(x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """silu(a * (x - mean) * rstd + b), and mean and rstd of each channel's group, [N, C] both.

    x: [N, C, ...] in channels-last memory. a, b: [N, C].
    """
    y, mean, rstd = torch.empty_like(x), *a.new_empty(2, *a.shape)
    tokens = _tokens(x)
    places = tokens.shape[1]
    # Places within the image, on no border: in a flat image those would be far from the mean.
    sparse: Any = (..., *(slice(length // 8, None, max(1, length // 4)) for length in x.shape[2:]))
    for few, values, answer, space in _few_images(tokens, _tokens(y), a.dtype, 1):
        # Nearly the mean, that of a few places, is taken off first, so that squares do not cancel.
        sample = x[few][sparse].to(a.dtype).flatten(2)
        start = _group_mean(sample.sum(2), sample.shape[2], groups)
        away = _minus(values, start, space)
        rest = _group_mean(away.sum(1), places, groups)
        square = _group_mean(away.mul_(away).sum(1), places, groups)
        mean[few] = start + rest
        rstd[few] = torch.addcmul(square, rest, rest, value=-1).add_(eps).rsqrt_()
        slope = rstd[few] * a[few]
        v = torch.addcmul((b[few] - rest * slope)[:, None], _minus(values, start, answer), slope[:, None], out=answer)
        _tokens(y)[few] = F.silu(v, inplace=True)
    return y, mean, rstd


def backward(
    g: Tensor, x: Tensor, a: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b, from the gradient `g` of `forward`'s answer and from what it was given and found."""
    dx, da, db = torch.empty_like(x), *a.new_empty(2, *a.shape)
    places, slopes = x[0, 0].numel(), _tokens(g)
    for few, values, answer, xhat, dv in _few_images(_tokens(x), _tokens(dx), a.dtype, 2):
        sharp = rstd[few, None]
        _minus(values, mean[few], xhat).mul_(sharp)
        v = torch.addcmul(b[few, None], xhat, a[few, None], out=answer)
        torch.ops.aten.silu_backward(dv.copy_(slopes[few]), v, grad_input=dv)
        db[few] = dv.sum(1)
        da[few] = torch.mul(dv, xhat, out=answer).sum(1)
        m1 = _group_mean(a[few] * db[few], places, groups)[:, None]
        m2 = _group_mean(a[few] * da[few], places, groups)[:, None]
        torch.addcmul(-sharp * m1, xhat, -sharp * m2, out=answer).addcmul_(dv, sharp * a[few, None])
        _tokens(dx)[few] = answer
    return dx, da, db


def _tokens(x: Tensor) -> Tensor:
    """x [N, C, ...] as [N, T, C]: a view of channels-last memory."""
    return x.movedim(1, -1).flatten(1, -2)


def _few_images(tokens: Tensor, answers: Tensor, dtype: torch.dtype, spaces: int) -> Iterator[Any]:
    """Images that are worked on together, as many as fit the cache but one at least, of tokens [N, T, C].

    Yields which they are; the tokens; where their answers are computed, in `dtype`: in place if `answers` are of it; and
    `spaces` times unfilled memory of their size.
    """
    few = min(len(tokens), max(1, _CACHED // tokens[0].numel()))
    space = tokens.new_empty(spaces + (answers.dtype != dtype), few, *tokens.shape[1:], dtype=dtype)
    for start in range(0, len(tokens), few):
        which = slice(start, start + few)
        parts = space[:, : len(tokens) - start].unbind()
        yield which, tokens[which], answers[which] if answers.dtype == dtype else parts[-1], *parts[:spaces]


def _minus(values: Tensor, mean: Tensor, out: Tensor) -> Tensor:
    """values [N, T, C] less the mean [N, C], into `out` and in its dtype; a subtraction of mixed dtypes would be slow."""
    if values.dtype == out.dtype:
        return torch.sub(values, mean[:, None], out=out)
    return out.copy_(values).sub_(mean[:, None])


def _group_mean(sums: Tensor, places: int, groups: int) -> Tensor:
    """Sums over the places, [N, C] -> for each channel the mean of its group, [N, C]."""
    n, channels = sums.shape
    means = sums.view(n, groups, -1).sum(2, keepdim=True).div_(places * (channels // groups))
    return means.expand(-1, -1, channels // groups).reshape(n, channels)
