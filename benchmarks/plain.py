"""The same networks computed the plain way, to measure ours against.

Plain means: eager, NCHW, group norm through float32 and back, scale and shift as separate operations, attention by two
einsums with its softmax written out in float32, and attention recomputed in backward whatever was asked for. `Plain`
borrows the parameters of one of our networks, so both compute the same function of the same weights:

    net = UNetModel(...)
    plain = Plain(net)
    torch.testing.assert_close(plain(x, t, y), net(x, t, y))
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guided_diffusion.models.layers import GroupNorm32, timestep_embedding
from guided_diffusion.models.pools import AttentionPool2d
from guided_diffusion.models.resizing import Downsample, Upsample
from guided_diffusion.models.unet import AttentionBlock, EncoderUNetModel, QKVAttention, ResBlock, UNetModel


class Plain(nn.Module):
    """`net` (a UNetModel, SuperResModel or EncoderUNetModel), computed plainly with the same parameters."""

    def __init__(self, net: UNetModel | EncoderUNetModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """As the network's own forward."""
        net = self.net
        if low_res is not None:
            x = torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)
        emb = net.time_embed(timestep_embedding(timesteps, net.model_channels))
        if y is not None:
            emb = emb + net.label_emb(y)
        h = x.to(net.dtype).contiguous()
        skips = []
        for block in net.input_blocks:
            h = _sequence(block, h, emb)
            skips.append(h)
        h = _sequence(net.middle_block, h, emb)
        if isinstance(net, UNetModel):
            for block in net.output_blocks:
                h = _sequence(block, torch.cat([h, skips.pop()], dim=1), emb)
        elif net.pool.startswith("spatial"):
            h = torch.cat([part.to(x.dtype).mean(dim=(2, 3)) for part in (*skips, h)], dim=1)
        return _sequence(net.out, h.to(x.dtype), emb)


def _sequence(block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    for layer in block.children():
        if isinstance(layer, ResBlock):
            h = _residual(layer, h, emb)
        elif isinstance(layer, AttentionBlock):
            h = (
                checkpoint(_attention_block, layer, h, use_reentrant=False)
                if torch.is_grad_enabled()
                else (_attention_block(layer, h))
            )
        else:
            h = _layer(layer, h)
    return h


def _layer(layer: nn.Module, h: Tensor) -> Tensor:
    if isinstance(layer, GroupNorm32):
        return F.group_norm(h.float(), layer.num_groups, layer.weight, layer.bias, layer.eps).to(h.dtype)
    if isinstance(layer, nn.Conv1d):
        return F.conv1d(h, layer.weight.to(h.dtype), None if layer.bias is None else layer.bias.to(h.dtype))
    if isinstance(layer, Upsample | Downsample):
        h = F.interpolate(h, scale_factor=2, mode="nearest") if isinstance(layer, Upsample) else h
        return _sequence(layer, h, h) if layer.use_conv or isinstance(layer, Downsample) else h
    if isinstance(layer, AttentionPool2d):
        return _attention_pool(layer, h)
    return layer(h)


def _residual(block: ResBlock, x: Tensor, emb: Tensor) -> Tensor:
    norm, act, conv = block.in_layers
    h = act(_layer(norm, x))
    if block.updown:
        h, x = _layer(block.h_upd, h), _layer(block.x_upd, x)
    h = conv(h)
    emb_out = block.emb_layers(emb).to(h.dtype)[..., None, None]
    norm, *rest = block.out_layers
    if block.use_scale_shift_norm:
        scale, shift = emb_out.chunk(2, dim=1)
        h = _layer(norm, h) * (1 + scale) + shift
    else:
        h = _layer(norm, h + emb_out)
    for layer in rest:
        h = layer(h)
    return block.skip_connection(x) + h


def _attention_block(block: AttentionBlock, x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    qkv = _layer(block.qkv, _layer(block.norm, tokens))
    h = _attention(qkv, block.num_heads, isinstance(block.attention, QKVAttention))
    return x + _layer(block.proj_out, h).reshape(x.shape)


def _attention(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """qkv: [N, 3 * C, T]. Returns [N, C, T]."""
    n, width, places = qkv.shape
    channels = width // (3 * heads)
    if new_order:
        q, k, v = (part.reshape(n * heads, channels, places) for part in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.reshape(n * heads, 3 * channels, places).chunk(3, dim=1)
    scale = 1 / math.sqrt(math.sqrt(channels))  # on both factors: their product stays in the range of float16
    scores = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weights = torch.softmax(scores.float(), dim=-1).to(scores.dtype)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, places)


def _attention_pool(pool: AttentionPool2d, x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1) + pool.positional_embedding.to(x.dtype)
    qkv = _layer(pool.qkv_proj, tokens)
    return _layer(pool.c_proj, _attention(qkv, pool.num_heads, True))[:, :, 0]
