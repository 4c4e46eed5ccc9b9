"""Memory layouts of images, and the cases in which torch's operators must replace fused kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of tensor dimensions


def transformed(*tensors: Tensor) -> bool:
    """Whether a `torch.func` transform is active or any of the tensors has a forward-mode derivative: fused kernels support neither.

    False while torch.compile records, which has its own rules for them.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    )


def may_be_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active, for code that has no tensors to look at."""
    return transformed() or forward_ad._current_level >= 0


def recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records operations, to run them later and for other sizes too."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def channels_last(x: Tensor) -> Tensor:
    """`x` with its channels innermost in memory, if it is an image or volume batch; no copy if it is so already."""
    layout = CHANNELS_LAST.get(x.dim())
    if layout is None or transformed(x):  # derivatives in forward mode, and vmap, know only the plain layout
        return x.contiguous()
    if x.shape[1] == 1:  # torch takes one channel for contiguous in both layouts and would not change the strides
        return x.clone(memory_format=layout)
    return x.contiguous(memory_format=layout)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of `x` are innermost in memory, as `channels_last` lays them."""
    layout = CHANNELS_LAST.get(x.dim())
    return layout is not None and not transformed(x) and x.is_contiguous(memory_format=layout) and x.stride(1) == 1


def plain_layout(x: Tensor) -> Tensor:
    """`x` in ordinary contiguous memory; no copy if it is so already. Its gradient is contiguous too, whatever follows."""
    return x.flatten().view(x.shape)  # unlike contiguous(), whose backward passes the gradient on in its own layout


def gradients(y: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], g: Tensor) -> Iterator[Tensor | None]:
    """Differentiable gradients of y (of gradient g) by each of the `inputs` that is wanted; None for the others."""
    leaves = [tensor for tensor, needed in zip(inputs, wanted) if needed]
    of_leaves = iter(torch.autograd.grad(y, leaves, g, create_graph=True))
    return (next(of_leaves) if needed else None for needed in wanted)
