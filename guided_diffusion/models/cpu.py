"""What torch's CPU kernels do slowly, by detours that give the same numbers up to rounding.

Three cases, each with torch's own way as its reference in tests/models/test_cpu.py and with its measurements in
docs/performance.md: matrix products in float32, group norm (which torch also computes inexactly), attention in bfloat16.
Nothing here is used on other devices, inside recorded graphs or under function transforms; callers see to that.

Legend: N batch, C channels, T places, H heads, D channels per head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_IMAGES = 16  # from this batch size on, torch hands 1x1 convolutions to oneDNN even on a single thread
_CACHED = 1 << 18  # numbers of a float32 copy that stay in a core's cache while they are worked on
_SCORES = 1 << 20  # attention scores worked on at a time, per thread


def mixes_as_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether `mix_channels` takes `x` [..., C] and `weight` [out, C].

    torch's float32 matrix products come from MKL, which on an AMD processor stayed below half of the rate that oneDNN's
    convolutions reached; on an Intel one both rates were about equal.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous()
        and x.numel() >= _IMAGES * x.shape[-1]
        and x.numel() % (_IMAGES * x.shape[-1]) == 0
        and torch.backends.mkldnn.is_available()
    )


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)` for x [..., C], as a 1x1 convolution over 16 images cut from x; no copy of x is made."""
    images = x.view(_IMAGES, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    mixed = F.conv2d(images, weight[:, :, None, None], bias)
    return mixed.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class GroupNorm(torch.autograd.Function):
    """silu(norm(x) * (1 + scale) + shift) of x [N, C, H, W] or [N, C, D, H, W] in channels_last memory; SiLU only if asked for.

    weight, bias: [C]. scale, shift: [N, C, 1, ...], or None. torch's own norm in that layout takes the variance as the mean of
    squares less the square of the mean, which is lost where the mean is large against the deviation, as in a flat or white
    image. Here nearly the mean is taken off first. All is computed in float32 (or float64) and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int,
        eps: float, silu: bool,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(x.dtype, torch.float32)
        factor, summand = _factors(x, wide, weight, bias, scale, shift)
        mean, rstd = _statistics(x, groups, eps, wide)
        centre, times = _per_channel(mean, x), _per_channel(rstd, x) * factor
        summand, y = torch.addcmul(summand, centre, times, value=-1), torch.empty_like(x)
        space = y if x.dtype == wide else _space(x, wide)
        for part in _few_images(x):
            out = y[part] if x.dtype == wide else space[: len(x[part])]
            torch.addcmul(summand[part], x[part] if x.dtype == wide else out.copy_(x[part]), times[part], out=out)
            out = F.silu(out, inplace=True) if silu else out
            if x.dtype != wide:
                y[part] = out
        ctx.save_for_backward(x, weight, bias, scale, shift, centre, rstd)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, centre, rstd = ctx.saved_tensors
        wide = centre.dtype
        factor, summand = _factors(x, wide, weight, bias, scale, shift)
        like, wanted = (x, weight, bias, scale, shift), ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # a derivative of this derivative may follow
            y = torch.addcmul(summand, F.group_norm(x.to(wide).contiguous(), ctx.groups, eps=ctx.eps), factor)
            leaves = [tensor for tensor, asked in zip(like, wanted) if asked]
            found = torch.autograd.grad(F.silu(y) if ctx.silu else y, leaves, grad.to(wide), create_graph=True)
            rest = iter(found)
            return *(next(rest) if asked else None for asked in wanted), None, None, None
        # With xhat = rstd * (x - centre), and g taken back through the SiLU, the gradient of x is
        # rstd * (factor * g - m1 - xhat * m2), where m1, m2 are the group's means of factor * g and of factor * g * xhat.
        to_x, places, size = torch.empty_like(x), tuple(range(2, x.dim())), x[:1].numel() // ctx.groups
        sums, products = torch.empty_like(centre), torch.empty_like(centre)
        xhat, g, other = _space(x, wide), _space(x, wide), _space(x, wide) if x.dtype != wide else None
        for part in _few_images(x):
            out = to_x[part] if other is None else other[: len(x[part])]
            xhat, g, sharp = xhat[: len(out)], g[: len(out)], _per_channel(rstd[part], x)
            _subtract(x[part], centre[part], xhat).mul_(sharp)
            g.copy_(grad[part])
            if ctx.silu:
                torch.addcmul(summand[part], xhat, factor[part], out=out)
                torch.ops.aten.silu_backward(g, out, grad_input=g)
            torch.sum(g, places, keepdim=True, out=sums[part])
            torch.sum(torch.mul(g, xhat, out=out), places, keepdim=True, out=products[part])
            both = torch.stack([sums[part], products[part]]).mul_(factor[part])
            m1, m2 = both.view(2, len(out), ctx.groups, -1).sum(3).mul_(rstd[part] / -size)
            torch.addcmul(_per_channel(m1, x), xhat, _per_channel(m2, x), out=out)
            out.addcmul_(g, sharp * factor[part])
            if other is not None:
                to_x[part] = out
        to_scale = None
        by_weight, by_bias = products, sums
        if scale is not None:
            one = factor.new_ones(1, len(weight), *[1] * len(places))
            to_scale = (weight.view_as(one) * products + bias.view_as(one) * sums).to(scale.dtype)
            by_weight, by_bias = products * (1 + scale.to(wide)), sums * (1 + scale.to(wide))
        to_weight, to_bias = by_weight.sum(0).flatten().to(weight.dtype), by_bias.sum(0).flatten().to(bias.dtype)
        return to_x, to_weight, to_bias, to_scale, None if shift is None else sums.to(shift.dtype), None, None, None


def _factors(
    x: Tensor, wide: torch.dtype, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What multiplies the normalised x and what is added, for each image and channel: [N, C, 1, ...] both, in `wide`."""
    of_all = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = weight.to(wide).view(of_all), bias.to(wide).view(of_all)
    if scale is None or shift is None:
        return weight.expand(len(x), *weight.shape[1:]), bias.expand(len(x), *bias.shape[1:])
    more = 1 + scale.to(wide)
    return weight * more, torch.addcmul(shift.to(wide), bias, more)


def _statistics(x: Tensor, groups: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each group the mean and 1 / sqrt(variance + eps), [N, groups] both."""
    places, size = tuple(range(2, x.dim())), x[:1].numel() // groups
    # Nearly the mean, that of a few places, is taken off first, so that squares do not cancel.
    sparse: Any = (..., *(slice(length // 8, None, max(1, length // 4)) for length in x.shape[2:]))
    start = x[sparse].to(dtype).mean(dim=places).view(len(x), groups, -1).mean(dim=2)
    centre, space = _per_channel(start, x), _space(x, dtype)
    sums = centre.new_empty(2, *centre.shape)
    for part in _few_images(x):
        away = _subtract(x[part], centre[part], space[: len(x[part])])
        # torch.sum forms partial sums. One after the other, as in torch's norm, terms lose digits in large images.
        torch.sum(away, places, keepdim=True, out=sums[0, part])
        torch.sum(away.mul_(away), places, keepdim=True, out=sums[1, part])
    mean, square = sums.view(2, len(x), groups, -1).sum(3).div_(size)
    return start.add_(mean), torch.addcmul(square, mean, mean, value=-1).add_(eps).rsqrt_()


def _few_images(x: Tensor) -> list[slice]:
    """Which images of x [N, C, ...] are worked on together: as many as fit the cache, one at least."""
    few = max(1, _CACHED // max(1, x[:1].numel()))
    return [slice(start, start + few) for start in range(0, len(x), few)]


def _space(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Unfilled, for as many images as are worked on together, in the layout of x."""
    return torch.empty_like(x[: max(1, _CACHED // max(1, x[:1].numel()))], dtype=dtype)


def _subtract(x: Tensor, centre: Tensor, out: Tensor) -> Tensor:
    """x - centre into `out`, in its dtype. In place of a mixed subtraction, which is slow."""
    return torch.sub(x, centre, out=out) if x.dtype == out.dtype else out.copy_(x).sub_(centre)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """values [N, groups] -> those of each channel's group, [N, C, 1, ...], for the channels of x [N, C, ...]."""
    each = values[:, :, None].expand(-1, -1, x.shape[1] // values.shape[1])
    return each.reshape(len(values), x.shape[1], *[1] * (x.dim() - 2))


class AttentionByHeads(torch.autograd.Function):
    """softmax(q k' / sqrt(D)) v over bfloat16 [N, H, T, D], a few heads at a time; backward computes the softmax again.

    torch's fused kernel takes as long in bfloat16 as in float32; products and softmax by themselves take half of that, with
    the scores of a few heads in the cache. Scores are rounded to bfloat16 before the softmax (2021 rounded them to float16),
    so errors are about twice those of the fused kernel: 5e-3.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out = _tokens_like(q)
        for q_, k_, v_, out_ in zip(*map(_few_heads, (q, k, v, out))):
            torch.bmm(_softmax(q_, k_), v_, out=out_)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        if torch.is_grad_enabled():
            return attention_gradients(q, k, v, grad)
        to_q, to_k, to_v = _tokens_like(q), _tokens_like(k), _tokens_like(v)
        scale = 1 / math.sqrt(q.shape[-1])
        parts = zip(*map(_few_heads, (q, k, v, grad, to_q, to_k, to_v)))
        for q_, k_, v_, grad_, to_q_, to_k_, to_v_ in parts:
            weights = _softmax(q_, k_)
            torch.bmm(weights.transpose(1, 2), grad_, out=to_v_)
            to_weights = torch.bmm(grad_, v_.transpose(1, 2))
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, q.dtype)
            torch.bmm(to_scores, k_ * scale, out=to_q_)
            torch.bmm(to_scores.transpose(1, 2), q_ * scale, out=to_k_)
        return to_q, to_k, to_v


def attention_gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention at q, k, v [N, H, T, D], written out so that they can be differentiated again."""
    scale = 1 / math.sqrt(q.shape[-1])
    weights = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    grad_weights = grad @ v.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True)) * scale
    return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad


def _tokens_like(x: Tensor) -> Tensor:
    """Unfilled, of the shape [N, H, T, D] of x; in memory [N, T, H, D], which is what follows in the network."""
    n, h, t, d = x.shape
    return x.new_empty(n, t, h, d).transpose(1, 2)


def _few_heads(x: Tensor) -> list[Tensor]:
    """Views [few, T, D] of x [N, H, T, D], as many heads of one image as their scores may fill the cache."""
    heads, places = x.shape[1], x.shape[2]
    few = max(1, min(heads, torch.get_num_threads() * _SCORES // places**2))
    return [part for image in x for part in image.split(few)]


def _softmax(q: Tensor, k: Tensor) -> Tensor:
    """The weights [few, T, T] of places for each other."""
    return torch.softmax(torch.bmm(q * (1 / math.sqrt(q.shape[-1])), k.transpose(1, 2)), dim=-1)
