"""Convert weights to safetensors, a plain .pt file or diffusers' `UNet2DModel`, and measure the largest difference of the outputs.

A `UNet2DModel` can express many of our diffusion networks, and then computes the same function. Only tensor names and the packing of
queries, keys and values differ, so a conversion and its inverse lose no bit. In this file "ours" is this package, "theirs" diffusers.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import build
from ..config import ModelConfig, Network, RunConfig, label_rows
from ..runtime import storage
from ..runtime.streams import EVALUATE, Streams
from .identify import flag_line
from .load import Loaded, load, metadata_of, network_of
from .probe import conditions

_log = logging.getLogger(__name__)
FORMS = ("safetensors", "pt", "diffusers")


def form_of(target: str, form: str = "") -> str:
    """`form`, or if it is empty the ending of `target`: one of FORMS."""
    form = form or os.path.splitext(target)[1].removeprefix(".")
    if form not in FORMS:
        raise ValueError(f"cannot tell the form of {target!r}; end it in .safetensors or .pt, or say --to diffusers")
    return form


def convert(source: str, target: str, form: str, *, noise_schedule: str = "linear", weights: str = "") -> float:
    """Write the weights of `source` as `target` and return the `largest_difference` of its outputs from those of the source.

    source          a .pt or .safetensors file, a run folder, or a folder that diffusers wrote
    form            one of FORMS; "diffusers" writes a folder
    noise_schedule  the schedule of a diffusers folder, which does not store it
    weights         "ema" or "model" where the source holds both
    """
    original: Callable[..., Tensor]
    if is_diffusers(source):
        loaded, original = load_diffusers(source, noise_schedule)
    else:
        loaded = load(source, weights=weights)
        original = loaded.net
    if form == "diffusers":
        return largest_difference(original, save_diffusers(loaded, target), loaded.config)
    save_file(loaded, target, form)
    return largest_difference(original, load(target, flags=_flags(loaded.config)).net, loaded.config)


def _flags(config: RunConfig) -> dict[str, Any]:
    return {**config.model.to_dict(), **config.diffusion.to_dict()}


def save_file(loaded: Loaded, target: str, form: str) -> None:
    """Write one file: safetensors with its configuration inside, or a plain state dict as in 2021, whose flags are logged."""
    state = {name: value.detach().cpu().contiguous() for name, value in loaded.net.state_dict().items()}
    if form == "safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise ValueError(
                "writing safetensors needs its package: pip install 'guided-diffusion[safetensors]'"
            ) from None
        metadata = {"guided_diffusion": storage.to_json(metadata_of(loaded), indent=None)}
        storage.write_bytes_atomic(target, save(state, metadata=metadata))
        return
    with storage.atomic_write(target) as file:
        torch.save(state, file)
    flags = flag_line(_flags(loaded.config))
    _log.info("note: a plain state dict as in 2021 carries no configuration; to load %s, type %s", target, flags)


def largest_difference(first: Callable[..., Tensor], second: Callable[..., Tensor], config: RunConfig) -> float:
    """max |difference| / max |output| of two networks for the same noise, time steps and classes, in float32 on the CPU."""
    model = config.model
    x = Streams(0, EVALUATE, ids=range(2)).normal((model.image_channels, *model.size))
    time = torch.tensor([10.0, 700.0])
    cond = conditions(model, x)
    with torch.no_grad():
        a, b = first(x, time, **cond).float(), second(x, time, **cond).float()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


# ---------------------------------------------------------------------------------------------------------------------
# diffusers

_ABOUT = "guided_diffusion.json"  # our whole configuration, stored beside the files of diffusers
# Our name -> theirs: parts of a residual block, then modules outside of blocks.
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


def head_channels_of(model: Network) -> int:
    """Channels per attention head; ValueError with the reason where `UNet2DModel` cannot express the network."""
    if not isinstance(model, ModelConfig):
        raise ValueError(
            f"diffusers' UNet2DModel is a plain denoising network; it cannot express a {model.kind} network"
        )
    if model.multipliers[0] != 1:
        raise ValueError(
            "UNet2DModel takes its time embedding's width from the first level; it cannot express the first multiplier "
            f"{model.multipliers[0]}"
        )
    if model.num_head_channels != -1:
        return model.num_head_channels
    # The last level always counts: the middle block has the width of that level, and attention.
    attending = {m for m, attends in zip(model.multipliers, _attention(model)) if attends} | {model.multipliers[-1]}
    widths = {int(model.num_channels * m) // model.num_heads for m in attending}
    if len(widths) > 1 or model.num_heads_upsample not in (-1, model.num_heads):
        raise ValueError(
            "UNet2DModel fixes the channels per head for the whole network; with a fixed number of heads "
            "(--num_heads) they differ between levels, so it cannot express this network"
        )
    return widths.pop()


def _attention(model: Network) -> list[bool]:
    """Whether the blocks of each level have attention."""
    return [2**level in model.attention_downsamplings for level in range(len(model.multipliers))]


def arguments_for_unet2d(model: Any, *, learn_sigma: bool) -> dict[str, Any]:
    """Keyword arguments of `diffusers.UNet2DModel` for this network. ValueError as in `head_channels_of`."""
    attention, head_channels = _attention(model), head_channels_of(model)
    change = "resnet" if model.resblock_updown else "conv"
    plain = "Resnet{}sampleBlock2D" if model.resblock_updown else "{}Block2D"
    return {
        "sample_size": model.image_size,
        "in_channels": model.image_channels,
        "out_channels": model.image_channels * (2 if learn_sigma else 1),
        "block_out_channels": [int(model.num_channels * m) for m in model.multipliers],
        "layers_per_block": model.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if a else plain.format("Down") for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else plain.format("Up") for a in reversed(attention)],
        "downsample_type": change,
        "upsample_type": change,
        "attention_head_dim": head_channels,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "flip_sin_to_cos": True,  # our embedding lists cosines first
        "freq_shift": 0,
        "dropout": model.dropout,
        "num_class_embeds": label_rows(model) or None,
    }


def flags_of_unet2d(config: Mapping[str, Any], noise_schedule: str) -> dict[str, Any]:
    """The 2021 flags of a UNet2DModel configuration; ValueError names the settings that our network does not have."""
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
        raise ValueError(f"this UNet2DModel has settings that our network lacks: {', '.join(wrong)}")
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


def _modules(model: Any) -> dict[str, tuple[str, ...]]:
    """The name of each of our modules with weights -> their name; for our joint `qkv` their three names."""
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _ENDS.items()}
    attention, depth = _attention(model), model.num_res_blocks

    def resnet(ours: str, theirs: str) -> None:
        names.update({f"{ours}.{part}": (f"{theirs}.{of_theirs}",) for part, of_theirs in _RESNET.items()})

    def attend(ours: str, theirs: str) -> None:
        names[f"{ours}.norm"] = (f"{theirs}.group_norm",)
        names[f"{ours}.qkv"] = (f"{theirs}.to_q", f"{theirs}.to_k", f"{theirs}.to_v")
        names[f"{ours}.proj_out"] = (f"{theirs}.to_out.0",)

    def level(ours: str, first: int, theirs: str, layers: int, attends: bool) -> None:
        for layer in range(layers):
            resnet(f"{ours}.{first + layer}.0", f"{theirs}.resnets.{layer}")
            if attends:
                attend(f"{ours}.{first + layer}.1", f"{theirs}.attentions.{layer}")

    def resize(ours: str, theirs: str, convolution: str) -> None:
        if model.resblock_updown:
            resnet(ours, theirs)
        else:
            names[f"{ours}.{convolution}"] = (f"{theirs}.conv",)

    resnet("middle_block.0", "mid_block.resnets.0")
    attend("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    for k, attends in enumerate(attention):
        first = 1 + k * (depth + 1)  # input block 0 is the first convolution
        level("input_blocks", first, f"down_blocks.{k}", depth, attends)
        if k < len(attention) - 1:
            resize(f"input_blocks.{first + depth}.0", f"down_blocks.{k}.downsamplers.0", "op")
    for k, attends in enumerate(reversed(attention)):
        first = k * (depth + 1)
        level("output_blocks", first, f"up_blocks.{k}", depth + 1, attends)
        if k < len(attention) - 1:
            resize(f"output_blocks.{first + depth}.{1 + attends}", f"up_blocks.{k}.upsamplers.0", "conv")
    return names


def _tensors(model: Any) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(our tensor, their tensor or three of them, whether ours has a last dimension of 1 that theirs lacks)."""
    for ours, theirs in _modules(model).items():
        for end in ("weight", "bias"):
            squeezed = end == "weight" and ours.endswith((".qkv", ".proj_out"))
            yield f"{ours}.{end}", tuple(f"{name}.{end}" for name in theirs), squeezed


def split_qkv(packed: Tensor, heads: int, new_order: bool) -> tuple[Tensor, ...]:
    """`[3C, …]` -> three `[C, …]`. New order: all queries, keys, values; legacy: query, key, value of each head in turn."""
    shape = (3, heads, -1) if new_order else (heads, 3, -1)
    parts = packed.reshape(*shape, *packed.shape[1:]).unbind(0 if new_order else 1)
    return tuple(part.reshape(-1, *packed.shape[1:]) for part in parts)


def join_qkv(parts: Sequence[Tensor], heads: int, new_order: bool) -> Tensor:
    """The inverse of `split_qkv`."""
    by_head = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
    return torch.stack(by_head, dim=0 if new_order else 1).reshape(-1, *parts[0].shape[1:])


def to_diffusers(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Our state dict under diffusers' names. ValueError if a tensor has no counterpart."""
    remaining, out = dict(state), {}
    for ours, theirs, squeezed in _tensors(model):
        if ours in remaining:
            value = remaining.pop(ours)
            value = value.squeeze(-1) if squeezed else value
            heads = value.shape[0] // 3 // head_channels_of(model)
            parts = (value,) if len(theirs) == 1 else split_qkv(value, heads, model.use_new_attention_order)
            out.update({name: part.contiguous() for name, part in zip(theirs, parts)})
    _require_none(remaining, "UNet2DModel")
    return out


def from_diffusers(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`: a `UNet2DModel` state dict under our names and packing."""
    remaining, out = dict(state), {}
    for ours, theirs, squeezed in _tensors(model):
        if parts := [remaining.pop(name) for name in theirs if name in remaining]:
            heads = parts[0].shape[0] // head_channels_of(model)
            value = parts[0] if len(theirs) == 1 else join_qkv(parts, heads, model.use_new_attention_order)
            out[ours] = (value.unsqueeze(-1) if squeezed else value).contiguous()
    _require_none(remaining, "our network")
    return out


def _require_none(remaining: Mapping[str, Tensor], network: str) -> None:
    if remaining:
        raise ValueError(f"{len(remaining)} tensors have no counterpart in {network}: {', '.join(list(remaining)[:4])}")


def save_diffusers(loaded: Loaded, folder: str) -> Callable[..., Tensor]:
    """Write `folder` in diffusers' layout (UNet2DModel.from_pretrained reads it); returns their network as `net(x, time, y)`."""
    model, learn_sigma = loaded.config.model, loaded.config.diffusion.learn_sigma
    arguments = arguments_for_unet2d(
        model, learn_sigma=learn_sigma
    )  # says what does not fit before diffusers is loaded
    net = _unet2d_class()(**arguments)
    ours = {name: value.detach().float().cpu() for name, value in loaded.net.state_dict().items()}
    net.load_state_dict(to_diffusers(ours, model))
    net.save_pretrained(folder)
    storage.write_json_atomic(os.path.join(folder, _ABOUT), metadata_of(loaded))
    if learn_sigma:
        _log.info(
            "note: UNet2DModel.forward also returns the learned variance channels; schedulers of diffusers expect them split off"
        )
    return _as_ours(net.eval())


def is_diffusers(folder: str) -> bool:
    """Whether diffusers wrote a UNet2DModel into this local folder."""
    config = os.path.join(folder, "config.json")
    return os.path.isfile(config) and b"UNet2DModel" in storage.read_bytes(config)


def load_diffusers(folder: str, noise_schedule: str) -> tuple[Loaded, Callable[..., Tensor]]:
    """(our network with the weights of a diffusers folder, their network as `net(x, time, y)`).

    The configuration is the one that `save_diffusers` stored there, else it follows from their network and `noise_schedule`.
    """
    theirs = _unet2d_class().from_pretrained(folder, low_cpu_mem_usage=False).eval()
    about, class_names = os.path.join(folder, _ABOUT), ()
    if os.path.isfile(about):
        stored = json.loads(storage.read_bytes(about))
        config, class_names = RunConfig.from_dict(stored["kind"], stored["config"]), tuple(stored["class_names"])
    else:
        config = RunConfig.from_flags("diffusion", flags_of_unet2d(dict(theirs.config), noise_schedule))
    net = network_of(config, from_diffusers(theirs.state_dict(), config.model), folder)
    return Loaded(net, build.build_process(config.diffusion), config, folder, class_names), _as_ours(theirs)


def _unet2d_class() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise ValueError("this conversion needs diffusers: pip install 'guided-diffusion[diffusers]'") from None
    return UNet2DModel


def _as_ours(unet2d: Any) -> Callable[..., Tensor]:
    """A UNet2DModel with the call of our networks, `net(x, time, y)`."""
    return lambda x, time, y=None: unet2d(x, time, class_labels=y).sample
