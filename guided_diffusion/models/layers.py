"""What every network is made of: layers that cast their weights at use, group norm, time embedding, checkpointing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import cpu

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NORM_GROUPS = 32  # of all released networks; the number is not stored with the weights, so it cannot change

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of tensor dimensions


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
    layout = _CHANNELS_LAST.get(x.dim())
    if layout is None or transformed(x):  # derivatives in forward mode, and vmap, know only the plain layout
        return x.contiguous()
    if x.shape[1] == 1:  # torch calls one channel contiguous in both layouts, and goes on by strides
        return x.clone(memory_format=layout)
    return x.contiguous(memory_format=layout)


def plain_layout(x: Tensor) -> Tensor:
    """`x` in ordinary contiguous memory, no copy if it is. So is its gradient, whatever the layouts in between."""
    return x.flatten().view(x.shape)  # backward is the same the other way round


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of `x` are innermost in memory, as `channels_last` lays them."""
    layout = _CHANNELS_LAST.get(x.dim())
    return layout is not None and not transformed(x) and x.is_contiguous(memory_format=layout) and x.stride(1) == 1


def _weight_as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. A cast writes channels_last, which convolutions of channels_last images want anyway."""
    if weight.dtype == dtype:
        return weight
    layout = _CHANNELS_LAST.get(weight.dim(), torch.preserve_format)
    return weight.to(dtype, memory_format=layout)


class _CastAtUse:
    """Mixed in before a torch layer: parameters stay in full precision and are cast to the input's dtype when used."""

    weight: Any  # parameters; torch's own layers do not agree on how to declare them
    bias: Any

    def _parameters_as(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = self.weight
        if weight.requires_grad and torch.is_grad_enabled():
            weight = plain_layout(weight)  # no copy: a weight that learns is stored so
        return _weight_as(weight, x.dtype), None if self.bias is None else self.bias.to(x.dtype)


def _is_matrix_product(conv: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether the convolution only mixes the channels of each place."""
    ones, zeros = (1,) * len(conv.kernel_size), (0,) * len(conv.kernel_size)
    return conv.kernel_size == ones and conv.stride == ones and conv.padding == zeros and conv.groups == 1


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x [..., C], by the faster way where one is known."""
    if not recorded() and cpu.mixes_as_convolution(x, weight) and not transformed(x, weight):
        return cpu.mix_channels(x, weight, bias)
    return F.linear(x, weight, bias)


class Conv1d(_CastAtUse, nn.Conv1d):
    """Convolution over [N, C, T]. With a kernel of one it is a matrix product on channels-innermost memory.

    The released attention weights have shape [out, C, 1]. Read as [out, C] they multiply [N, T, C], which is what a
    channels_last image is in memory: no transposition, and the result is again channels-innermost.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters_as(x)
        if _is_matrix_product(self) and x.dim() == 3 and x.stride(1) == 1:
            return mix_channels(x.transpose(1, 2), weight.squeeze(2), bias).transpose(1, 2)
        return self._conv_forward(x, weight, bias)


class Conv2d(_CastAtUse, nn.Conv2d):
    """Convolution over [N, C, H, W]. A kernel of one on channels_last images is a matrix product, as in Conv1d."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters_as(x)
        if _is_matrix_product(self) and is_channels_last(x):
            return mix_channels(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return _laid_as(x, self._conv_forward(x, weight, bias))


class Conv3d(_CastAtUse, nn.Conv3d):
    """Convolution over [N, C, D, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return _laid_as(x, self._conv_forward(x, *self._parameters_as(x)))


def _laid_as(x: Tensor, y: Tensor) -> Tensor:
    """y, plain if x is: a convolution takes the layout of its weight as well."""
    return y if is_channels_last(x) else y.contiguous()


class Linear(_CastAtUse, nn.Linear):
    """Matrix product over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._parameters_as(x))


class SiLU(nn.SiLU):
    """x * sigmoid(x): torch's own, under the name it had here before torch had one."""


def fits_cpu_norm(x: Tensor, *more: Tensor) -> bool:
    """Whether `cpu.GroupNorm` takes x, with the other tensors as its parameters. Shapes without numbers (meta) stand for a CPU's."""
    if x.device.type not in ("cpu", "meta") or recorded():
        return False
    return x.numel() > 0 and is_channels_last(x) and not transformed(x, *more)


class GroupNorm32(nn.GroupNorm):
    """Group norm in the dtype and memory layout of its input; statistics are accumulated in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if weight.dtype != x.dtype and x.device.type != "cpu":  # the CPU kernel takes float32 parameters as they are
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if fits_cpu_norm(x, weight, bias):
            return cpu.GroupNorm.apply(x, weight, bias, None, None, self.num_groups, self.eps, False)
        channels_were_last = is_channels_last(x)
        # torch's channels_last norm on the CPU loses digits, and crashes (2.13) where weights have a gradient and x has none. For forward
        # mode there is none at all. Inductor writes its own.
        if (x.device.type == "cpu" and not torch.compiler.is_compiling()) or transformed(x, weight, bias):
            x = x.contiguous()
        y = torch.group_norm(x, self.num_groups, weight, bias, self.eps)
        if channels_were_last:
            y = channels_last(y)  # some CUDA kernels answer in NCHW whatever they are given
        return y


def normalization(channels: int) -> GroupNorm32:
    """Group norm with the 32 groups of the released networks.

    Raises ValueError where `channels` is not a multiple of 32.
    """
    if channels < NORM_GROUPS or channels % NORM_GROUPS:
        raise ValueError(
            f"{channels} channels cannot be normalised in {NORM_GROUPS} groups: every level of the network needs a "
            f"multiple of {NORM_GROUPS} channels. Choose num_channels and channel_mult so that their products are."
        )
    return GroupNorm32(NORM_GROUPS, channels)


def _by_dims(dims: int, choices: dict[int, Callable[..., nn.Module]], *args: Any, **kwargs: Any) -> nn.Module:
    if dims not in choices:
        raise ValueError(f"unsupported dimensions: {dims}; choose one of {sorted(choices)}")
    return choices[dims](*args, **kwargs)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` = 1, 2 or 3 space dimensions; the other arguments are torch's."""
    return _by_dims(dims, {1: Conv1d, 2: Conv2d, 3: Conv3d}, *args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling over `dims` = 1, 2 or 3 space dimensions; the other arguments are torch's."""
    return _by_dims(dims, {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}, *args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> Linear:
    """A linear layer; arguments as torch's."""
    return Linear(*args, **kwargs)


def zero_module(module: ModuleT) -> ModuleT:
    """Set every parameter of `module` to zero and return it: a block that ends in zeros starts as the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def scale_module(module: ModuleT, scale: float) -> ModuleT:
    """Multiply every parameter of `module` by `scale` and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


class TimestepBlock(nn.Module):
    """A module whose `forward` takes a time embedding as second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the module to x [N, C, ...] at the time embedding emb [N, E]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A Sequential that hands the time embedding to those of its children that take one."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Cosines, then sines, of time at geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    timesteps: [N], integer or fractional. Returns float32 [N, dim]; an odd `dim` ends in a column of zeros.
    """
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def checkpoint(func: Callable[..., Any], inputs: Iterable[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """`func(*inputs)`; if `flag`, as `recomputed`. `params` is accepted for compatibility and not needed."""
    return recomputed(func, *inputs) if flag else func(*inputs)


def recomputed(func: Callable[..., Any], *inputs: Any) -> Any:
    """`func(*inputs)` without keeping its intermediate values: backward computes them again, up to the last that it needs.

    So an operation that ends `func` and needs only its inputs for backward, as a convolution does, is not done twice.
    Dropout, frozen weights, repeated and double backward, and autocast work as without. Under forward-mode differentiation
    (torch 2.11 cannot) and inside a `torch.func` transform nothing is recomputed. What torch's checkpointing asks for: weights
    and hooks are the same at the backward pass as before, so no backward after `torch.func.functional_call` has given its
    weights back.
    """
    if not torch.is_grad_enabled() or transformed() or forward_ad._current_level >= 0:
        return func(*inputs)
    return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)


def lay_out_convolution(module: nn.Module) -> None:
    """Lay the weight of a convolution out channels_last, which saves a transposition per call; for `Module.apply`."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.weight.data = channels_last(module.weight.data)


def convert_module_to_f16(module: nn.Module) -> None:
    """Store the weights of a convolution in float16 (other modules are left alone); for `Module.apply`."""
    store_convolution(module, torch.float16)


def convert_module_to_f32(module: nn.Module) -> None:
    """Store the weights of a convolution in float32 again; for `Module.apply`."""
    store_convolution(module, torch.float32)


def store_convolution(module: nn.Module, dtype: torch.dtype) -> None:
    """Store weight and bias of `module` in `dtype` if it is a convolution; the Parameter objects stay the same."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.weight.data = module.weight.data.to(dtype)
        if module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)
