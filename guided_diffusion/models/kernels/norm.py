"""Group norm, scale, shift and SiLU, which follow each other in a residual block, as one fused operation.

As separate operations they read and write the feature map three or four times and save as many copies for backward; and torch's
group norm returns channels-last input in the other layout, which costs two more copies. The fused operation reads it twice, writes
it once, and saves the input and two numbers per group. NVIDIA GPUs run norm_triton.py, CPUs cpu.py. On other devices, and for
second and forward-mode derivatives, torch's operators compute it; torch.compile does its own fusion.

Legend: N batch, C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import channels_last, gradients, is_channels_last, recorded, transformed

_MOST_IMAGES = 65535  # limit of the third axis of a CUDA grid, which counts images


def norm_silu(x: Tensor, norm: nn.GroupNorm, scale_shift: Sequence[Tensor] | None = None) -> Tensor:
    """silu(norm(x) * (1 + scale) + shift) of x [N, C, ...], in its dtype and layout. scale_shift: [N, C, 1, ...] both."""
    kernels = _kernels(x, norm.weight, norm.bias, *(scale_shift or ()))
    if kernels is None:
        y = group_norm(x, norm)
        return F.silu(y if scale_shift is None else modulated(y, *scale_shift))
    # The kernels take one factor a and one summand b per image and channel; autograd differentiates how these are made.
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = norm.weight.to(wide), norm.bias.to(wide)
    if scale_shift is not None:
        scale, shift = (part.flatten(1).to(wide) for part in scale_shift)
        a, b = a * (1 + scale), modulated(b, scale, shift)
    return NormSiLU.apply(x, a.expand(len(x), -1), b.expand(len(x), -1), norm.num_groups, norm.eps, kernels)


class NormSiLU(torch.autograd.Function):
    """silu(a * norm(x) + b) by `kernels`, a module with `forward` and `backward`. x: [N, C, ...]; a, b: [N, C], of the wider dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float, kernels: Any) -> Tensor:
        y, mean, rstd = kernels.forward(x, a, b, groups, eps)
        ctx.save_for_backward(x, a, b, mean, rstd)
        ctx.groups, ctx.eps, ctx.kernels = groups, eps, kernels
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mean, rstd = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *ctx.kernels.backward(channels_last(g), x, a, b, mean, rstd, ctx.groups), None, None, None
        # Under create_graph the gradient must be differentiable, which only torch's operators are.
        y = written_out(x.to(a.dtype), a, b, ctx.groups, ctx.eps)
        return *gradients(y, (x, a, b), ctx.needs_input_grad, g.to(a.dtype)), None, None, None


def written_out(x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
    """What `NormSiLU` computes, by torch's operators in the contiguous layout."""
    broadcast = (*a.shape, *[1] * (x.dim() - 2))
    y = F.group_norm(x.contiguous(), groups, eps=eps)
    return F.silu(torch.addcmul(b.view(broadcast), y, a.view(broadcast)))


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` of x [N, C, ...] in the dtype and memory layout of x; torch accumulates the statistics in float32."""
    weight: Tensor = norm.weight
    bias: Tensor = norm.bias
    if weight.dtype != x.dtype and x.device.type != "cpu":  # the CPU kernel takes float32 parameters as they are
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    channels_were_last = is_channels_last(x)
    # torch's channels-last group norm on the CPU loses digits, and crashes (2.13) where weights need a gradient and x does not; in
    # forward mode there is no such kernel. The contiguous one has none of these faults. torch.compile generates its own.
    if (x.device.type == "cpu" and not torch.compiler.is_compiling()) or transformed(x, weight, bias):
        x = x.contiguous()
    y = torch.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return channels_last(y) if channels_were_last else y  # some CUDA kernels return the contiguous layout


def modulated(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y * (1 + scale) + shift."""
    return torch.addcmul(shift, y, 1 + scale)


def _kernels(x: Tensor, *others: Tensor) -> Any:
    """The module with the kernels for `norm_silu` of x and the `others` (weight, bias, scale, shift); None = use torch's operators."""
    if recorded() or not x.numel() or not is_channels_last(x) or transformed(x, *others):
        return None
    batch_sizes = {len(part) for part in others if part.dim() > 1}
    if len(batch_sizes) > 1 or batch_sizes - {1, len(x)}:
        return None  # the kernels need scale and shift of one shape, and do not broadcast one image to a batch as torch does
    if on_gpu(x):
        # the kernels index the numbers of an image with 32 bits
        fits = x.dim() == 4 and x[0].numel() < 2**31 and len(x) <= _MOST_IMAGES
        supported = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not fits or not supported or not works(x.device, x.dtype):
            return None
        from . import norm_triton

        return norm_triton
    if x.device.type not in ("cpu", "meta"):  # cpu.py also serves the meta device, where memory is predicted
        return None
    from . import cpu

    return cpu


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is on a GPU that Triton supports."""
    return x.is_cuda


@cache
def available() -> bool:
    """Whether Triton is installed (with torch for NVIDIA GPUs it is)."""
    return find_spec("triton") is not None


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run on `device` in `dtype`, tried once: they need a C compiler and a recent enough GPU."""
    if not available():
        return False
    try:
        from . import norm_triton

        with torch.inference_mode(False), torch.no_grad():
            a = torch.ones(1, 32, device=device)
            for side in (2, 64):  # small and large images use different kernels
                x = channels_last(torch.ones(1, 32, side, side, device=device, dtype=dtype))
                norm_triton.forward(x, a, a, 32, 1e-5)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"Triton's kernels do not run for {dtype} on {device}, norms take torch's slower ones: {reason}",
            stacklevel=2,
        )
        return False
    return True
