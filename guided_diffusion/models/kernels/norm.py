"""Group norm, scale, shift and SiLU, which follow each other in a residual block, as one fused operation.

As separate operations they read and write the feature map three or four times and save as many copies for backward; and torch's
group norm returns channels-last input in the other layout, which costs two more copies. The fused operation reads it twice, writes
it once, and saves the input and two numbers per group. NVIDIA GPUs run norm_triton.py, CPUs cpu.py. On other devices, and for
second and forward-mode derivatives, torch's operators compute it; torch.compile does its own fusion.

On a GPU it also adds an offset per channel first, the bias of the convolution before it: cuDNN's convolution adds its bias in a
kernel of its own. `takes_bias` says where that is possible; `residual_sum` adds the bias of a block's last convolution.

Legend: N batch, C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu
from .layout import channels_last, gradients, is_channels_last, recorded, transformed
from .lines import Lines

_MOST_IMAGES = 65535  # limit of the third axis of a CUDA grid, which counts images
_MOST_NUMBERS = 2**31  # of an image, which the kernels count with 32 bits


def norm_silu(
    x: Tensor, norm: nn.GroupNorm, scale_shift: Sequence[Tensor] = (), offset: Tensor | None = None
) -> Tensor:
    """silu(norm(x + offset) * (1 + scale) + shift) of x [N, C, ...], in its dtype and layout.

    scale_shift: both [N or 1, C], or none. offset: [C] or [N or 1, C].
    """
    kernels = kernels_for(x, norm.weight, norm.bias, *scale_shift, *([] if offset is None else [offset]))
    if offset is not None and (kernels is None or not on_gpu(x)):
        x, offset = shifted(x, offset), None
    if kernels is not None:
        return _fused(kernels, x, norm, True, Lines(offset, norm.weight, norm.bias, *scale_shift))
    y = group_norm(x, norm)
    return F.silu(modulated(y, *scale_shift) if scale_shift else y)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` of x [N, C, ...] in the dtype and memory layout of x; statistics are accumulated in float32."""
    if fuses(x, norm):
        return _fused(kernels_for(x), x, norm, False, Lines(None, norm.weight, norm.bias))
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


def residual_sum(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """x + y, plus bias [C] if it is still to be added, of two [N, C, ...]."""
    alike = x.shape == y.shape and x.dtype == y.dtype and is_channels_last(y)
    if bias is None or not alike or not takes_bias(x, y, bias):
        return x + shifted(y, bias)
    return _FusedSum.apply(x, y, bias) if torch.is_grad_enabled() else kernels_for(x).add(x, y, bias)


def shifted(x: Tensor, offset: Tensor | None) -> Tensor:
    """x [N, C, ...] plus offset [C] or [N, C], in the dtype of x; None is 0."""
    return x if offset is None else x + _beside(x, offset)


def fuses(x: Tensor, norm: Any) -> bool:
    """Whether `group_norm` of x by this layer is a `FusedNorm`: on a GPU, unless `Network.set_fused_norm` forbids it."""
    return getattr(norm, "fused", False) and takes_bias(x, norm.weight, norm.bias)


def takes_bias(x: Tensor, *others: Tensor) -> bool:
    """Whether kernels of a GPU take images like x [N, C, H, W] with the `others`, and so can add a bias on the way."""
    return on_gpu(x) and kernels_for(x, *others) is not None


def modulated(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y * (1 + scale) + shift of y [N, C, ...]; scale and shift: [N or 1, C]."""
    return torch.addcmul(_beside(y, shift), y, 1 + _beside(y, scale))


def written_out(x: Tensor, groups: int, eps: float, silu: bool, *lines: Tensor | None) -> Tensor:
    """What `FusedNorm` computes, in float32 or wider, by torch's operators in the contiguous layout."""
    every = Lines(*lines)  # type: ignore[arg-type]
    x = shifted(x.to(torch.promote_types(x.dtype, torch.float32)).contiguous(), every.offset)
    a, b = every.factors(x.dtype)
    y = torch.addcmul(_beside(x, b), F.group_norm(x, groups, eps=eps), _beside(x, a))
    return F.silu(y) if silu else y


def _beside(x: Tensor, line: Tensor) -> Tensor:
    """A number per channel, [C] or [N, C], in the dtype of x [N, C, ...] and as many dimensions."""
    return line.reshape(-1, line.shape[-1], *[1] * (x.dim() - 2)).to(x.dtype)


def _fused(kernels: Any, x: Tensor, norm: nn.GroupNorm, silu: bool, lines: Lines) -> Tensor:
    """`FusedNorm`; where no gradients are wanted, what it computes alone: an autograd function would double the host's time."""
    options = norm.num_groups, norm.eps, silu
    if torch.is_grad_enabled():
        return FusedNorm.apply(x, kernels, *options, *lines)
    return kernels.forward(x, lines, *options)[0]


class FusedNorm(torch.autograd.Function):
    """Norm of x [N, C, ...] with its `Lines`, then SiLU if `silu`, by `kernels`: a module with `forward` and `backward`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernels: Any, groups: int, eps: float, silu: bool, *lines: Tensor | None
    ) -> Tensor:
        y, mean, rstd = kernels.forward(x, Lines(*lines), groups, eps, silu)  # type: ignore[arg-type]
        ctx.save_for_backward(x, mean, rstd, *lines)
        ctx.kernels, ctx.options = kernels, (groups, eps, silu)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, *lines = ctx.saved_tensors
        groups, eps, silu = ctx.options
        wanted, of_lines = ctx.needs_input_grad[5:], []
        if torch.is_grad_enabled():
            # Under create_graph the gradient must be differentiable, as only torch's operators are.
            y = written_out(x, groups, eps, silu, *lines)
            dx, *of_lines = gradients(y, (x, *lines), (ctx.needs_input_grad[0], *wanted), g.to(y.dtype))
        else:
            every = Lines(*lines)
            dx, of_images = ctx.kernels.backward(channels_last(g), x, every, mean, rstd, groups, silu)
            of_lines += every.summed(of_images, wanted)
        return dx, None, None, None, None, *of_lines


def again(y: Tensor) -> Callable[[], Tensor] | None:
    """A function that computes y, a result of `FusedNorm`, again from what backward keeps anyway; None for other tensors."""
    node: Any = y.grad_fn
    if not isinstance(getattr(node, "options", None), tuple):
        return None

    def compute() -> Tensor:
        x, mean, rstd, *lines = node.saved_tensors
        y, _, _ = node.kernels.forward(x, Lines(*lines), *node.options, (mean, rstd))
        return y

    return compute


class _FusedSum(torch.autograd.Function):
    """x + y + bias of two [N, C, H, W] in channels-last memory, by Triton."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        from . import norm_triton

        ctx.dtype = bias.dtype
        return norm_triton.add(x, y, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2]
        return g, g, g.sum((0, 2, 3), dtype=torch.float32).to(ctx.dtype) if wanted else None


def kernels_for(x: Tensor, *others: Tensor) -> Any:
    """The module with the kernels for x [N, C, ...] and the `others`, [C] or [N or 1, C] each; None = use torch's operators."""
    if recorded() or not x.numel() or not is_channels_last(x) or transformed(x, *others):
        return None
    batch_sizes = {len(other) for other in others if other.dim() > 1}
    if len(batch_sizes) > 1 or not batch_sizes <= {1, len(x)}:
        return None  # the kernels need scale and shift of one shape, and do not broadcast one image to a batch as torch does
    if on_gpu(x):
        fits = x.dim() == 4 and x.numel() < len(x) * _MOST_NUMBERS and len(x) <= _MOST_IMAGES
        return triton_kernels(x.device, x.dtype) if fits else None
    return cpu if x.device.type in ("cpu", "meta") else None  # on the meta device memory is predicted


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is on a GPU that Triton supports."""
    return x.is_cuda


@cache
def available() -> bool:
    """Whether Triton is installed (with torch for NVIDIA GPUs it is)."""
    return find_spec("triton") is not None


@cache
def triton_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """norm_triton.py if it runs on `device` in `dtype`, tried once: it needs a C compiler and a recent enough GPU. Else None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not available():
        return None
    try:
        from . import norm_triton

        with torch.inference_mode(False), torch.no_grad():
            line = torch.ones(32, device=device)
            for side in (2, 64):  # small and large images use different kernels
                x = channels_last(torch.ones(1, 32, side, side, device=device, dtype=dtype))
                norm_triton.forward(x, Lines(None, line, line), 32, 1e-5, True)
            norm_triton.add(x, x, line)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"Triton's kernels do not run for {dtype} on {device}, norms take torch's slower ones: {reason}",
            stacklevel=2,
        )
        return None
    return norm_triton
