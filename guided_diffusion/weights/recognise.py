"""Names and shapes of tensors -> the 2021 flags of the network that they determine, and the flags that they leave open.

It needs no tensor values. The family covers the 2021 release, its predecessor
(improved-diffusion) and the consistency models, whose attention stores 1x1 Conv2d weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.networks import default_multipliers
from .files import WRAPPERS

Shapes = Mapping[str, tuple[int, ...]]
Choice = tuple[tuple[str, Any], ...]
"""Candidates, as (flag, value), of which one is right."""

# Image size that the 2021 default multipliers belong to (level widths relative to num_channels).
SIZE_OF_MULTIPLIERS = {default_multipliers(size): size for size in (64, 128, 256, 512)}
# What shapes leave open of a denoising network besides its heads, with the usual values.
OPEN: dict[str, tuple[object, ...]] = {
    "use_new_attention_order": (False, True),
    "noise_schedule": ("linear", "cosine"),
    "rescale_timesteps": (False, True),
    "diffusion_steps": (1000, 4000),
}
_SIZES = (32, 64, 128, 256, 512)


class NotThisFamily(ValueError):
    """Names or shapes are not those of a U-Net or classifier of this family."""


@dataclass(frozen=True)
class Layout:
    """What shapes determine.

    kind            "diffusion", "super_resolution" or "classifier"
    flags           2021 flags (and num_classes, image_channels) that the shapes fix
    multipliers     channels of each level, divided by those of the first convolution
    attention_ds    downsampling factors of the levels with attention: 1, 2, 4 ...
    attention_widths  channels of each level with attention and of the middle block: head counts must divide them
    open            what shapes cannot tell; for denoising networks the heads come first
    """

    kind: str
    flags: dict[str, object]
    multipliers: tuple[float, ...]
    attention_ds: tuple[int, ...]
    attention_widths: tuple[int, ...]
    open: tuple[Choice, ...]


def normalise_keys(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names without the prefixes of wrappers; shapes as tuples."""
    return {WRAPPERS.sub("", name): tuple(shape) for name, shape in shapes.items()}


def signature(shapes: Shapes) -> str:
    """A hash of all tensor names and shapes, 16 hexadecimal digits."""
    lines = sorted(f"{name} {','.join(map(str, shape))}" for name, shape in normalise_keys(shapes).items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def inspect_shapes(shapes: Shapes, *, kind: str | None = None, image_channels: int | None = None) -> Layout:
    """Read the flags off a state dict's names and shapes.

    If the numbers of channels fit several kinds of network, the one with `image_channels` (and of `kind`) is taken, else the likeliest.
    Raises NotThisFamily (a ValueError) that names the first thing missing or unexpected.
    """
    shapes = normalise_keys(shapes)
    width = _require(shapes, "time_embed.0.weight", 2)[1]
    _require(shapes, "input_blocks.0.0.weight", 4)
    _require(shapes, "middle_block.1.qkv.weight")
    if any(name.startswith("output_blocks.") for name in shapes):
        return _generator(shapes, width, kind, image_channels)
    return _classifier(shapes, width)


def _require(shapes: Shapes, name: str, ndim: int | None = None) -> tuple[int, ...]:
    if name not in shapes:
        first = ", ".join(list(shapes)[:3])
        raise NotThisFamily(
            f"no tensor named {name!r} in this file (it begins with {first} …): not a network of this family"
        )
    if ndim not in (None, len(shapes[name])):
        raise NotThisFamily(
            f"{name!r} has shape {list(shapes[name])}; a network of this family has {ndim} dimensions there"
        )
    return shapes[name]


def _block_numbers(shapes: Shapes, pattern: str) -> list[int]:
    """The block numbers that `pattern` captures at the start of tensor names, sorted."""
    return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})


def _count_blocks(shapes: Shapes, stem: str) -> int:
    found = _block_numbers(shapes, rf"{stem}\.(\d+)\.")
    for expected, number in enumerate(found):
        if number != expected:
            raise NotThisFamily(f"{stem}.{expected} is missing: the file is incomplete or not of this family")
    return len(found)


def _levels(
    shapes: Shapes, width: int, depth: int, blocks: int
) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]:
    """(multipliers, attention_ds, attention_widths) of a `Layout`, from the input blocks.

    After the first convolution each level has `depth` residual blocks and, except the last, a downsampling block.
    """
    multipliers, attention, widths = [], [], []
    for level, first in enumerate(range(1, blocks, depth + 1)):
        channels = _require(shapes, f"input_blocks.{first}.0.out_layers.3.weight", 4)[0]
        multipliers.append(channels // width if channels % width == 0 else channels / width)
        if f"input_blocks.{first}.1.qkv.weight" in shapes:
            attention.append(2**level)
            widths.append(channels)
    widths.append(_require(shapes, "middle_block.1.qkv.weight")[1])
    return tuple(multipliers), tuple(attention), tuple(widths)


def _scale_shift(shapes: Shapes) -> bool:
    """Whether the time embedding gives a scale and a shift for each channel, or a shift only."""
    embedding = _require(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    channels = _require(shapes, "input_blocks.1.0.out_layers.3.weight", 4)[0]
    if embedding not in (channels, 2 * channels):
        raise NotThisFamily(f"input_blocks.1.0.emb_layers.1.weight gives {embedding} numbers for {channels} channels")
    return embedding == 2 * channels


def _generator(shapes: Shapes, width: int, kind: str | None, image_channels: int | None) -> Layout:
    blocks, blocks_up = _count_blocks(shapes, "input_blocks"), _count_blocks(shapes, "output_blocks")
    if blocks_up != blocks:
        raise NotThisFamily(f"{blocks} input blocks but {blocks_up} output blocks; they come in pairs")
    # The last output block of each level but the last also upsamples, with a Conv2d or a second residual block.
    resblocks = _block_numbers(shapes, r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight$")
    upsampling = resblocks or _block_numbers(shapes, r"output_blocks\.(\d+)\.[12]\.conv\.weight$")
    depth = upsampling[0] if upsampling else blocks - 1
    if depth < 1 or blocks % (depth + 1) or upsampling != list(range(depth, blocks - 1, depth + 1)):
        raise NotThisFamily(f"output blocks {upsampling} of {blocks} upsample: not the regular levels of this family")
    multipliers, attention, widths = _levels(shapes, width, depth, blocks)
    channels_in, channels_out = shapes["input_blocks.0.0.weight"][1], _require(shapes, "out.2.weight", 4)[0]
    readings = _readings(channels_in, channels_out)
    matching = [reading for reading in readings if reading[1] == image_channels and kind in (None, reading[0])]
    kind, image_channels, learn_sigma = (matching or readings)[0]
    flags: dict[str, object] = {
        "num_channels": width,
        "num_res_blocks": depth,
        "use_scale_shift_norm": _scale_shift(shapes),
        "resblock_updown": bool(resblocks),
        "learn_sigma": learn_sigma,
        "class_cond": "label_emb.weight" in shapes,
        "image_channels": image_channels,
    }
    if "label_emb.weight" in shapes:
        flags["num_classes"] = shapes["label_emb.weight"][0]
    # Candidates for the heads, by either flag: values that divide the channels of every attention block.
    usual = [("num_head_channels", c) for c in (16, 32, 64, 128)] + [("num_heads", h) for h in (1, 2, 4, 8)]
    choices = [tuple((name, number) for name, number in usual if all(w % number == 0 for w in widths))]
    choices += [_choice(name, values) for name, values in OPEN.items()]
    if multipliers not in SIZE_OF_MULTIPLIERS:
        choices.append(_choice("large_size" if kind == "super_resolution" else "image_size", _SIZES))
    if kind == "super_resolution":
        choices.append(_choice("small_size", (64, 128)))
    return Layout(kind, flags, multipliers, attention, widths, tuple(choices))


def _choice(name: str, values: tuple[object, ...]) -> Choice:
    return tuple((name, value) for value in values)


def _readings(channels_in: int, channels_out: int) -> list[tuple[str, int, bool]]:
    """Every (kind, image channels, learned variance) that the channels allow, the likeliest first.

    An upsampler's input is the noisy image and the enlarged small one, joined as channels; a learned variance doubles the output channels.
    """
    kinds = [("diffusion", channels_in)]
    if channels_in % 2 == 0:
        kinds.append(("super_resolution", channels_in // 2))
    if channels_in in (2, 6):  # upsamplers of grey and RGB images; images of two or six channels are rarer
        kinds.reverse()
    readings = [
        (kind, channels, channels_out == 2 * channels)
        for kind, channels in kinds
        if channels_out in (channels, 2 * channels)
    ]
    if not readings:
        raise NotThisFamily(
            f"{channels_in} input and {channels_out} output channels fit neither a diffusion model nor an upsampler"
        )
    return readings


def _classifier(shapes: Shapes, width: int) -> Layout:
    blocks = _count_blocks(shapes, "input_blocks")
    pool, classes = _pool(shapes)
    convolutions = _block_numbers(shapes, r"input_blocks\.(\d+)\.0\.op\.weight$")
    depths = [depth for depth in range(1, blocks) if _depth_fits(shapes, depth, blocks, convolutions)]
    if not depths:
        raise NotThisFamily(f"{blocks} input blocks do not form the regular levels of this family")
    # Several depths may fit: prefer one whose multipliers are the default of some image size.
    usual = (depth for depth in depths if _levels(shapes, width, depth, blocks)[0] in SIZE_OF_MULTIPLIERS)
    depth = next(usual, depths[0])
    multipliers, attention, widths = _levels(shapes, width, depth, blocks)
    flags: dict[str, object] = {
        "classifier_width": width,
        "classifier_depth": depth,
        "classifier_use_scale_shift_norm": _scale_shift(shapes),
        "classifier_resblock_updown": not convolutions,
        "classifier_pool": pool,
        "image_channels": shapes["input_blocks.0.0.weight"][1],
        "num_classes": classes,
    }
    choices: tuple[Choice, ...] = ()
    if pool == "attention":
        positions = shapes["out.2.positional_embedding"][1] - 1
        side = round(positions**0.5)
        if side * side != positions:
            raise NotThisFamily(f"out.2.positional_embedding has {positions} positions, which is no square number")
        flags["image_size"] = side * 2 ** (len(multipliers) - 1)
    elif multipliers in SIZE_OF_MULTIPLIERS:
        flags["image_size"] = SIZE_OF_MULTIPLIERS[multipliers]
    else:
        choices = (_choice("image_size", _SIZES),)
    return Layout("classifier", flags, multipliers, attention, widths, choices)


def _pool(shapes: Shapes) -> tuple[str, int]:
    """(pool, number of classes) from the output layer."""
    if "out.2.positional_embedding" in shapes:
        return "attention", _require(shapes, "out.2.c_proj.weight")[0]
    if "out.3.weight" in shapes:
        return "adaptive" if len(shapes["out.3.weight"]) == 4 else "spatial_v2", shapes["out.3.weight"][0]
    if "out.2.weight" in shapes:
        return "spatial", shapes["out.2.weight"][0]
    raise NotThisFamily("no output head of this family's four classifier pools in the file")


def _depth_fits(shapes: Shapes, depth: int, blocks: int, convolutions: list[int]) -> bool:
    """Whether the input blocks can form levels of `depth` residual blocks with a downsampling block between levels.

    A downsampling convolution has a tensor name of its own. A downsampling residual block is named like any other, but has as many
    output as input channels and no attention. The residual blocks of one level have equal output channels and attention.
    """
    if blocks % (depth + 1):
        return False
    downsampling = list(range(depth + 1, blocks, depth + 1))
    if convolutions:
        return convolutions == downsampling
    widths, attends = {}, {}
    for block in range(1, blocks):
        if f"input_blocks.{block}.0.in_layers.2.weight" not in shapes:
            return False
        widths[block] = shapes[f"input_blocks.{block}.0.in_layers.2.weight"][:2]
        attends[block] = f"input_blocks.{block}.1.qkv.weight" in shapes
    if any(len(set(widths[block])) > 1 or attends[block] for block in downsampling):
        return False
    levels = (range(first, first + depth) for first in range(1, blocks, depth + 1))
    return all(len({(widths[block][0], attends[block]) for block in level}) == 1 for level in levels)
