"""Building blocks of all networks: layers that cast their weights at use, group norm, time embedding, activation checkpointing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from .casts import WeightCopies
from .kernels import norm as norm_kernels
from .kernels.layout import CHANNELS_LAST, channels_last, is_channels_last, may_be_transformed, plain_layout, recorded

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NORM_GROUPS = 32  # of all released networks; the number is not stored with the weights, so it cannot change


class _CastAtUse:
    """Mixed in before a torch layer: parameters stay in full precision and are cast to the input's dtype when used."""

    weight: Any  # parameters; torch's own layers do not agree on how to declare them
    bias: Any
    copies: WeightCopies | None = None  # see Network.weights_cast_once

    def _parameters_as(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = self.weight
        if weight.dtype != x.dtype and self.copies is not None:
            found = self.copies.of(self, x.dtype)
            if found is not None:
                return found
        if weight.requires_grad and torch.is_grad_enabled() and weight.is_contiguous():
            weight = plain_layout(weight)  # makes its gradient contiguous, without a copy of the weight
        if weight.dtype != x.dtype:
            # The cast copies anyway; convolutions of channels_last images want a channels_last weight.
            weight = weight.to(x.dtype, memory_format=CHANNELS_LAST.get(weight.dim(), torch.preserve_format))
        return weight, None if self.bias is None else self.bias.to(x.dtype)


def _is_matrix_product(conv: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether the convolution is 1x1: it mixes the channels of each pixel alone."""
    ones, zeros = (1,) * len(conv.kernel_size), (0,) * len(conv.kernel_size)
    return conv.kernel_size == ones and conv.stride == ones and conv.padding == zeros and conv.groups == 1


class Conv1d(_CastAtUse, nn.Conv1d):
    """Convolution over [N, C, T]. With a kernel of one it is a matrix product on channels-innermost memory.

    The released attention weights have shape [out, C, 1]. Read as [out, C] they multiply [N, T, C], which is what a
    channels_last image is in memory: no transposition, and the result is again channels-innermost.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters_as(x)
        if _is_matrix_product(self) and x.dim() == 3 and x.stride(1) == 1:
            return F.linear(x.transpose(1, 2), weight.squeeze(2), bias).transpose(1, 2)
        return self._conv_forward(x, weight, bias)


class Conv2d(_CastAtUse, nn.Conv2d):
    """Convolution over [N, C, H, W]. A kernel of one on channels_last images is a matrix product, as in Conv1d."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters_as(x)
        if _is_matrix_product(self) and is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return _in_layout_of(x, self._conv_forward(x, weight, bias))

    def without_bias(self, x: Tensor) -> Tensor:
        """The result without `bias`, which a later operation is to add."""
        return _in_layout_of(x, self._conv_forward(x, self._parameters_as(x)[0], None))


class Conv3d(_CastAtUse, nn.Conv3d):
    """Convolution over [N, C, D, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return _in_layout_of(x, self._conv_forward(x, *self._parameters_as(x)))


def _in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """y, contiguous unless x is channels_last. torch's convolution answers in channels_last if only its weight is."""
    return y if is_channels_last(x) else y.contiguous()


class Linear(_CastAtUse, nn.Linear):
    """Matrix product over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._parameters_as(x))


class GroupNorm32(nn.GroupNorm):
    """Group norm in the dtype and memory layout of its input; statistics are accumulated in float32."""

    fused: bool = True  # see Network.set_fused_norm

    def forward(self, x: Tensor) -> Tensor:
        return norm_kernels.group_norm(x, self)


def norm_conv(
    layers: nn.Sequential,
    x: Tensor,
    *,
    scale_shift: Sequence[Tensor] = (),
    offset: Tensor | None = None,
    resize: nn.Module | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`layers(x + offset)`, where `layers` are norm, SiLU, perhaps dropout, and a convolution; and its bias if that is still to be added.

    x: [N, C, ...]. scale_shift: both [N, C]; silu(norm * (1 + scale) + shift) instead of silu(norm). offset: [C] or [N, C], such as
    the bias that an earlier call returned. resize: a layer before the convolution. recompute: backward computes again what lies
    between x and the convolution.

    Norm, scale, shift and SiLU are one fused operation, unless the user has replaced those layers or registered a hook on them,
    which must then run. On a GPU the bias is left to the next operation, see kernels/norm.py.
    """
    # Not `children()` and indices, which are slow: with few images a GPU waits for the host.
    parts: list[Any] = [*layers._modules.values()]
    fused = type(layers) is nn.Sequential and [*map(type, parts[:2])] == [GroupNorm32, nn.SiLU] and len(parts) > 2
    if recorded() or not fused or not parts[0].fused or hooked(layers, *parts[:2]):

        def one_by_one(x: Tensor, *scale_shift: Tensor) -> Tensor:
            if resize is not None:
                return layers[-1](resize(layers[:-1](x)))
            y: Tensor = layers[1:](norm_kernels.modulated(layers[0](x), *scale_shift)) if scale_shift else layers(x)
            return y

        x = norm_kernels.shifted(x, offset)
        return in_turn([one_by_one], x, *scale_shift, recompute=recompute), None

    norm, _, *between, conv = parts
    if resize is not None:
        between.append(resize)
    keeps_inputs = recompute and all(map(_repeats, between))
    keeps_inputs = keeps_inputs and norm_kernels.kernels_for(x, norm.weight, norm.bias, *scale_shift) is not None
    apart = type(conv) is Conv2d and conv.bias is not None and not hooked(conv) and norm_kernels.takes_bias(x)

    def normalise(x: Tensor, *scale_shift: Tensor) -> Tensor:
        return norm_kernels.norm_silu(x, norm, scale_shift, offset)

    last, bias = (conv.without_bias, conv.bias) if apart else (conv, None)
    h = in_turn([normalise, *between, last], x, *scale_shift, recompute=recompute, keeps_inputs=keeps_inputs)
    return h, bias


def in_turn(
    steps: Sequence[Callable[..., Tensor]], *inputs: Tensor, recompute: bool, keeps_inputs: bool = False
) -> Tensor:
    """steps[-1](... steps[1](steps[0](*inputs))), where steps[0] is a norm. recompute: results in between are not kept for
    backward, but computed again there.

    keeps_inputs: the norm keeps nothing for backward but its inputs, and every step is a function of its input. Then the rest need
    not run again, nor within a context such as that of `recomputed`, which costs the host more than small images cost a GPU. Where
    others have hooks on saved tensors, such as an activation checkpoint around all this, `recomputed` respects those.
    """
    if not recompute:
        return _run(steps, *inputs)
    # torch 2.7 cannot tell
    others = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: "perhaps")(True)
    if not keeps_inputs or others or not torch.is_grad_enabled() or may_be_transformed():
        return recomputed(partial(_run, steps), *inputs)
    y = steps[0](*inputs)
    compute = norm_kernels.again(y) or partial(steps[0], *inputs)
    storage = y.untyped_storage()._cdata  # of the input of the step that runs

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        return compute, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        compute_again, *view = packed
        with torch.no_grad():
            return compute_again().as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        for step in steps[1:]:
            y, compute = step(y), partial(_after, step, compute)
            storage = y.untyped_storage()._cdata
    return y


def _run(steps: Sequence[Callable[..., Tensor]], *inputs: Tensor) -> Tensor:
    y = steps[0](*inputs)
    for step in steps[1:]:
        y = step(y)
    return y


def _after(step: Callable[[Tensor], Tensor], compute: Callable[[], Tensor]) -> Tensor:
    return step(compute())


def _repeats(layer: nn.Module) -> bool:
    """Whether the layer gives the same again for the same input, which those of the user may not."""
    if type(layer) is nn.Dropout:
        return not (layer.training and layer.p > 0)
    return type(layer) in (nn.Identity, Upsample, Downsample)


def takes_any_dtype(layers: nn.Module) -> bool:
    """Whether `layers` compute in the dtype of their input, which code that the user has put in their place may not."""
    ours = (Conv1d, Conv2d, Conv3d, GroupNorm32, nn.SiLU)
    return type(layers) is nn.Sequential and not hooked(*layers) and all(type(layer) in ours for layer in layers)


def hooked(*modules: nn.Module) -> bool:
    """Whether any of the modules has a hook, or a `forward` that replaces that of its class."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        if "forward" in m.__dict__:
            return True
    return False


def normalization(channels: int) -> GroupNorm32:
    """Group norm with the 32 groups of the released networks.

    Raises ValueError where `channels` is not a multiple of 32.
    """
    if channels < NORM_GROUPS or channels % NORM_GROUPS:
        raise ValueError(
            f"{channels} channels cannot be normalised in {NORM_GROUPS} groups: every level of the network needs a "
            f"multiple of {NORM_GROUPS} channels. Choose num_channels and channel_mult so that their products are multiples."
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


def zero_module(module: ModuleT) -> ModuleT:
    """Set every parameter of `module` to zero and return it: a block that ends in zeros starts as the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


class TimestepBlock(nn.Module):
    """A module whose `forward` takes a time embedding as second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the module to x [N, C, ...] at the time embedding emb [N, E]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A Sequential that passes the time embedding to each child that is a TimestepBlock."""

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
    """`func(*inputs)` with activation checkpointing: backward recomputes its intermediate tensors, up to the last that it needs.

    So if `func` ends in an operation whose backward needs only its inputs, such as a convolution, that one does not run twice.
    Dropout, frozen weights, repeated and double backward, and autocast give the same results as without. Under forward-mode
    differentiation (which torch 2.11 cannot checkpoint) and inside a `torch.func` transform nothing is recomputed. Weights and
    hooks must be the same in backward as in forward; those that `torch.func.functional_call` sets are gone by then: no backward.
    """
    if not torch.is_grad_enabled() or may_be_transformed():
        return func(*inputs)
    return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)


def recomputes_norms(block: Any) -> bool:
    """Whether a block computes its norms again in backward, as `Network.set_recompute_norms` says.

    A block that is recomputed as a whole ignores that, and so does a compiled graph: its compiler chooses what to keep.
    """
    return block.recompute_norms and not block.use_checkpoint and not torch.compiler.is_compiling()


def lay_out_convolution(module: nn.Module) -> None:
    """Store the weight of a convolution channels_last, which saves a transposition per call; for `Module.apply`."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.weight.data = channels_last(module.weight.data)


def store_convolution(module: nn.Module, dtype: torch.dtype) -> None:
    """Store weight and bias of `module` in `dtype` if it is a convolution; the Parameter objects stay the same."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.weight.data = module.weight.data.to(dtype)
        if module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741  the name of 2021
    """Store a convolution's weights in float16; other modules stay. For `module.apply`."""
    store_convolution(l, torch.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Undo `convert_module_to_f16`."""
    store_convolution(l, torch.float32)
