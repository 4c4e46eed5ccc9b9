"""The networks of "Diffusion Models Beat GANs on Image Synthesis": the UNet, its super-resolution form, the classifier.

Parameter names, shapes and order are those of the released checkpoints. Activations are channels_last; weights stay in
the precision they are stored in and are cast where they are used, to the network's compute dtype.

Legend: N batch, C channels, H height, W width, E channels of the time embedding.
This module is also `guided_diffusion.unet`: what it imports is part of what can be imported from there, and blocks look
`checkpoint` up here at each call, so that a replacement is seen.
"""

from __future__ import annotations

import math  # noqa: F401
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np  # noqa: F401
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .attention import (
    AttentionPool2d,
    QKVAttention,
    QKVAttentionLegacy,
    count_flops_attn,  # noqa: F401
)
from .layers import (
    avg_pool_nd,
    channels_last,
    checkpoint,
    conv_nd,
    convert_module_to_f16,  # noqa: F401
    convert_module_to_f32,  # noqa: F401
    linear,
    normalization,
    store_convolution,
    timestep_embedding,
    zero_module,
)


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


class ResBlock(TimestepBlock):
    """Residual block of two convolutions, between which time enters.

    emb_channels: E. use_scale_shift_norm: time scales and shifts the second norm (adaptive group norm); else it is
    added before that norm. up, down: change size inside the block. use_conv: a 3x3 convolution on the skip path where
    the number of channels changes; else 1x1. use_checkpoint: recompute in backward instead of keeping activations.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down

        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        self.h_upd: nn.Module
        self.x_upd: nn.Module
        if self.updown:
            resize = Upsample if up else Downsample
            self.h_upd, self.x_upd = resize(channels, False, dims), resize(channels, False, dims)
        else:
            self.h_upd, self.x_upd = nn.Identity(), nn.Identity()
        emb_out = 2 * self.out_channels if use_scale_shift_norm else self.out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [N, C, ...], emb: [N, E]. Returns [N, out_channels, ...], of twice or half the size for up and down."""
        if self.use_checkpoint:
            return checkpoint(self._forward, (x, emb), self.parameters(), True)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            h = self.in_layers[:-1](x)
            h, x = self.h_upd(h), self.x_upd(x)
            h = self.in_layers[-1](h)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).to(h.dtype)
        emb_out = emb_out.reshape(emb_out.shape + (1,) * (h.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = th.addcmul(shift, self.out_layers[0](h), 1 + scale)
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Residual self-attention between all places of an image.

    num_head_channels: channels per head; -1 takes num_heads instead. use_new_attention_order: how the released
    weights of q, k and v are interleaved (QKVAttention, else QKVAttentionLegacy).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(f"{channels} channels are not a multiple of num_head_channels = {num_head_channels}.")
            num_heads = channels // num_head_channels
        elif channels % num_heads:
            raise ValueError(f"{channels} channels cannot be shared by num_heads = {num_heads}.")
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...]. Returns the same shape."""
        if self.use_checkpoint:
            return checkpoint(self._forward, (x,), self.parameters(), True)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        # [N, C, H, W] -> [N, T, C] is free in channels_last; the layers hear it as [N, C, T] (see models/attention.py)
        tokens = self.norm(x).movedim(1, -1).flatten(1, -2)
        h = self.proj_out(self.attention(self.qkv(tokens.transpose(1, 2))))
        return x + h.transpose(1, 2).reshape(x.shape[0], *x.shape[2:], -1).movedim(-1, 1)


@dataclass(frozen=True)
class _Blocks:
    """What all blocks of one network have in common."""

    emb_channels: int
    dropout: float
    conv_resample: bool
    dims: int
    use_checkpoint: bool
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool

    def residual(self, channels: int, out_channels: int, *, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def attention(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(
            channels, num_heads, self.num_head_channels, self.use_checkpoint, self.use_new_attention_order
        )

    def smaller(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def larger(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)


class _Trunk(nn.Module):
    """Time embedding, the way down and the middle: what the UNet and the classifier share."""

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float,
        channel_mult: Sequence[float],
        conv_resample: bool,
        dims: int,
        num_classes: int | None,
        use_checkpoint: bool,
        use_fp16: bool,
        num_heads: int,
        num_head_channels: int,
        num_heads_upsample: int,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        use_new_attention_order: bool,
    ) -> None:
        super().__init__()
        if not channel_mult:
            raise ValueError("channel_mult is empty: give one multiplier per level, for example (1, 2, 4, 8).")
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.dtype = th.float16 if use_fp16 else th.float32
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample

        time_embed_dim = model_channels * 4
        self._blocks = _Blocks(
            time_embed_dim,
            dropout,
            conv_resample,
            dims,
            use_checkpoint,
            num_head_channels,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
        )
        self.time_embed = nn.Sequential(
            linear(model_channels, time_embed_dim), nn.SiLU(), linear(time_embed_dim, time_embed_dim)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time_embed_dim)
        self._build_way_down()

    def _build_way_down(self) -> None:
        ch = int(self.channel_mult[0] * self.model_channels)
        first = conv_nd(self.dims, self.in_channels, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        self._skip_channels = [ch]  # of each input block's output
        for level, mult in enumerate(self.channel_mult):
            downsampling = 2**level
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self._blocks.residual(ch, int(mult * self.model_channels))]
                ch = int(mult * self.model_channels)
                if downsampling in self.attention_resolutions:
                    layers.append(self._blocks.attention(ch, self.num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self._skip_channels.append(ch)
            if level != len(self.channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(self._blocks.smaller(ch)))
                self._skip_channels.append(ch)
        self.middle_block = TimestepEmbedSequential(
            self._blocks.residual(ch, ch), self._blocks.attention(ch, self.num_heads), self._blocks.residual(ch, ch)
        )
        self._bottom_channels = ch

    @property
    def _torso(self) -> list[nn.Module]:
        """The parts that compute in `dtype`; time embedding and output stay in full precision."""
        return [self.input_blocks, self.middle_block]

    def set_compute_dtype(self, dtype: th.dtype, *, store: bool = False) -> None:
        """Compute the torso in `dtype` from now on: float32, bfloat16 or float16.

        Weights are cast where they are used; gradients arrive in the dtype of the stored weights. `store` also keeps
        the torso's convolutions in `dtype`: half the memory and no cast per call, for networks that are not trained.
        """
        if dtype not in (th.float32, th.bfloat16, th.float16):
            raise ValueError(f"cannot compute in {dtype}; choose torch.float32, torch.bfloat16 or torch.float16.")
        self.dtype = dtype
        if store:
            for part in self._torso:
                part.apply(lambda module: store_convolution(module, dtype))

    def convert_to_fp16(self) -> None:
        """Compute in float16 and store the torso's convolutions in it."""
        self.set_compute_dtype(th.float16, store=True)

    def convert_to_fp32(self) -> None:
        """Compute in float32 and store the torso's convolutions in it."""
        self.set_compute_dtype(th.float32, store=True)

    def _embed(self, timesteps: Tensor) -> Tensor:
        dtype = self.time_embed[0].weight.dtype
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))

    def _enter(self, x: Tensor) -> Tensor:
        """x in the torso's dtype and memory layout, refused if a level would have an odd size."""
        divisor = 2 ** (len(self.channel_mult) - 1)
        sizes = tuple(x.shape[-min(self.dims, 2) :])
        if any(size % divisor for size in sizes):
            raise ValueError(
                f"images of {' x '.join(map(str, sizes))} cannot be halved {len(self.channel_mult) - 1} times: "
                f"height and width must be multiples of {divisor}. Resize or pad the images, or use fewer levels."
            )
        # float32 stands for "as stored": a network moved to float64 computes in float64
        dtype = self.time_embed[0].weight.dtype if self.dtype == th.float32 else self.dtype
        return channels_last(x.to(dtype))


class UNetModel(_Trunk):
    """The UNet with attention and time embedding.

    image_size: not used by the network, kept for its users. in_channels, out_channels: of images (any number).
    model_channels: channels at multiplier 1. num_res_blocks: per level. attention_resolutions: downsampling factors
    (1, 2, 4, ...) at which attention is applied. channel_mult: multipliers per level, fractions allowed.
    conv_resample: learned resampling where resblock_updown is off. dims: 1, 2 or 3 space dimensions.
    num_classes: any number makes the network class-conditional. use_checkpoint: less memory, more time in training.
    use_fp16: compute the torso in float16. num_heads, num_head_channels (-1: use num_heads), num_heads_upsample
    (-1: as num_heads): attention heads. use_scale_shift_norm: adaptive group norm. resblock_updown: residual
    blocks that resample. use_new_attention_order: interleaving of q, k and v in the weights.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            dims,
            num_classes,
            use_checkpoint,
            use_fp16,
            num_heads,
            num_head_channels,
            num_heads_upsample,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
        )
        ch = self._build_way_up()
        self.out = nn.Sequential(
            normalization(ch), nn.SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1))
        )

    def _build_way_up(self) -> int:
        self.output_blocks = nn.ModuleList([])
        ch, skip_channels = self._bottom_channels, list(self._skip_channels)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                out_ch = int(self.model_channels * mult)
                layers: list[nn.Module] = [self._blocks.residual(ch + skip_channels.pop(), out_ch)]
                ch = out_ch
                if 2**level in self.attention_resolutions:
                    layers.append(self._blocks.attention(ch, self.num_heads_upsample))
                if level and i == self.num_res_blocks:
                    layers.append(self._blocks.larger(ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        return ch

    @property
    def _torso(self) -> list[nn.Module]:
        return [*super()._torso, self.output_blocks]

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x: images [N, in_channels, H, W]; timesteps: [N], integer or fractional; y: labels [N] if class-conditional.

        Returns [N, out_channels, H, W] in the dtype of x. H and W are multiples of 2 ** (levels - 1).
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError(
                "labels y were given to a network that is not class-conditional."
                if y is not None
                else f"this network is conditioned on {self.num_classes} classes: give labels y."
            )
        h = self._enter(x)
        emb = self._embed(timesteps)
        if y is not None:
            if y.shape != (x.shape[0],):
                raise ValueError(f"labels y have shape {tuple(y.shape)}; one per image is needed: ({x.shape[0]},).")
            emb = emb + self.label_emb(y)
        skips: list[Tensor] = []
        for module in self.input_blocks:
            h = module(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(th.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))


class SuperResModel(UNetModel):
    """A UNet that also sees a smaller image, enlarged bilinearly and laid beside its input. Arguments as UNetModel's."""

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """x: [N, in_channels, H, W]; low_res: [N, in_channels, any size]; the rest as UNetModel.forward."""
        if low_res is None:
            raise ValueError("super-resolution needs the small images: give low_res.")
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(th.cat([x, enlarged.to(x.dtype)], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_Trunk):
    """The way down of the UNet with a pooled output: the noisy classifier.

    pool: "adaptive" (mean of the last features), "attention" (one attending place), "spatial" and "spatial_v2" (means
    of every block's features, through two linear layers). out_channels: number of outputs. The rest as UNetModel's.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            dims,
            None,
            use_checkpoint,
            use_fp16,
            num_heads,
            num_head_channels,
            num_heads_upsample,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
        )
        self.pool = pool
        pools: dict[str, Callable[[], nn.Module]] = {
            "adaptive": self._adaptive_pool,
            "attention": self._attention_pool,
            "spatial": self._spatial_pool,
            "spatial_v2": self._spatial_v2_pool,
        }
        if pool not in pools:
            raise ValueError(f"unknown pool {pool!r}; choose one of {', '.join(pools)}.")
        self.out = pools[pool]()

    def _adaptive_pool(self) -> nn.Module:
        ch = self._bottom_channels
        return nn.Sequential(
            normalization(ch),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d((1, 1)),
            zero_module(conv_nd(self.dims, ch, self.out_channels, 1)),
            nn.Flatten(),
        )

    def _attention_pool(self) -> nn.Module:
        if self.num_head_channels == -1:
            raise ValueError("the pool 'attention' needs num_head_channels; it is -1.")
        ch, side = self._bottom_channels, self.image_size // 2 ** (len(self.channel_mult) - 1)
        return nn.Sequential(
            normalization(ch), nn.SiLU(), AttentionPool2d(side, ch, self.num_head_channels, self.out_channels)
        )

    def _spatial_pool(self) -> nn.Module:
        features = sum(self._skip_channels) + self._bottom_channels
        return nn.Sequential(linear(features, 2048), nn.ReLU(), linear(2048, self.out_channels))

    def _spatial_v2_pool(self) -> nn.Module:
        features = sum(self._skip_channels) + self._bottom_channels
        return nn.Sequential(linear(features, 2048), normalization(2048), nn.SiLU(), linear(2048, self.out_channels))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: images [N, in_channels, H, W]; timesteps: [N]. Returns [N, out_channels] in the dtype of x."""
        h = self._enter(x)
        emb = self._embed(timesteps)
        means: list[Tensor] = []
        for module in [*self.input_blocks, self.middle_block]:
            h = module(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.mean(dim=(2, 3), dtype=x.dtype))
        return self.out(th.cat(means, dim=-1) if means else h.to(x.dtype))
