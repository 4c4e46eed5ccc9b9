"""Our generator as diffusers' `UNet2DModel` and back: its arguments, the names of its tensors, a folder in their layout.

Both networks compute the same function where `UNet2DModel` can express ours. Only names and the packing of the attention
matrices differ, so a conversion and its inverse lose no bit.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import build
from ..config import ModelConfig, Network, RunConfig
from ..runtime import storage
from .files import load_weights_into
from .load import Loaded, metadata_of

_log = logging.getLogger(__name__)
_ABOUT = "guided_diffusion.json"  # in the folder, beside the files of diffusers: our whole configuration

# Parts of a residual block, then the modules outside of blocks: our name -> theirs.
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
    "label_emb": "class_embedding",
}


class Layout(NamedTuple):
    """What the names of tensors and the packing of attention depend on."""

    attention: list[bool]
    """By level: whether its blocks have attention."""
    depth: int
    resblock_updown: bool
    head_channels: int
    new_order: bool


def layout_of(model: Network) -> Layout:
    """The layout of a generator's configuration; ValueError with the reason where `UNet2DModel` cannot express the network."""
    if not isinstance(model, ModelConfig):
        raise ValueError(
            f"diffusers' UNet2DModel is a plain denoising network; a {model.kind} network has no place in it"
        )
    if model.multipliers[0] != 1:
        raise ValueError(
            "UNet2DModel takes its time embedding's width from the first level; it cannot express the first multiplier "
            f"{model.multipliers[0]}"
        )
    attention = [2**level in model.attention_downsamplings for level in range(len(model.multipliers))]
    head_channels = model.num_head_channels
    if head_channels == -1:
        # The last level counts in any case: the middle block has its width and always has attention.
        attending = {m for m, attends in zip(model.multipliers, attention) if attends} | {model.multipliers[-1]}
        widths = {int(model.num_channels * m) // model.num_heads for m in attending}
        if len(widths) > 1 or model.num_heads_upsample not in (-1, model.num_heads):
            raise ValueError(
                "UNet2DModel fixes the channels per head for the whole network; with a fixed number of heads "
                "(--num_heads) they differ between levels, so it cannot express this network"
            )
        head_channels = widths.pop()
    return Layout(attention, model.num_res_blocks, model.resblock_updown, head_channels, model.use_new_attention_order)


def arguments_for_unet2d(model: ModelConfig, *, learn_sigma: bool) -> dict[str, Any]:
    """Keyword arguments of `diffusers.UNet2DModel` for this network. ValueError as `layout_of`."""
    layout = layout_of(model)
    change = "resnet" if layout.resblock_updown else "conv"
    plain = "Resnet{}sampleBlock2D" if layout.resblock_updown else "{}Block2D"
    return {
        "sample_size": model.image_size,
        "in_channels": model.image_channels,
        "out_channels": model.image_channels * (2 if learn_sigma else 1),
        "block_out_channels": [int(model.num_channels * m) for m in model.multipliers],
        "layers_per_block": layout.depth,
        "down_block_types": ["AttnDownBlock2D" if a else plain.format("Down") for a in layout.attention],
        "up_block_types": ["AttnUpBlock2D" if a else plain.format("Up") for a in reversed(layout.attention)],
        "downsample_type": change,
        "upsample_type": change,
        "attention_head_dim": layout.head_channels,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "flip_sin_to_cos": True,  # our embedding lists cosines first
        "freq_shift": 0,
        "dropout": model.dropout,
        "num_class_embeds": model.num_classes if model.class_cond else None,
    }


def flags_of_unet2d(config: Mapping[str, Any], noise_schedule: str) -> dict[str, Any]:
    """The 2021 flags of a UNet2DModel configuration; ValueError names what our network does not have."""
    known = {"AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"}
    wanted = {
        "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu",
        "time_embedding_type": "positional", "center_input_sample": False,
    }  # fmt: skip
    found = {name: (config.get(name, value), value) for name, value in wanted.items()}
    wrong = [f"{name}={theirs!r} (ours: {ours!r})" for name, (theirs, ours) in found.items() if theirs != ours]
    wrong += [f"block {kind}" for kind in config["down_block_types"] if kind not in known]
    if config["attention_head_dim"] is None:
        wrong.append("attention_head_dim=None")
    if wrong:
        raise ValueError(f"this UNet2DModel has what our network has not: {', '.join(wrong)}")
    widths, channels, size = config["block_out_channels"], config["in_channels"], config["sample_size"]
    attention = [kind == "AttnDownBlock2D" for kind in config["down_block_types"]]
    return {
        "image_size": size,
        "image_channels": channels,
        "num_channels": widths[0],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": ",".join(f"{width / widths[0]:g}" for width in widths),
        "attention_resolutions": ",".join(str(size // 2**k) for k, attends in enumerate(attention) if attends),
        "num_head_channels": config["attention_head_dim"],
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": config["downsample_type"] == "resnet",
        "class_cond": config["num_class_embeds"] is not None,
        "num_classes": config["num_class_embeds"] or 0,
        "learn_sigma": config["out_channels"] == 2 * channels,
        "dropout": config["dropout"],
        "noise_schedule": noise_schedule,
    }


def _blocks(layout: Layout) -> Iterator[tuple[str, str, str]]:
    """Pairs of block prefixes, ours and theirs, each with what the block is: "resnet", "attention" or "conv"."""
    levels = len(layout.attention)
    block = 1  # input block 0 is the first convolution
    for level, attends in enumerate(layout.attention):
        for layer in range(layout.depth):
            yield f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}", "resnet"
            if attends:
                yield f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}", "attention"
            block += 1
        if level != levels - 1:
            yield _resizer(layout, f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0", ".op")
            block += 1
    yield "middle_block.0", "mid_block.resnets.0", "resnet"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "resnet"
    block = 0
    for step, attends in enumerate(reversed(layout.attention)):
        for layer in range(layout.depth + 1):
            yield f"output_blocks.{block}.0", f"up_blocks.{step}.resnets.{layer}", "resnet"
            if attends:
                yield f"output_blocks.{block}.1", f"up_blocks.{step}.attentions.{layer}", "attention"
            if step != levels - 1 and layer == layout.depth:
                yield _resizer(
                    layout, f"output_blocks.{block}.{1 + attends}", f"up_blocks.{step}.upsamplers.0", ".conv"
                )
            block += 1


def _resizer(layout: Layout, ours: str, theirs: str, convolution: str) -> tuple[str, str, str]:
    """What changes the size between levels: a residual block, or a convolution, which ours calls `convolution`."""
    return (ours, theirs, "resnet") if layout.resblock_updown else (ours + convolution, f"{theirs}.conv", "conv")


def _name_pairs(layout: Layout) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our module name -> their module name, or three of them for a qkv product."""
    for ours, theirs in _ENDS.items():
        yield ours, (theirs,)
    for ours, theirs, kind in _blocks(layout):
        if kind == "conv":
            yield ours, (theirs,)
        elif kind == "resnet":
            for a, b in _RESNET.items():
                yield f"{ours}.{a}", (f"{theirs}.{b}",)
        else:
            yield f"{ours}.norm", (f"{theirs}.group_norm",)
            yield f"{ours}.qkv", (f"{theirs}.to_q", f"{theirs}.to_k", f"{theirs}.to_v")
            yield f"{ours}.proj_out", (f"{theirs}.to_out.0",)


def split_qkv(packed: Tensor, heads: int, new_order: bool) -> tuple[Tensor, ...]:
    """`[3C, …]` -> three `[C, …]`. New order: all queries, keys, values; legacy: query, key, value of each head in turn."""
    if new_order:
        return packed.chunk(3)
    per_head = packed.reshape(heads, 3, -1, *packed.shape[1:])
    return tuple(per_head[:, k].reshape(-1, *packed.shape[1:]) for k in range(3))


def join_qkv(parts: Sequence[Tensor], heads: int, new_order: bool) -> Tensor:
    """The inverse of `split_qkv`."""
    if new_order:
        return torch.cat(list(parts))
    split = [part.reshape(heads, 1, -1, *part.shape[1:]) for part in parts]
    return torch.cat(split, dim=1).reshape(-1, *parts[0].shape[1:])


def _tensor_pairs(layout: Layout) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(our tensor, their tensor or three of them, whether ours has a last dimension of 1 that theirs lacks)."""
    for ours, theirs in _name_pairs(layout):
        for end in ("weight", "bias"):
            squeezed = end == "weight" and ours.endswith((".qkv", ".proj_out"))
            yield f"{ours}.{end}", tuple(f"{name}.{end}" for name in theirs), squeezed


def to_diffusers(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our state dict under diffusers' names. Raises ValueError when a tensor is left over."""
    left, out = dict(state), {}
    for ours, theirs, squeezed in _tensor_pairs(layout):
        value = left.pop(ours, None)
        if value is None:
            continue
        value = value.squeeze(-1) if squeezed else value
        heads = value.shape[0] // 3 // layout.head_channels
        parts = (value,) if len(theirs) == 1 else split_qkv(value, heads, layout.new_order)
        out.update({name: part.contiguous() for name, part in zip(theirs, parts)})
    if left:
        raise ValueError(f"{len(left)} tensors have no place in UNet2DModel: {', '.join(list(left)[:4])}")
    return out


def from_diffusers(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`: a `UNet2DModel` state dict under our names and packing."""
    left, out = dict(state), {}
    for ours, theirs, squeezed in _tensor_pairs(layout):
        parts = [left.pop(name) for name in theirs if name in left]
        if not parts:
            continue
        heads = parts[0].shape[0] // layout.head_channels
        value = parts[0] if len(theirs) == 1 else join_qkv(parts, heads, layout.new_order)
        out[ours] = (value.unsqueeze(-1) if squeezed else value).contiguous()
    if left:
        raise ValueError(
            f"{len(left)} tensors of this UNet2DModel have no place in our network: {', '.join(list(left)[:4])}"
        )
    return out


def save_diffusers(loaded: Loaded, folder: str) -> nn.Module:
    """Write `folder` in diffusers' layout (UNet2DModel.from_pretrained reads it); returns their network as `net(x, time, y)`."""
    model, learn_sigma = loaded.config.model, loaded.config.diffusion.learn_sigma
    layout = layout_of(model)
    assert isinstance(model, ModelConfig)
    net = _unet2d_class()(**arguments_for_unet2d(model, learn_sigma=learn_sigma))
    ours = {name: value.detach().float().cpu() for name, value in loaded.net.state_dict().items()}
    net.load_state_dict(to_diffusers(ours, layout))
    net.save_pretrained(folder)
    storage.write_json_atomic(os.path.join(folder, _ABOUT), metadata_of(loaded))
    if learn_sigma:
        _log.info(
            "note: UNet2DModel.forward also returns the learned variance channels; schedulers of diffusers expect them split off"
        )
    return _AsOurs(net.eval())


def load_diffusers(folder: str, noise_schedule: str) -> tuple[Loaded, nn.Module]:
    """(our network with the weights of a diffusers folder, their network as `net(x, time, y)`).

    The configuration is the one that `save_diffusers` left there, else that of their network, with `noise_schedule`.
    """
    theirs = _unet2d_class().from_pretrained(folder, low_cpu_mem_usage=False).eval()
    about, class_names = os.path.join(folder, _ABOUT), ()
    if os.path.isfile(about):
        stored = json.loads(storage.read_bytes(about))
        config, class_names = RunConfig.from_dict(stored["kind"], stored["config"]), tuple(stored["class_names"])
    else:
        config = RunConfig.from_flags("diffusion", flags_of_unet2d(dict(theirs.config), noise_schedule))
    net = build.build_empty(config.model, config.diffusion)
    load_weights_into(net, from_diffusers(theirs.state_dict(), layout_of(config.model)), folder, assign=True)
    net = net.eval().requires_grad_(False)
    return Loaded(net, build.build_process(config.diffusion), config, folder, class_names), _AsOurs(theirs)


def _unet2d_class() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise ValueError("this conversion needs diffusers: pip install 'guided-diffusion[diffusers]'") from None
    return UNet2DModel


class _AsOurs(nn.Module):
    """A UNet2DModel behind `net(x, time, y)`."""

    def __init__(self, unet2d: Any) -> None:
        super().__init__()
        self.net = unet2d

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(x, timesteps, class_labels=y).sample
        return out
