"""Attention over the places of an image, by torch's fused kernels, without copying q, k or v.

Shapes: N batch, T places (tokens), H heads, D channels per head, C = H * D.
Modules speak [N, C, T] as the released networks do; memory is channels-innermost, so each [N, C, T] here is the
transposed view of a contiguous [N, T, C], and q, k, v are strided views [N, H, T, D] of it with stride 1 in D.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import AttentionByHeads, attention_gradients
from .layers import transformed


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
    by_heads = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape == k.shape == v.shape
    if by_heads and not torch.compiler.is_compiling():
        return AttentionByHeads.apply(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v)
    if out.requires_grad and not torch.compiler.is_compiling():
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
        return None, *attention_gradients(q, k, v, g)


def _split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, int]:
    """[N, 3 * C, T] -> ([N, T, 3 * C], channels per head)."""
    width = qkv.shape[1]
    if width % (3 * n_heads):
        raise ValueError(f"{width} channels of queries, keys and values cannot be shared by {n_heads} heads.")
    return qkv.transpose(1, 2), width // (3 * n_heads)


def _attend(qkv_NT3HD: Tensor, dim: int) -> Tensor:
    """Attention of the q, k, v found along `dim` of a five-dimensional view. Returns [N, C, T]."""
    q, k, v = (part.transpose(1, 2) for part in qkv_NT3HD.unbind(dim))
    return attention(q, k, v).transpose(1, 2).flatten(2).transpose(1, 2)


class QKVAttentionLegacy(nn.Module):
    """Attention where each head's q, k, v are neighbours among the channels: H x (q, k, v) x D."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv: [N, 3 * C, T]. Returns [N, C, T]."""
        tokens, head_channels = _split_heads(qkv, self.n_heads)
        return _attend(tokens.unflatten(2, (self.n_heads, 3, head_channels)), 3)

    @staticmethod
    def count_flops(model: Any, _x: Any, y: Any) -> None:
        """Counter for the `thop` package."""
        count_flops_attn(model, _x, y)


class QKVAttention(nn.Module):
    """Attention where all q precede all k precede all v among the channels: (q, k, v) x H x D."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv: [N, 3 * C, T]. Returns [N, C, T]."""
        tokens, head_channels = _split_heads(qkv, self.n_heads)
        return _attend(tokens.unflatten(2, (3, self.n_heads, head_channels)), 2)

    @staticmethod
    def count_flops(model: Any, _x: Any, y: Any) -> None:
        """Counter for the `thop` package."""
        count_flops_attn(model, _x, y)


def count_flops_attn(model: Any, _x: Any, y: Any) -> None:
    """Add the multiply-adds of one attention's two matrix products to `model.total_ops`, for the `thop` package.

    thop.profile(net, inputs=(x, t), custom_ops={QKVAttention: QKVAttention.count_flops})
    """
    batch, channels, *places = y[0].shape
    model.total_ops += torch.DoubleTensor([2 * batch * int(np.prod(places)) ** 2 * channels])
