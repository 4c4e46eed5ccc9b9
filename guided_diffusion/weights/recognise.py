"""What a checkpoint says about its network: key names and shapes -> the 2021 flags, and the flags that no shape can tell.

Pure Python over a mapping `key -> shape`; no tensor is needed, so a file is recognised before its numbers are read. The family covers the
2021 release, its predecessor (improved-diffusion) and the consistency models, whose attention stores 1x1 Conv2d weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]

# Image size that the 2021 default multipliers belong to (level widths relative to num_channels).
SIZE_OF_MULTIPLIERS: dict[tuple[float, ...], int] = {
    (0.5, 1, 1, 2, 2, 4, 4): 512,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
}


class NotThisFamily(ValueError):
    """The keys are not those of a UNet or classifier of this family."""


@dataclass(frozen=True)
class Layout:
    """What shapes determine. Resolutions are relative: attention at `1/2`, `1/4` … of the image size.

    kind            "diffusion", "super_resolution" or "classifier"
    readings        every (kind, image channels, learned variance) that the channels allow, the likeliest first
    flags           2021 flags (and num_classes, image_channels) that the shapes fix
    attention_ds    downsampling factors with attention, as fractions of the image size
    attention_widths  channels of every attention block: head counts must divide them
    open            flags that shapes cannot tell, each with its candidates
    """

    kind: str
    flags: dict[str, object]
    multipliers: tuple[float, ...]
    attention_ds: tuple[int, ...]
    attention_widths: tuple[int, ...]
    open: dict[str, tuple[object, ...]] = field(default_factory=dict)
    readings: tuple[tuple[str, int, bool], ...] = ()


def normalise_keys(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Strip the prefixes that wrappers leave behind (DDP's `module.`, torch.compile's `_orig_mod.`); shapes as tuples."""
    out = {}
    for key, shape in shapes.items():
        while True:
            bare = re.sub(r"^(module|_orig_mod)\.", "", key)
            if bare == key:
                break
            key = bare
        out[key] = tuple(shape)
    return out


def squeezed_attention(shapes: Shapes) -> list[str]:
    """Keys of attention weights stored as 1x1 Conv2d `[O, I, 1, 1]`, which our Conv1d form `[O, I, 1]` reads after a squeeze."""
    pattern = re.compile(r"\.(qkv|proj_out)\.weight$")
    return [key for key, shape in shapes.items() if pattern.search(key) and len(shape) == 4 and shape[2:] == (1, 1)]


def inspect_shapes(shapes: Shapes) -> Layout:
    """Read the flags off a state dict's keys and shapes.

    Raises NotThisFamily (a ValueError) that names the first thing missing or unexpected.
    """
    shapes = normalise_keys(shapes)
    _require(shapes, "time_embed.0.weight", 2)
    _require(shapes, "input_blocks.0.0.weight", 4)
    _require(shapes, "middle_block.1.qkv.weight")
    width = shapes["time_embed.0.weight"][1]
    if any(key.startswith("output_blocks.") for key in shapes):
        return _generator(shapes, width)
    return _classifier(shapes, width)


def _require(shapes: Shapes, key: str, ndim: int | None = None) -> tuple[int, ...]:
    if key not in shapes:
        known = ", ".join(list(shapes)[:3])
        raise NotThisFamily(
            f"no tensor named {key!r} in this file (it begins with {known} …): not a network of this family"
        )
    if ndim is not None and len(shapes[key]) != ndim:
        raise NotThisFamily(
            f"{key!r} has shape {list(shapes[key])}; a network of this family has {ndim} dimensions there"
        )
    return shapes[key]


def _block_count(shapes: Shapes, stem: str) -> int:
    numbers = {int(m.group(1)) for key in shapes if (m := re.match(rf"{stem}\.(\d+)\.", key))}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(max(numbers))) - numbers) if numbers else 0
        raise NotThisFamily(f"{stem}.{missing} is missing: the file is incomplete or not of this family")
    return len(numbers)


def _levels(
    shapes: Shapes, width: int, depth: int, blocks: int
) -> tuple[tuple[float, ...], tuple[int, ...], list[int]]:
    """Multipliers by level, downsampling factors with attention, and attention widths, from the way down."""
    multipliers, attention, widths = [], [], []
    for level in range(blocks // (depth + 1)):
        first = 1 + level * (depth + 1)
        out_channels = _require(shapes, f"input_blocks.{first}.0.out_layers.3.weight", 4)[0]
        multiplier = out_channels / width
        multipliers.append(int(multiplier) if multiplier == int(multiplier) else multiplier)
        if f"input_blocks.{first}.1.qkv.weight" in shapes:
            attention.append(2**level)
            widths.append(out_channels)
    widths.append(_require(shapes, "middle_block.1.qkv.weight")[1])
    return tuple(multipliers), tuple(attention), widths


def _scale_shift(shapes: Shapes) -> bool:
    embedding = _require(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    channels = _require(shapes, "input_blocks.1.0.out_layers.3.weight", 4)[0]
    if embedding not in (channels, 2 * channels):
        raise NotThisFamily(f"input_blocks.1.0.emb_layers.1.weight gives {embedding} numbers for {channels} channels")
    return embedding == 2 * channels


def _head_candidates(widths: list[int]) -> tuple[object, ...]:
    """Flag pairs (num_heads, num_head_channels) that divide every attention width; -1 means `use num_heads`."""
    channels = [c for c in (16, 32, 64, 128) if all(w % c == 0 for w in widths)]
    heads = [h for h in (1, 2, 4, 8) if all(w % h == 0 for w in widths)]
    return (*(f"--num_head_channels {c}" for c in channels), *(f"--num_heads {h}" for h in heads))


def _generator(shapes: Shapes, width: int) -> Layout:
    blocks = _block_count(shapes, "input_blocks")
    if _block_count(shapes, "output_blocks") != blocks:
        raise NotThisFamily(
            f"{blocks} input blocks but {_block_count(shapes, 'output_blocks')} output blocks; they come in pairs"
        )
    # The last block of a level on the way up carries the upsampling: a Conv2d, or a second residual block.
    ups = sorted(
        {
            int(m.group(1))
            for k in shapes
            if (m := re.match(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight$", k))
        }
    )
    depth = ups[0] if ups else blocks - 1
    if depth < 1 or blocks % (depth + 1) or ups != [k * (depth + 1) - 1 for k in range(1, blocks // (depth + 1))]:
        raise NotThisFamily(f"upsampling after output blocks {ups} of {blocks}: not the regular levels of this family")
    resblock = any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight$", k) for k in shapes)
    multipliers, attention, widths = _levels(shapes, width, depth, blocks)
    channels_in = shapes["input_blocks.0.0.weight"][1]
    channels_out = _require(shapes, "out.2.weight", 4)[0]

    readings = []  # (kind, image channels, learn_sigma)
    for kind, image_channels in (("diffusion", channels_in), ("super_resolution", channels_in // 2)):
        if kind == "super_resolution" and channels_in % 2:
            continue
        readings += [
            (kind, image_channels, learned)
            for learned in (True, False)
            if channels_out == image_channels * (1 + learned)
        ]
    if not readings:
        raise NotThisFamily(
            f"{channels_in} input and {channels_out} output channels fit neither a generator nor an upsampler"
        )
    if channels_in in (2, 6):
        # Upsamplers of grey and RGB images; images of two or six channels are the rarer reading and stay in `readings`.
        readings.sort(key=lambda reading: reading[0] != "super_resolution")
    kind, image_channels, learn_sigma = readings[0]

    flags: dict[str, object] = {
        "num_channels": width,
        "num_res_blocks": depth,
        "use_scale_shift_norm": _scale_shift(shapes),
        "resblock_updown": resblock,
        "learn_sigma": learn_sigma,
        "class_cond": "label_emb.weight" in shapes,
        "image_channels": image_channels,
    }
    if "label_emb.weight" in shapes:
        flags["num_classes"] = shapes["label_emb.weight"][0]
    open_: dict[str, tuple[object, ...]] = {
        "heads": _head_candidates(widths),
        "use_new_attention_order": (False, True),
        "noise_schedule": ("linear", "cosine"),
        "rescale_timesteps": (False, True),
        "diffusion_steps": (1000, 4000),
    }
    if multipliers not in SIZE_OF_MULTIPLIERS:
        open_["image_size"] = (32, 64, 128, 256, 512)
    if kind == "super_resolution":
        open_["small_size"] = (64, 128)
    return Layout(kind, flags, multipliers, attention, tuple(widths), open_, tuple(readings))


def _classifier(shapes: Shapes, width: int) -> Layout:
    blocks = _block_count(shapes, "input_blocks")
    # A residual block changes no width when it halves the size, so the depth shows where widths or convolutions do.
    convolutions = [int(m.group(1)) for k in shapes if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight$", k))]
    if "out.2.positional_embedding" in shapes:
        pool, classes = "attention", _require(shapes, "out.2.c_proj.weight")[0]
    elif "out.3.weight" in shapes and len(shapes["out.3.weight"]) == 4:
        pool, classes = "adaptive", shapes["out.3.weight"][0]
    elif "out.3.weight" in shapes:
        pool, classes = "spatial_v2", shapes["out.3.weight"][0]
    elif "out.2.weight" in shapes:
        pool, classes = "spatial", shapes["out.2.weight"][0]
    else:
        raise NotThisFamily("no output head of this family's four classifier pools in the file")
    candidates = [
        depth
        for depth in range(1, blocks)
        if blocks % (depth + 1) == 0 and _depth_fits(shapes, depth, blocks, convolutions)
    ]
    if not candidates:
        raise NotThisFamily(f"{blocks} input blocks do not form the regular levels of this family")
    depth = candidates[0]
    for choice in candidates:  # the 2021 multipliers settle which of several regular readings it is
        if _levels(shapes, width, choice, blocks)[0] in SIZE_OF_MULTIPLIERS:
            depth, candidates = choice, [choice]
            break
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
    open_: dict[str, tuple[object, ...]] = {}
    if len(candidates) > 1:
        open_["classifier_depth"] = tuple(candidates)
    if pool == "attention":
        places = shapes["out.2.positional_embedding"][1] - 1
        side = round(places**0.5)
        if side * side != places:
            raise NotThisFamily(f"out.2.positional_embedding has {places} places, which is no square")
        flags["image_size"] = side * 2 ** (len(multipliers) - 1)
    elif multipliers in SIZE_OF_MULTIPLIERS:
        flags["image_size"] = SIZE_OF_MULTIPLIERS[multipliers]
    else:
        open_["image_size"] = (32, 64, 128, 256, 512)
    return Layout("classifier", flags, multipliers, attention, tuple(widths), open_)


def _depth_fits(shapes: Shapes, depth: int, blocks: int, convolutions: list[int]) -> bool:
    downs = [k * (depth + 1) for k in range(1, blocks // (depth + 1))]
    if convolutions:
        return convolutions == downs
    for block in range(1, blocks):
        stem = f"input_blocks.{block}"
        if f"{stem}.0.in_layers.2.weight" not in shapes:
            return False
        if block in downs:  # a halving block keeps its width and carries no attention
            wide = shapes[f"{stem}.0.in_layers.2.weight"]
            if wide[0] != wide[1] or f"{stem}.1.qkv.weight" in shapes:
                return False
        else:  # all blocks of a level agree in width and in attention
            first = 1 + (block - 1) // (depth + 1) * (depth + 1)
            same = (
                shapes[f"{stem}.0.out_layers.3.weight"][0] == shapes[f"input_blocks.{first}.0.out_layers.3.weight"][0]
            )
            if not same or (f"{stem}.1.qkv.weight" in shapes) != (f"input_blocks.{first}.1.qkv.weight" in shapes):
                return False
    return True
