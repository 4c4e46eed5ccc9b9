"""Operations by torch's own operators: in any mode, on any device, derivable any number of times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .layout import channels_last, is_channels_last, transformed


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` of x [N, C, ...] in the dtype and memory layout of x; torch accumulates the statistics in float32."""
    weight: Tensor = norm.weight
    bias: Tensor = norm.bias
    if weight.dtype != x.dtype and x.device.type != "cpu":  # the CPU kernel takes float32 parameters as they are
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    channels_were_last = is_channels_last(x)
    # torch's channels-last norm on the CPU loses digits, and crashes (2.13) where weights have a gradient and x has none. For
    # forward mode there is none at all. Inductor writes its own.
    if (x.device.type == "cpu" and not torch.compiler.is_compiling()) or transformed(x, weight, bias):
        x = x.contiguous()
    y = torch.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return channels_last(y) if channels_were_last else y  # some CUDA kernels answer in the plain layout


def modulated(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y * (1 + scale) + shift."""
    return torch.addcmul(shift, y, 1 + scale)


def gradients(y: Tensor, given: Sequence[Tensor], wanted: Sequence[bool], g: Tensor) -> Iterator[Tensor | None]:
    """Of y, at those of the given tensors that are wanted, such that they can be derived again; None for the others."""
    asked = [tensor for tensor, needed in zip(given, wanted) if needed]
    found = iter(torch.autograd.grad(y, asked, g, create_graph=True))
    return (next(found) if needed else None for _, needed in zip(given, wanted))
