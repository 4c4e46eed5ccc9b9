"""Attention over the places of an image, by torch's fused kernels, without copying q, k or v.

Shapes: N batch, T places (tokens), H heads, D channels per head, C = H * D.
Modules speak [N, C, T] as the released networks do. Within a network memory is channels-innermost: each [N, C, T] is the
transposed view of a contiguous [N, T, C], and q, k, v are strided views [N, H, T, D] of it with stride 1 in D. What is given
in the plain layout is answered in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.layout import gradients, recorded, transformed


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v over [N, H, T, D], written out: differentiable any number of times, in any mode."""
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v over [N, H, T, D] (Vaswani et al. 2017, equation 1), by the fastest fitting kernel.

    The fused kernels have neither a forward-mode nor a second derivative; where one is asked for, the written-out
    form takes over.
    """
    if transformed(q, k, v):
        return plain_attention(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v)
    if out.requires_grad and not recorded():
        out = _TwiceDifferentiable.apply(out, q, k, v)
    return out


class _TwiceDifferentiable(torch.autograd.Function):
    """The identity on a fused kernel's output; under `create_graph` it answers for the gradients of q, k, v itself.

    It keeps the tensors that the kernel keeps anyway, so it costs no memory.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return g, None, None, None  # an ordinary backward pass: the kernel's own is the faster
        q, k, v = ctx.saved_tensors
        return None, *gradients(plain_attention(q, k, v), (q, k, v), ctx.needs_input_grad[1:], g)


def count_flops_attn(model: Any, _x: Any, y: Any) -> None:
    """Add the multiply-adds of one attention's two matrix products to `model.total_ops`, for the `thop` package.

    thop.profile(net, inputs=(x, t), custom_ops={QKVAttention: QKVAttention.count_flops})
    """
    batch, channels, *places = y[0].shape
    model.total_ops += torch.DoubleTensor([2 * batch * math.prod(places) ** 2 * channels])


class _QKV(nn.Module):
    """Attention among the q, k, v that lie among the channels in one of two orders."""

    _dim_of_qkv: int  # which dimension tells q, k and v apart once the channels are split up: [N, T, ., ., D]
    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv: [N, 3 * C, T]. Returns [N, C, T]."""
        width = qkv.shape[1]
        if width % (3 * self.n_heads):
            raise ValueError(f"{width} channels of queries, keys and values cannot be shared by {self.n_heads} heads.")
        sizes = [self.n_heads, width // (3 * self.n_heads)]
        sizes.insert(self._dim_of_qkv - 2, 3)
        parts = qkv.transpose(1, 2).contiguous().unflatten(2, sizes).unbind(self._dim_of_qkv)
        out = attention(*(part.transpose(1, 2) for part in parts)).transpose(1, 2).flatten(2).transpose(1, 2)
        return out.contiguous() if qkv.is_contiguous() else out


class QKVAttentionLegacy(_QKV):
    """Attention where each head's q, k, v are neighbours among the channels: H x (q, k, v) x D."""

    _dim_of_qkv = 3


class QKVAttention(_QKV):
    """Attention where all q precede all k precede all v among the channels: (q, k, v) x H x D."""

    _dim_of_qkv = 2
