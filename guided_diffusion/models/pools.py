"""The output heads of the classifier, from features to logits; one of them is the attention pool of CLIP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .attention import QKVAttention
from .layers import conv_nd, linear, normalization, zero_module

HIDDEN = 2048  # width between the two linear layers of the spatial pools


class AttentionPool2d(nn.Module):
    """Attention pooling of CLIP (Radford et al. 2021): the mean of all positions, as one more token, attends to all of them.

    spacial_dim: height and width of the features. embed_dim: their channels C, a multiple of num_heads_channels.
    output_dim: channels of the result, C if None.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        if embed_dim % num_heads_channels:
            raise ValueError(f"{embed_dim} channels are not a multiple of num_head_channels = {num_heads_channels}.")
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, spacial_dim, spacial_dim]. Returns [N, output_dim]."""
        places = self.positional_embedding.shape[1] - 1
        if x.shape[2] != x.shape[3] or x.shape[2] * x.shape[3] != places:
            side = math.isqrt(places)
            raise ValueError(
                f"attention pooling was built for {side} x {side} features and got {x.shape[2]} x {x.shape[3]}: give "
                "images of the size the network was built for, or choose the pool 'adaptive', 'spatial' or 'spatial_v2'."
            )
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2)
        pooled = self.attention(self.qkv_proj(tokens + self.positional_embedding.to(x.dtype)))
        return self.c_proj(pooled[:, :, :1].contiguous()).squeeze(2)


def make_pool(
    pool: str, channels: int, features: int, out_channels: int, dims: int, side: int, num_head_channels: int
) -> nn.Sequential:
    """The output head of that name; returns [N, out_channels].

    Of the last features, [N, channels, side, side] (`dims` dimensions of space): "adaptive" is group norm, SiLU, the mean over all
    positions and a linear layer, "attention" ends in AttentionPool2d. Of the means over positions of all blocks, [N, features]:
    "spatial" is two linear layers with ReLU, "spatial_v2" the same with group norm and SiLU.
    """
    match pool:
        case "adaptive":
            average: nn.Module = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](1)
            output = zero_module(conv_nd(dims, channels, out_channels, 1))
            return nn.Sequential(normalization(channels), nn.SiLU(), average, output, nn.Flatten())
        case "attention":
            if num_head_channels == -1:
                raise ValueError("the pool 'attention' needs num_head_channels; it is -1.")
            attention_pool = AttentionPool2d(side, channels, num_head_channels, out_channels)
            return nn.Sequential(normalization(channels), nn.SiLU(), attention_pool)
        case "spatial":
            return nn.Sequential(linear(features, HIDDEN), nn.ReLU(), linear(HIDDEN, out_channels))
        case "spatial_v2":
            hidden = (normalization(HIDDEN), nn.SiLU())
            return nn.Sequential(linear(features, HIDDEN), *hidden, linear(HIDDEN, out_channels))
    raise ValueError(f"unknown pool {pool!r}; choose 'adaptive', 'attention', 'spatial' or 'spatial_v2'.")
