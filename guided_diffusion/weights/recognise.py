"""Names and shapes of tensors -> what they fix of a network, as the flags of 2021, and the flags that no shape can tell.

Needs no tensor, so a file is recognised before its numbers are read. The family covers the 2021 release, its predecessor
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
# What no shape tells of a generator besides its heads, with the usual values.
OPEN: dict[str, tuple[object, ...]] = {
    "use_new_attention_order": (False, True),
    "noise_schedule": ("linear", "cosine"),
    "rescale_timesteps": (False, True),
    "diffusion_steps": (1000, 4000),
}
_SIZES = (32, 64, 128, 256, 512)


class NotThisFamily(ValueError):
    """The names are not those of a U-Net or classifier of this family."""


@dataclass(frozen=True)
class Layout:
    """What shapes determine.

    kind            "diffusion", "super_resolution" or "classifier"
    flags           2021 flags (and num_classes, image_channels) that the shapes fix
    multipliers     channels of each level, in those of the first convolution
    attention_ds    downsampling factors of the levels with attention: 1, 2, 4 ...
    attention_widths  channels of every attention block: head counts must divide them
    open            what shapes cannot tell; of a generator the heads are first
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
    """A short name of the set of tensor names and shapes; a renamed tensor or a changed shape changes it."""
    lines = sorted(f"{name} {','.join(map(str, shape))}" for name, shape in normalise_keys(shapes).items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def inspect_shapes(shapes: Shapes, *, kind: str | None = None, image_channels: int | None = None) -> Layout:
    """Read the flags off a state dict's names and shapes.

    If the numbers of channels allow several networks, it is the one with `image_channels` (and of `kind`), else the most common one.
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


def _blocks_with(shapes: Shapes, pattern: str) -> list[int]:
    """The numbers that `pattern` captures at the start of names, sorted."""
    return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})


def _count_blocks(shapes: Shapes, stem: str) -> int:
    found = _blocks_with(shapes, rf"{stem}\.(\d+)\.")
    for expected, number in enumerate(found):
        if number != expected:
            raise NotThisFamily(f"{stem}.{expected} is missing: the file is incomplete or not of this family")
    return len(found)


def _levels(
    shapes: Shapes, width: int, depth: int, blocks: int
) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]:
    """Multipliers by level, downsampling factors with attention, and attention widths, from the way down.

    After the first convolution each level has `depth` blocks and, but for the last, one that downsamples.
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
    # The last block of a level on the way up carries the upsampling: a Conv2d, or a second residual block.
    resblocks = _blocks_with(shapes, r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight$")
    ups = resblocks or _blocks_with(shapes, r"output_blocks\.(\d+)\.[12]\.conv\.weight$")
    depth = ups[0] if ups else blocks - 1
    if depth < 1 or blocks % (depth + 1) or ups != list(range(depth, blocks - 1, depth + 1)):
        raise NotThisFamily(f"upsampling after output blocks {ups} of {blocks}: not the regular levels of this family")
    multipliers, attention, widths = _levels(shapes, width, depth, blocks)
    channels_in, channels_out = shapes["input_blocks.0.0.weight"][1], _require(shapes, "out.2.weight", 4)[0]
    readings = _readings(channels_in, channels_out)
    fitting = [reading for reading in readings if reading[1] == image_channels and kind in (None, reading[0])]
    kind, image_channels, learn_sigma = (fitting or readings)[0]
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
    # Heads: either flag, where it divides every width with attention.
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

    An upsampler is given the noisy image and the enlarged small one as channels of one input; a learned variance doubles the output.
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
    convolutions = _blocks_with(shapes, r"input_blocks\.(\d+)\.0\.op\.weight$")
    depths = [depth for depth in range(1, blocks) if _depth_fits(shapes, depth, blocks, convolutions)]
    if not depths:
        raise NotThisFamily(f"{blocks} input blocks do not form the regular levels of this family")
    # The 2021 multipliers settle which of several regular readings it is.
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
        places = shapes["out.2.positional_embedding"][1] - 1
        side = round(places**0.5)
        if side * side != places:
            raise NotThisFamily(f"out.2.positional_embedding has {places} places, which is no square")
        flags["image_size"] = side * 2 ** (len(multipliers) - 1)
    elif multipliers in SIZE_OF_MULTIPLIERS:
        flags["image_size"] = SIZE_OF_MULTIPLIERS[multipliers]
    else:
        choices = (_choice("image_size", _SIZES),)
    return Layout("classifier", flags, multipliers, attention, widths, choices)


def _pool(shapes: Shapes) -> tuple[str, int]:
    """(kind of pool, number of classes), by the output layer."""
    if "out.2.positional_embedding" in shapes:
        return "attention", _require(shapes, "out.2.c_proj.weight")[0]
    if "out.3.weight" in shapes:
        return "adaptive" if len(shapes["out.3.weight"]) == 4 else "spatial_v2", shapes["out.3.weight"][0]
    if "out.2.weight" in shapes:
        return "spatial", shapes["out.2.weight"][0]
    raise NotThisFamily("no output head of this family's four classifier pools in the file")


def _depth_fits(shapes: Shapes, depth: int, blocks: int, convolutions: list[int]) -> bool:
    """Whether the input blocks can be levels of `depth` blocks with a downsampling between them.

    A convolution that downsamples has a name of its own. A residual block that does has the names of any other, but it keeps its
    channels and has no attention. The blocks of one level agree in channels and attention.
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
