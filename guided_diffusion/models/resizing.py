"""Twice or half the size, and a way to convolve an image doubled by repetition without ever doubling it.

Each output of a 3x3 convolution of the doubled image sees only 2x2 different pixels of the small one, so its nine weights
fall together into four, other ones for each of the four places within a small pixel. All four at once are a transposed
convolution of the small image with a 4x4 kernel: 16 products per small pixel where convolving the doubled image takes 36.
The numbers are the same but for rounding (sums of weights are formed first).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Conv2d, avg_pool_nd, conv_nd, is_channels_last, recorded

_MEASURING = ("torch.", f"{__package__.split('.models')[0]}.")
_OWN = ("torch.", f"{__package__}.")  # modules whose code takes any memory layout

# Which of the rows 0..2 of the 3x3 kernel each row of the 4x4 kernel sums up; columns alike.
_ROWS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def listened_to(*modules: nn.Module) -> bool:
    """Whether hooks wait for any of the modules to be called."""
    for m in modules:  # noqa: SIM110  for every module at every call, so in the fastest of ways
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
    return False


def _hooks(m: nn.Module) -> list[Mapping[int, Any]]:
    """Those that `listened_to` asks about."""
    return [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]


def looked_at(net: nn.Module) -> bool:
    """Whether somebody sees what the modules within `net` take and give: by a hook, or by code of their own in one of them."""
    everywhere = torch.nn.modules.module
    held = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    held += [everywhere._global_backward_hooks, everywhere._global_backward_pre_hooks]
    if any(_foreign(hooks) for hooks in held):
        return True
    kinds, waiting = set(), list(net._modules.values())
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        if "forward" in module.__dict__ or (listened_to(module) and any(map(_foreign, _hooks(module)))):
            return True
        kinds.add(type(module))
        waiting += module._modules.values()
    # Where a function was written; `__module__` is copied by decorators.
    return any(not getattr(kind.forward, "__globals__", {}).get("__name__", "").startswith(_OWN) for kind in kinds)


def _foreign(hooks: Mapping[int, Any]) -> bool:
    """Whether a hook is of other code than torch's and this package's, which measure what they must not change."""
    return any(not getattr(hook, "__module__", "").startswith(_MEASURING) for hook in hooks.values())


def worth_joining(x: Tensor, conv: nn.Module) -> bool:
    """Whether `doubled_conv` may stand for doubling `x` and applying `conv`, and is known to be faster.

    Known is float32 on the CPU, outside of compiled graphs, where a batch has enough pixels to pay for forming the kernel.
    """
    return (
        type(conv) is Conv2d
        and x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and not recorded()
        and (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and x.shape[0] * x.shape[2] * x.shape[3] >= 2 * x.shape[1]
        and is_channels_last(x)
        and not listened_to(conv)
    )


def doubled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` of the nearest neighbour doubling of x, for a 3x3 convolution. x: [N, C, H, W]. Returns [N, out, 2H, 2W]."""
    rows = torch.tensor(_ROWS, dtype=x.dtype, device=x.device)
    out_channels, in_channels = conv.weight.shape[:2]
    kernel = conv.weight.reshape(-1, 9) @ torch.kron(rows, rows).T
    kernel = kernel.view(out_channels, in_channels, 4, 4).transpose(0, 1)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def resized_conv(x: Tensor, resize: nn.Module, conv: nn.Module) -> Tensor:
    """`conv(resize(x))`, by the shorter way where there is one."""
    doubles = type(resize) is Upsample and resize.dims == 2 and not resize.use_conv and not listened_to(resize)
    if doubles and worth_joining(x, conv):
        assert isinstance(conv, nn.Conv2d)
        return doubled_conv(x, conv)
    return conv(resize(x))


class Upsample(nn.Module):
    """Twice the size by repetition, with a 3x3 convolution after it if `use_conv`. In 3-D only height and width grow."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        self.scale = (1.0, 2.0, 2.0) if dims == 3 else 2.0
        if use_conv:
            self.conv = conv_nd(dims, self.channels, self.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        if self.use_conv and self.dims == 2 and worth_joining(x, self.conv):
            return doubled_conv(x, self.conv)  # type: ignore[arg-type]
        x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Half the size, by a strided 3x3 convolution if `use_conv`, else by averaging. In 3-D only height and width."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, self.channels, self.out_channels, 3, stride=stride, padding=1)
        elif self.channels != self.out_channels:
            raise ValueError(f"averaging cannot turn {channels} channels into {out_channels}: set use_conv.")
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.op(x)
