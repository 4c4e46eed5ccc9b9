"""In which layout images lie in memory, and when torch's operators must do what a kernel of our own does otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of tensor dimensions


def transformed(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation or a `torch.func` transform is at work: fused kernels cannot follow those."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def recorded() -> bool:
    """Whether operations are recorded to run later, for other sizes too: by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def channels_last(x: Tensor) -> Tensor:
    """`x` with its channels innermost in memory, where such a layout exists (images, volumes): no copy if it has it."""
    layout = CHANNELS_LAST.get(x.dim())
    if layout is None or transformed(x):  # derivatives in forward mode, and vmap, know only the plain layout
        return x.contiguous()
    if x.shape[1] == 1:  # torch calls one channel contiguous in both layouts, and goes on by strides
        return x.clone(memory_format=layout)
    return x.contiguous(memory_format=layout)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of `x` are innermost in memory, as `channels_last` lays them."""
    layout = CHANNELS_LAST.get(x.dim())
    return layout is not None and not transformed(x) and x.is_contiguous(memory_format=layout) and x.stride(1) == 1


def plain_layout(x: Tensor) -> Tensor:
    """`x` in ordinary contiguous memory, no copy if it is. So is its gradient, whatever the layouts in between."""
    return x.flatten().view(x.shape)  # backward is the same the other way round


def gradients(y: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], g: Tensor) -> Iterator[Tensor | None]:
    """Of y, at those of its inputs that are wanted, such that they can be derived again; None for the others."""
    leaves = [tensor for tensor, needed in zip(inputs, wanted) if needed]
    of_leaves = iter(torch.autograd.grad(y, leaves, g, create_graph=True))
    return (next(of_leaves) if needed else None for needed in wanted)
