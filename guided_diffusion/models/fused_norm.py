"""Where group norm, scale and shift, and SiLU are one operation: on NVIDIA GPUs by triton_norm.py, on CPUs by cpu.py.

Used where it fits unless `Network.set_fused_norm(False)` forbids it. torch.compile fuses by itself.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from . import cpu
from .layers import GroupNorm32, channels_last, fits_cpu_norm, is_channels_last, recorded, transformed
from .resizing import listened_to


@cache
def available() -> bool:
    """Whether Triton is installed (with torch for NVIDIA GPUs it is)."""
    return find_spec("triton") is not None


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there, tried once. Triton needs a C compiler and a card that is not too old for the dtype."""
    if not available():
        return False
    from . import triton_norm

    try:
        with torch.inference_mode(False), torch.no_grad():
            weight = torch.ones(32, device=device)
            for side in (2, 64):  # small and large images have kernels of their own
                x = channels_last(torch.ones(1, 32, side, side, device=device, dtype=dtype))
                triton_norm.fused(x, weight, weight, None, None, 32, 1e-5)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"Triton's kernels do not run for {dtype} on {device}, norms take torch's slower ones: {reason}",
            stacklevel=2,
        )
        return False
    return True


def on_device(x: Tensor) -> bool:
    """Whether `x` lies where Triton's programs run."""
    return x.is_cuda


def fits(x: Tensor, layers: nn.Sequential, emb_out: Tensor | None = None) -> bool:
    """Whether `norm_silu` may stand for the first two of the layers, applied to `x` [N, C, H, W]: as they were made, unheard.

    emb_out: the scale and shift that will be given.
    """
    norm, act = layers[0], layers[1]
    if recorded() or (emb_out is not None and len(emb_out) != len(x)):
        return False
    if (type(layers), type(norm), type(act)) != (nn.Sequential, GroupNorm32, nn.SiLU) or listened_to(layers, norm, act):
        return False
    assert isinstance(norm, nn.GroupNorm)
    given: list[Tensor] = [norm.weight, norm.bias] if emb_out is None else [norm.weight, norm.bias, emb_out]
    if not on_device(x):
        return fits_cpu_norm(x, *given)
    return (
        x.dim() == 4
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[1] * x.shape[2] * x.shape[3] < 2**31  # places within an image are counted in 32 bits
        and not transformed(x, *given)
        and is_channels_last(x)
        and works(x.device, x.dtype)
    )


def norm_silu(x: Tensor, layers: nn.Sequential, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """silu(norm(x) * (1 + scale) + shift) of a channels_last x [N, C, H, W], where the norm is the first of the layers.

    scale, shift: both [N, C, 1, 1], or neither.
    """
    norm = layers[0]
    assert isinstance(norm, nn.GroupNorm)
    function: Any = cpu.GroupNorm.apply
    if on_device(x):
        from . import triton_norm

        function = triton_norm.fused
    return function(x, norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps, True)
