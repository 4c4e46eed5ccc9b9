"""The networks of "Diffusion Models Beat GANs on Image Synthesis": the UNet, its super-resolution form, the classifier.

The figure, from left to right:

    x --> input_blocks --> middle_block --> output_blocks --> out
            |   |   |                          ^   ^   ^
            |   |   +--------------------------+   |   |
            |   +----------------------------------+   |       skip connections
            +------------------------------------------+
    time (and class) --> time_embed --> emb, which every residual block receives

The way down (encoder) has one level per entry of channel_mult: num_res_blocks residual blocks, each followed by self-attention at
the levels in attention_resolutions, then a downsampling, except after the last level. The middle block is residual, attention,
residual. The way up (decoder) mirrors the way down; the input of each of its blocks is the previous block's output concatenated
with the skip connection. The classifier is the way down and the middle block, followed by a pooling head.

Parameter names, shapes and order are those of the released checkpoints. Outputs are contiguous. network.py chooses the precision
and memory layout.

Legend: N batch, C channels, H height, W width, E channels of the time embedding.
This module is also `guided_diffusion.unet`. Blocks look up `checkpoint` in it at each call, so that users can replace it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .attention import QKVAttention, QKVAttentionLegacy
from .kernels.layout import plain_layout
from .kernels.norm import fuses, residual_sum, shifted
from .layers import (
    Downsample,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
    checkpoint,
    conv_nd,
    in_turn,
    linear,
    norm_conv,
    normalization,
    recomputes_norms,
    takes_any_dtype,
    zero_module,
)
from .network import Network, warn_of_missing_levels
from .pools import make_pool


class ResBlock(TimestepBlock):
    """Residual block of two convolutions with the time embedding between them: x + conv(silu(norm(conv(silu(norm(x)))))).

    use_scale_shift_norm: adaptive group norm. A linear layer turns the time embedding into one scale and one shift per channel,
    and norm(h) * (1 + scale) + shift replaces the second norm (equation 3 of the paper). Without it, the linear layer's output is
    added before that norm.
    up, down: resize the feature map on both branches, before the first convolution.
    emb_channels: E. use_conv: a 3x3 convolution on the skip path where the number of channels changes; else 1x1.
    use_checkpoint: recompute the block in backward instead of keeping its activations.
    """

    recompute_norms: bool = False  # see Network.set_recompute_norms

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

        out_channels = self.out_channels
        first = conv_nd(dims, channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), first)
        make_resize = partial(Upsample if up else Downsample, channels, False, dims) if self.updown else nn.Identity
        self.h_upd: nn.Module = make_resize()
        self.x_upd: nn.Module = make_resize()
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, emb_out))
        second = zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(normalization(out_channels), nn.SiLU(), nn.Dropout(p=dropout), second)
        self.skip_connection: nn.Module = nn.Identity()
        if out_channels != channels:
            size = 3 if use_conv else 1
            self.skip_connection = conv_nd(dims, channels, out_channels, size, padding=size // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [N, C, ...], emb: [N, E]. Returns [N, out_channels, ...], of twice or half the size for up and down."""
        if self.use_checkpoint:
            return checkpoint(self._forward, (x, emb), self.parameters(), True)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        again = recomputes_norms(self)
        h, bias = norm_conv(self.in_layers, x, resize=self.h_upd if self.updown else None, recompute=again)
        emb_out = self.emb_layers(emb).to(h.dtype)
        if self.use_scale_shift_norm:
            scale_shift = emb_out.chunk(2, dim=1)
            h, bias = norm_conv(self.out_layers, h, offset=bias, scale_shift=scale_shift, recompute=again)
        else:
            h, bias = norm_conv(self.out_layers, h, offset=emb_out if bias is None else emb_out + bias, recompute=again)
        return residual_sum(self.skip_connection(self.x_upd(x)), h, bias)


class AttentionBlock(nn.Module):
    """Residual self-attention between all pixels of a feature map: x + proj_out(attention(qkv(norm(x)))).

    num_head_channels: channels per head; -1 = use num_heads instead. use_new_attention_order: order of q, k and v among the
    channels of the qkv weights: that of QKVAttention if True, else of QKVAttentionLegacy.
    """

    recompute_norms: bool = False  # see Network.set_recompute_norms

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
        again = recomputes_norms(self)
        qkv = in_turn((self.norm, self._qkv), x, recompute=again, keeps_inputs=again and fuses(x, self.norm))
        return x + self.proj_out(self.attention(qkv)).reshape(x.shape)

    def _qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values of every pixel: [N, 3 * C, T]."""
        return self.qkv(x.flatten(2))  # flatten gives a view in either layout (see models/attention.py)


class _Trunk(Network):
    """Time embedding, the way down and the middle: what the UNet and the classifier share."""

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
        super().__init__()
        if not channel_mult:
            raise ValueError("channel_mult is empty: give one multiplier per level, for example (1, 2, 4, 8).")
        warn_of_missing_levels(image_size, attention_resolutions, len(channel_mult))
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.num_levels = len(channel_mult)
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.dtype = th.float16 if use_fp16 else th.float32
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.resblock_updown = resblock_updown
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample

        time_embed_dim = model_channels * 4
        self._residual = partial(
            ResBlock,
            emb_channels=time_embed_dim,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            dims=dims,
            use_checkpoint=use_checkpoint,
        )
        self._attention = partial(
            AttentionBlock,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )
        self.time_embed = nn.Sequential(
            linear(model_channels, time_embed_dim), nn.SiLU(), linear(time_embed_dim, time_embed_dim)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time_embed_dim)
        self._build_way_down()
        self._build_head()

    def _build_head(self) -> None:
        """Add the layers that follow the middle block."""

    def _build_way_down(self) -> None:
        ch = int(self.channel_mult[0] * self.model_channels)
        first = conv_nd(self.dims, self.in_channels, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        self._skip_channels = [ch]  # output channels of each input block
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self._residual(ch, out_channels=int(mult * self.model_channels))]
                ch = int(mult * self.model_channels)
                if 2**level in self.attention_resolutions:
                    layers.append(self._attention(ch, self.num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self._skip_channels.append(ch)
            if level != len(self.channel_mult) - 1:  # no downsampling after the last level
                self.input_blocks.append(TimestepEmbedSequential(self._resized(ch, down=True)))
                self._skip_channels.append(ch)
        self.middle_block = TimestepEmbedSequential(
            self._residual(ch), self._attention(ch, self.num_heads), self._residual(ch)
        )
        self._bottom_channels = ch

    def _resized(self, channels: int, *, up: bool = False, down: bool = False) -> nn.Module:
        """A block that doubles (up) or halves (down) the resolution."""
        if self.resblock_updown:
            return self._residual(channels, up=up, down=down)
        return (Upsample if up else Downsample)(channels, self.conv_resample, self.dims)


class UNetModel(_Trunk):
    """The UNet with attention and time embedding.

    image_size: used in messages only; the network takes any size. in_channels, out_channels: of images (any number).
    model_channels: channels at multiplier 1. num_res_blocks: per level. attention_resolutions: downsampling factors
    (1, 2, 4, ...) at which attention is applied. channel_mult: multipliers per level, fractions allowed.
    conv_resample: learned resampling where resblock_updown is off. dims: 1, 2 or 3 space dimensions.
    num_classes: any number makes the network class-conditional. use_checkpoint: less memory, more time in training.
    use_fp16: compute the torso in float16. num_heads, num_head_channels (-1: use num_heads), num_heads_upsample
    (-1: as num_heads): attention heads. use_scale_shift_norm: adaptive group norm. resblock_updown: residual
    blocks that resample. use_new_attention_order: interleaving of q, k and v in the weights.
    """

    def _build_head(self) -> None:
        self.output_blocks = nn.ModuleList([])
        ch, skip_channels = self._bottom_channels, list(self._skip_channels)
        # One block more per level than num_res_blocks: its skip comes from the first convolution or from a downsampling.
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                out_ch = int(self.model_channels * mult)
                layers: list[nn.Module] = [self._residual(ch + skip_channels.pop(), out_channels=out_ch)]
                ch = out_ch
                if 2**level in self.attention_resolutions:
                    layers.append(self._attention(ch, self.num_heads_upsample))
                if level and i == self.num_res_blocks:
                    layers.append(self._resized(ch, up=True))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        last = zero_module(conv_nd(self.dims, ch, self.out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(ch), nn.SiLU(), last)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x: images [N, in_channels, H, W]; timesteps: [N], integer or fractional; y: labels [N] if class-conditional.

        Returns [N, out_channels, H, W] in the dtype of x. H and W are multiples of 2 ** (levels - 1).
        """
        h = self.enter(x)
        emb = self.embed(timesteps, x.shape[0], y)
        skips: list[Tensor] = []
        for module in self.input_blocks:
            h = module(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(th.cat([h, skips.pop()], dim=1), emb)
        out, bias = norm_conv(self.out, h if takes_any_dtype(self.out) else h.to(x.dtype))
        return shifted(out, bias).to(x.dtype).contiguous()


class SuperResModel(UNetModel):
    """A UNet conditioned on a smaller image, enlarged bilinearly and concatenated to its input. Arguments as UNetModel's."""

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """x: [N, in_channels, H, W]; low_res: [N, in_channels, any size]; the rest as UNetModel.forward."""
        if low_res is None:
            raise ValueError("super-resolution needs the small images: give low_res.")
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(th.cat([plain_layout(x), enlarged.to(x.dtype)], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_Trunk):
    """The way down of the UNet with a pooled output: the noisy classifier.

    pool: "adaptive" (mean over the last feature map), "attention" (attention pooling), "spatial" and "spatial_v2" (means of every
    block's features, through two linear layers). out_channels: number of outputs. The rest as UNetModel's.
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
        num_classes = None  # classes are its outputs, not its inputs
        super().__init__(
            image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout,
            channel_mult, conv_resample, dims, num_classes, use_checkpoint, use_fp16, num_heads, num_head_channels,
            num_heads_upsample, use_scale_shift_norm, resblock_updown, use_new_attention_order,
        )  # fmt: skip
        self.pool = pool
        features = sum(self._skip_channels) + self._bottom_channels
        side = image_size // 2 ** (self.num_levels - 1)
        self.out = make_pool(pool, self._bottom_channels, features, out_channels, dims, side, num_head_channels)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: images [N, in_channels, H, W]; timesteps: [N]. Returns [N, out_channels] in the dtype of x."""
        h = self.enter(x)
        emb = self.embed(timesteps, x.shape[0])
        means: list[Tensor] = []
        for module in [*self.input_blocks, self.middle_block]:
            h = module(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.mean(dim=tuple(range(2, h.dim())), dtype=x.dtype))
        return self.out(th.cat(means, dim=-1) if means else h.to(x.dtype)).contiguous()
