"""Self-attention over the pixels of a feature map, by torch's fused kernels, without copying q, k or v.

Shapes: N batch, T tokens (pixels), H heads, D channels per head, C = H * D.
Modules take and return [N, C, T], as the released networks do. Within a network, memory is channels-innermost: each [N, C, T] is
the transposed view of a contiguous [N, T, C], and q, k, v are strided views [N, H, T, D] of it with stride 1 in D. An input that
is contiguous as [N, C, T] gives an output that is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.layout import gradients, recorded, transformed


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v over [N, H, T, D] by basic operations: any derivative, forward or reverse mode, works."""
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v over [N, H, T, D] (Vaswani et al. 2017, equation 1), by torch's fused kernels.

    Those have neither a forward-mode nor a second derivative; where one is needed, `plain_attention` computes it.
    """
    if transformed(q, k, v):
        return plain_attention(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v)
    if out.requires_grad and not recorded():
        out = _TwiceDifferentiable.apply(out, q, k, v)
    return out


class _TwiceDifferentiable(torch.autograd.Function):
    """The identity on a fused kernel's output. Under `create_graph` its backward takes the gradients from `plain_attention`.

    It saves q, k and v, which the fused kernel saves anyway, so it costs no memory.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return g, None, None, None  # first derivatives only: the fused kernel's backward is faster
        q, k, v = ctx.saved_tensors
        return None, *gradients(plain_attention(q, k, v), (q, k, v), ctx.needs_input_grad[1:], g)


def count_flops_attn(model: Any, _x: Any, y: Any) -> None:
    """Add the multiply-adds of one attention's two matrix products to `model.total_ops`, for the `thop` package.

    thop.profile(net, inputs=(x, t), custom_ops={QKVAttention: QKVAttention.count_flops})
    """
    batch, channels, *sizes = y[0].shape
    model.total_ops += torch.DoubleTensor([2 * batch * math.prod(sizes) ** 2 * channels])


class _QKV(nn.Module):
    """Attention where one tensor holds q, k and v; the subclass says in which order its 3 * C channels hold them."""

    _dim_of_qkv: int  # the dimension of size 3 (q, k, v) once the channels are unflattened: 2 or 3 of [N, T, ., ., D]
    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv: [N, 3 * C, T]. Returns [N, C, T]."""
        return _joined(attention(*self.split(qkv)), qkv)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [N, H, T, D]."""
        width = qkv.shape[1]
        if width % (3 * self.n_heads):
            raise ValueError(f"{width} channels of queries, keys and values cannot be shared by {self.n_heads} heads.")
        sizes = [self.n_heads, width // (3 * self.n_heads)]
        sizes.insert(self._dim_of_qkv - 2, 3)
        parts = qkv.transpose(1, 2).contiguous().unflatten(2, sizes).unbind(self._dim_of_qkv)
        q, k, v = (part.transpose(1, 2) for part in parts)
        return q, k, v


def _joined(out: Tensor, qkv: Tensor) -> Tensor:
    """The heads [N, H, T, D] side by side as [N, C, T], in the memory layout of `qkv`."""
    out = out.transpose(1, 2).flatten(2).transpose(1, 2)
    return out.contiguous() if qkv.is_contiguous() else out


class QKVAttentionLegacy(_QKV):
    """Attention where each head's q, k, v are adjacent among the channels: H x (q, k, v) x D."""

    _dim_of_qkv = 3


class QKVAttention(_QKV):
    """Attention where all q precede all k precede all v among the channels: (q, k, v) x H x D."""

    _dim_of_qkv = 2


class _Values(nn.Module):
    """In place of an attention: each pixel attends to itself alone, so that its value is the result."""

    def __init__(self, of: _QKV) -> None:
        super().__init__()
        self.of = of

    def forward(self, qkv: Tensor) -> Tensor:
        return _joined(self.of.split(qkv)[2], qkv)


class _Watched(nn.Module):
    """An attention that leaves behind how much each pixel is attended to: [N, T], mean over heads, sum over queries."""

    def __init__(self, of: _QKV) -> None:
        super().__init__()
        self.of = of
        self.received: Tensor | None = None

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, _ = self.of.split(qkv)
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        self.received = scores.softmax(dim=-1).mean(dim=1).sum(dim=1)
        return self.of(qkv)


def perturbed(net: nn.Module, layers: Iterable[str]) -> nn.Module:
    """`net` with the attention of `layers`, such as "middle_block.1", replaced by its values (Ahn et al. 2024, arXiv 2403.17377).

    A second module on the same weights; `net` itself is not changed. Make it after precision and device of `net` are set.
    """
    return _with_attention(net, layers, _Values)


def watched(net: nn.Module, layer: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A callable like `net` that returns (output, attention that each pixel of the layer receives).

    The attention [N, T] is float32, the mean over heads and the sum over queries, so that its mean is 1 (Hong et al. 2023,
    arXiv 2210.00939); its T pixels are the rows of the layer's feature map one after the other. `net` itself is not changed.
    """
    copied = _with_attention(net, [layer], _Watched)
    attending: Any = copied.get_submodule(f"{layer}.attention")

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output = copied(*args, **kwargs)
        received, attending.received = attending.received, None
        return output, received

    return call


def attention_layers(net: nn.Module) -> list[str]:
    """The names of the blocks with attention, in the order of the network."""
    ends = ".attention"
    return [name.removesuffix(ends) for name, m in net.named_modules() if name.endswith(ends) and isinstance(m, _QKV)]


def _with_attention(net: nn.Module, layers: Iterable[str], wrap: Callable[[_QKV], nn.Module]) -> nn.Module:
    """A copy of `net` with other attention in `layers`. It has modules of its own on the way to them; all weights are those of `net`."""
    layers, known = list(layers), attention_layers(net)
    unknown = [name for name in layers if name not in known]
    if unknown or not layers:
        has = f"these have it: {', '.join(known)}" if known else "no layer of it has any"
        raise ValueError(f"the network has no attention in the layer {', '.join(unknown) or '(none named)'}; {has}")
    copied = _shallow(net)
    for name in layers:
        block = copied
        for part in name.split("."):
            block._modules[part] = _shallow(block._modules[part])
            block = block._modules[part]
        block._modules["attention"] = wrap(block._modules["attention"])
    return copied


def _shallow(module: Any) -> Any:
    """The same module with a table of submodules of its own."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
