"""The same weights under other names: our generator's state dict <-> that of diffusers' `UNet2DModel`.

Both networks compute the same function where `UNet2DModel` can express ours; `arguments_for_unet2d` says where it cannot.
Only names and the packing of the attention matrices differ, so a conversion and its inverse lose no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def arguments_for_unet2d(
    *,
    image_size: int,
    in_channels: int,
    out_channels: int,
    model_channels: int,
    multipliers: Sequence[float],
    depth: int,
    attention_ds: Sequence[int],
    attention_head_channels: int | None,
    scale_shift: bool,
    resblock_updown: bool,
    num_classes: int | None,
    dropout: float = 0.0,
) -> dict[str, object]:
    """Keyword arguments of `diffusers.UNet2DModel` for this architecture.

    `attention_head_channels` is the width of one head, the same in every attention block, or None where heads differ in width.
    Raises ValueError with the reason where `UNet2DModel` cannot express the network.
    """
    if multipliers[0] != 1:
        raise ValueError(
            f"UNet2DModel takes its time embedding's width from the first level; it cannot express the first multiplier {multipliers[0]}"
        )
    if attention_head_channels is None:
        raise ValueError(
            "UNet2DModel fixes the channels per head for the whole network; with a fixed number of heads "
            "(--num_heads) they differ between levels, so it cannot express this network"
        )
    attention = [2**level in attention_ds for level in range(len(multipliers))]
    change = "resnet" if resblock_updown else "conv"
    plain_down, plain_up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    arguments: dict[str, object] = {
        "sample_size": image_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": [int(model_channels * m) for m in multipliers],
        "layers_per_block": depth,
        "down_block_types": ["AttnDownBlock2D" if a else plain_down for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else plain_up for a in reversed(attention)],
        "downsample_type": change,
        "upsample_type": change,
        "attention_head_dim": attention_head_channels,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "flip_sin_to_cos": True,  # our embedding lists cosines first
        "freq_shift": 0,
        "dropout": dropout,
        "num_class_embeds": num_classes,
    }
    return arguments


def _blocks(
    levels: int, depth: int, attention_ds: Sequence[int], resblock_updown: bool
) -> Iterator[tuple[str, str, str]]:
    """Pairs of block prefixes, ours and theirs, each with what the block is: "resnet", "attention" or "conv"."""
    block = 1
    for level in range(levels):
        for layer in range(depth):
            yield f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}", "resnet"
            if 2**level in attention_ds:
                yield f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}", "attention"
            block += 1
        if level != levels - 1:
            if resblock_updown:
                yield f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0", "resnet"
            else:
                yield f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv", "conv"
            block += 1
    yield "middle_block.0", "mid_block.resnets.0", "resnet"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "resnet"
    block = 0
    for step, level in enumerate(reversed(range(levels))):
        for layer in range(depth + 1):
            yield f"output_blocks.{block}.0", f"up_blocks.{step}.resnets.{layer}", "resnet"
            attends = 2**level in attention_ds
            if attends:
                yield f"output_blocks.{block}.1", f"up_blocks.{step}.attentions.{layer}", "attention"
            if level and layer == depth:
                place = 1 + attends
                if resblock_updown:
                    yield f"output_blocks.{block}.{place}", f"up_blocks.{step}.upsamplers.0", "resnet"
                else:
                    yield f"output_blocks.{block}.{place}.conv", f"up_blocks.{step}.upsamplers.0.conv", "conv"
            block += 1


def _name_pairs(
    levels: int, depth: int, attention_ds: Sequence[int], resblock_updown: bool
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our module name -> their module name, or three of them for a qkv product."""
    for ours, theirs in _ENDS.items():
        yield ours, (theirs,)
    yield "label_emb", ("class_embedding",)
    for ours, theirs, kind in _blocks(levels, depth, attention_ds, resblock_updown):
        if kind == "conv":
            yield ours, (theirs,)
        elif kind == "resnet":
            for a, b in _RESNET.items():
                yield f"{ours}.{a}", (f"{theirs}.{b}",)
        else:
            yield f"{ours}.norm", (f"{theirs}.group_norm",)
            yield f"{ours}.qkv", (f"{theirs}.to_q", f"{theirs}.to_k", f"{theirs}.to_v")
            yield f"{ours}.proj_out", (f"{theirs}.to_out.0",)


def _split_qkv(packed: Tensor, heads: int, new_order: bool) -> tuple[Tensor, ...]:
    """`[3C, …]` -> three `[C, …]`. New order: all queries, keys, values; legacy: query, key, value of each head in turn."""
    if new_order:
        return packed.chunk(3)
    per_head = packed.reshape(heads, 3, -1, *packed.shape[1:])
    return tuple(per_head[:, k].reshape(-1, *packed.shape[1:]) for k in range(3))


def _join_qkv(parts: Sequence[Tensor], heads: int, new_order: bool) -> Tensor:
    if new_order:
        return torch.cat(list(parts))
    split = [part.reshape(heads, 1, -1, *part.shape[1:]) for part in parts]
    return torch.cat(split, dim=1).reshape(-1, *parts[0].shape[1:])


def to_diffusers(
    state: Mapping[str, Tensor],
    *,
    levels: int,
    depth: int,
    attention_ds: Sequence[int],
    resblock_updown: bool,
    head_channels: int,
    new_order: bool,
) -> dict[str, Tensor]:
    """Our state dict under diffusers' names. Raises ValueError when a tensor is left over."""
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    for ours, theirs in _name_pairs(levels, depth, attention_ds, resblock_updown):
        for end in ("weight", "bias"):
            value = state.get(f"{ours}.{end}")
            if value is None:
                continue
            used.add(f"{ours}.{end}")
            if ours.endswith((".qkv", ".proj_out")) and end == "weight":
                value = value.squeeze(-1)
            parts = (value,) if len(theirs) == 1 else _split_qkv(value, value.shape[0] // 3 // head_channels, new_order)
            out.update({f"{name}.{end}": part.contiguous() for name, part in zip(theirs, parts)})
    left = [key for key in state if key not in used]
    if left:
        raise ValueError(f"{len(left)} tensors have no place in UNet2DModel: {', '.join(left[:4])}")
    return out


def from_diffusers(
    state: Mapping[str, Tensor],
    *,
    levels: int,
    depth: int,
    attention_ds: Sequence[int],
    resblock_updown: bool,
    head_channels: int,
    new_order: bool,
) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`: a `UNet2DModel` state dict under our names and packing."""
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    for ours, theirs in _name_pairs(levels, depth, attention_ds, resblock_updown):
        for end in ("weight", "bias"):
            parts = [state[f"{name}.{end}"] for name in theirs if f"{name}.{end}" in state]
            if not parts:
                continue
            used.update(f"{name}.{end}" for name in theirs)
            if len(theirs) == 3:
                value = _join_qkv(parts, parts[0].shape[0] // head_channels, new_order)
            else:
                value = parts[0]
            if ours.endswith((".qkv", ".proj_out")) and end == "weight":
                value = value.unsqueeze(-1)
            out[f"{ours}.{end}"] = value.contiguous()
    left = [key for key in state if key not in used]
    if left:
        raise ValueError(f"{len(left)} tensors of this UNet2DModel have no place in our network: {', '.join(left[:4])}")
    return out
