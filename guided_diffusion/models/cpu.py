"""What torch's CPU kernels do slowly, by detours that give the same numbers up to rounding.

Three cases, each with torch's own way as its reference in tests/models/test_cpu.py and with its measurements in
docs/performance.md: matrix products in float32, group norm in bfloat16, attention in bfloat16. Nothing here is
used on other devices, inside compiled graphs or under function transforms; callers see to that.

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


class Bfloat16GroupNorm(torch.autograd.Function):
    """Group norm of a bfloat16 image in channels_last memory, [N, C, H, W], with float32 weight and bias [C].

    torch's kernels fall back on scalar code there: backward always (6 times slower than on float32), forward where the
    image is small. Those go through float32 copies of a few images at a time; what is kept for backward stays bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, places = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        source = x if places >= 1024 else x.float()  # torch's own limit between its two ways to walk through an image
        y, mean, rstd = torch.native_group_norm(source, weight, bias, n, c, places, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # a derivative of this derivative may follow: torch's own formulas have one
            leaves = [tensor for tensor, asked in zip((x, weight, bias), wanted) if asked]
            y = torch.group_norm(x.float(), ctx.groups, weight, bias, ctx.eps)
            found = iter(torch.autograd.grad(y, leaves, grad.float(), create_graph=True))
            return *(next(found) if asked else None for asked in wanted), None, None
        n, c, places = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x)
        sums: list[Tensor | None] = [None, None]
        few = max(1, _CACHED // (c * places))
        for start in range(0, n, few):
            part = slice(start, min(start + few, n))
            given = (grad[part].float(), x[part].float(), mean[part].float(), rstd[part].float(), weight)
            to_x, *to_parameters = torch.ops.aten.native_group_norm_backward(
                *given, part.stop - start, c, places, ctx.groups, [True, *wanted[1:]]
            )
            grad_x[part] = to_x
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, to_parameters)]
        return grad_x, *sums, None, None


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
