"""Which configuration a file without one has: from names and shapes of its tensors, the released models, and the user's flags.

What shapes fix is read off them (`recognise`). What they cannot tell (heads, attention order, schedule) comes from a
released model of exactly this layout or from the user; an assumption is logged.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ..config import DiffusionConfig, Network, RunConfig
from .recognise import SIZE_OF_MULTIPLIERS, Layout, Shapes, inspect_shapes, normalise_keys
from .released import PRESETS, Preset

_log = logging.getLogger(__name__)

# sha256 over the sorted "name shape" lines of each released file, first 16 digits. Files that share a layout share the digits.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "af57c12d0be8b4f4": ("64x64_diffusion",),
    "44eb5c6a285f9d17": ("128x128_diffusion",),
    "6d41483df3735902": ("256x256_diffusion",),
    "86f5708ebb91ab69": ("256x256_diffusion_uncond", "lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"),
    "90cfe02eac79fe24": ("512x512_diffusion",),
    "2171275097dc629a": ("64_256_upsampler",),
    "0379ba7ff3ffeb4f": ("128_512_upsampler",),
    "98f9cbaa7b28a2c4": ("64x64_classifier",),
    "b2e8e68f3386213b": ("128x128_classifier",),
    "3524443c57fd1ae5": ("256x256_classifier",),
    "04d1005b8a050740": ("512x512_classifier",),
}


KINDS = {"diffusion": "a diffusion model", "super_resolution": "an upsampler", "classifier": "a classifier"}
# Flags that may differ from those of training: they change how a network is used, not what its weights mean.
FREE = {
    "timestep_respacing", "use_fp16", "classifier_use_fp16", "use_checkpoint", "dropout", "use_kl", "rescale_learned_sigmas",
}  # fmt: skip
# What no shape can tell about a generator; how the output is read, which is nearly always the default; what sizes there are.
_OPEN = (
    "num_heads", "num_head_channels", "use_new_attention_order", "noise_schedule", "rescale_timesteps", "diffusion_steps",
)  # fmt: skip
_ASSUMED = ("num_heads_upsample", "predict", "predict_xstart", "sigma_small")
_SIZES = ("image_size", "large_size", "small_size")
_CLASSIFIER_HEADS = "classifier_num_head_channels"


def signature(shapes: Shapes) -> str:
    """A short name of the set of tensor names and shapes; a renamed tensor or a changed shape changes it."""
    lines = sorted(f"{name} {','.join(map(str, shape))}" for name, shape in normalise_keys(shapes).items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def released_as(path: str, shapes: Shapes) -> tuple[Preset, bool] | None:
    """The released model of this layout, and whether the file's name says so too; None for any other layout."""
    names = SIGNATURES.get(signature(shapes))
    if not names:
        return None
    stem = PurePosixPath(path.replace("\\", "/")).stem
    return PRESETS[stem if stem in names else names[0]], stem in names


def require_kind(path: str, found: str, wanted: str | None) -> None:
    """ValueError, in words, where a file is of another kind than the one needed."""
    if wanted is not None and found != wanted:
        raise ValueError(f"{path} is {KINDS[found]}; {KINDS[wanted]} is needed here")


def identify(
    path: str, shapes: Shapes, *, flags: Mapping[str, Any] | None = None, kind: str | None = None
) -> RunConfig:
    """The configuration of a file that carries none.

    `flags` are those the user typed, spelled as in 2021; `kind` is what is needed, None for any. Raises ValueError where the
    file is of another kind, where a typed flag contradicts it (a short difference and the flag line that works), or where
    something that shapes cannot tell was not typed (the candidates, and the flags to choose with).
    """
    flags = dict(flags or {})
    layout = _read_as(inspect_shapes(shapes), flags, kind)
    require_kind(path, layout.kind, kind)
    known = flags_of(layout, flags)
    preset, named = released_as(path, shapes) or (None, False)
    if preset is not None and preset.kind != layout.kind:
        preset, named = None, False

    # A classifier's tensors say nothing of the noise that it was trained on.
    free = {*FREE, *(DiffusionConfig.names() if layout.kind == "classifier" else ())}
    asked = {name: value for name, value in flags.items() if name not in free}
    as_released = _denied(preset.model, preset.diffusion, asked) if preset else {}
    # Of a file under its released name all is known, of another one what its shapes fix: to deny that is an error.
    if preset is not None and named:
        wrong, own = as_released, dict(preset.flags)
    else:
        found = RunConfig.from_flags(layout.kind, _with_sizes(known, layout.kind))
        denied = _denied(found.model, found.diffusion, asked)
        wrong = {name: words for name, words in denied.items() if name in known}
        own = {**known, **(_open_of(preset.flags) if preset else {})}
    if wrong:
        raise ValueError(
            f"{path} is another network than the flags say: {'; '.join(wrong.values())}. Its own flags are: {flag_line(own)}"
        )
    use = {name: value for name, value in flags.items() if name in free}
    if preset is None or (as_released and not named):  # the layout of a released model, perhaps, but another training
        return RunConfig.from_flags(layout.kind, {**known, **_settle(path, layout, known, flags), **use})
    if not named:
        _log.warning(
            "%s has the names and shapes of the released %s and is taken for it, with its heads, attention order and schedule "
            "(%s). If it was trained with others, give them: %s",
            path, preset.file, flag_line(_open_of(preset.flags)), ", ".join(f"--{name}" for name in _OPEN),
        )  # fmt: skip
    return RunConfig.from_flags(layout.kind, {**preset.flags, **use})


def _denied(model: Network, diffusion: DiffusionConfig, asked: Mapping[str, Any]) -> dict[str, str]:
    return contradictions(model, asked) | contradictions(diffusion, asked)


def _read_as(layout: Layout, flags: Mapping[str, Any], kind: str | None) -> Layout:
    """Of the readings that the channels allow, the one that the user's number of image channels fixes, else the likeliest."""
    asked = flags.get("image_channels")
    for reading, channels, learned in layout.readings:
        if channels == asked and kind in (None, reading):
            known = {**layout.flags, "image_channels": channels, "learn_sigma": learned}
            return replace(layout, kind=reading, flags=known)
    return layout


def _open_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: flags[name] for name in _OPEN if name in flags}


def flags_of(layout: Layout, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Every flag that the layout fixes, given (or knowing from the multipliers) the image size."""
    known = dict(layout.flags)
    upsampler, prefix = layout.kind == "super_resolution", "classifier_" if layout.kind == "classifier" else ""
    size_flag = "large_size" if upsampler else "image_size"
    size: Any = known.get("image_size") or flags.get(size_flag) or SIZE_OF_MULTIPLIERS.get(layout.multipliers)
    if upsampler and layout.multipliers == (1, 1, 2, 2, 4, 4) and layout.attention_ds == (16, 32):
        size = flags.get(size_flag, 512)  # the released 128 -> 512 upsampler has the levels of a 256 network
    if size:
        known[size_flag] = size
        known[f"{prefix}attention_resolutions"] = ",".join(str(size // ds) for ds in layout.attention_ds)
    if upsampler and "small_size" in flags:
        known["small_size"] = flags["small_size"]
    known[f"{prefix}channel_mult"] = ",".join(f"{m:g}" for m in layout.multipliers)
    return known


def _with_sizes(known: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """`known` with sizes that its levels allow, where none is known."""
    prefix = "classifier_" if kind == "classifier" else ""
    any_size = 2 ** (str(known[f"{prefix}channel_mult"]).count(",") + 3)
    return {"image_size": any_size, "large_size": any_size, "small_size": 1, **known}


def contradictions(values: Network | DiffusionConfig, flags: Mapping[str, Any]) -> dict[str, str]:
    """By flag, in words: what the file has and the typed flags deny. Other spellings of the same network are none."""
    return {
        name: _in_words(values, name, flags[name])
        for name in values.names()
        if name in flags and flags[name] != getattr(values, name) and not _same(values, name, flags[name])
    }


def _same(values: Any, name: str, asked: Any) -> bool:
    """Whether the flag, though spelled otherwise, asks for what is there."""
    if name.endswith("attention_resolutions"):  # sizes that the network never reaches change nothing
        reached = {2**level for level in range(len(values.multipliers))}
        other = replace(values, **{name: asked})
        return bool(reached & set(other.attention_downsamplings) == reached & set(values.attention_downsamplings))
    if name.endswith("channel_mult"):
        return bool(replace(values, **{name: asked}).multipliers == values.multipliers)
    if name == "num_classes":
        return not asked or not getattr(values, "class_cond", True)
    if name in ("predict", "predict_xstart"):
        wanted = asked or "eps" if name == "predict" else "x0" if asked else "eps"
        return bool(wanted == values.reading["predicts"])
    if name == "num_heads_upsample":
        return values.num_head_channels != -1 or {asked, values.num_heads_upsample} == {-1, values.num_heads}
    return name == "num_heads" and values.num_head_channels != -1


def value_of(values: Any, name: str) -> Any:
    """A flag's value, where an empty one says something too."""
    return values.reading["predicts"] if name == "predict" else getattr(values, name)


def _in_words(values: Any, name: str, asked: Any) -> str:
    has = value_of(values, name)
    if name == "class_cond":
        has = f"{values.num_classes} classes" if has else "no classes"
        return f"the file has {has}; you asked for --class_cond {asked}"
    if name.endswith("attention_resolutions"):
        return f"the file has attention at {_spaced(has)}; you asked for {_spaced(asked)}"
    if name.endswith("channel_mult"):
        has = ", ".join(f"{m:g}" for m in values.multipliers)
        return f"the file has channel multipliers {has}; you asked for {_spaced(asked)}"
    return f"the file has {name} {has}; you asked for {asked}"


def _spaced(text: object) -> str:
    return ", ".join(part.strip() for part in str(text).split(",") if part.strip()) or "none"


def _settle(path: str, layout: Layout, known: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Typed values of what shapes leave open; ValueError lists what is missing, with candidates.

    A user who typed any flag that shapes fix has typed a line of 2021, whose untyped flags have the defaults of 2021; the log
    says which.
    """
    settled = {name: flags[name] for name in (*_OPEN, *_ASSUMED, *_SIZES, _CLASSIFIER_HEADS) if name in flags}
    if layout.kind == "classifier" and _CLASSIFIER_HEADS not in flags:
        _log.warning(
            "%s: taken to have 64 channels per attention head, as every classifier of 2021; --%s says otherwise",
            path, _CLASSIFIER_HEADS,
        )  # fmt: skip
    missing: dict[tuple[str, ...], str] = {}
    for name, candidates in layout.open.items():
        if name == "heads":
            names: tuple[str, ...] = ("num_heads", "num_head_channels")
        else:
            names = ("large_size" if name == "image_size" and layout.kind == "super_resolution" else name,)
            candidates = tuple(f"--{names[0]} {value}" for value in candidates)
        if not any(flag in flags or flag in known for flag in names):
            missing[names] = " | ".join(map(str, candidates))
    if not missing:
        return settled
    if not any(name in layout.flags for name in flags if name not in ("num_classes", "image_channels")):
        lines = "\n  ".join(missing.values())
        raise ValueError(
            f"{path} carries no configuration, and names and shapes cannot tell everything about it. Known from them: "
            f"{flag_line(known)}\nChoose one of each line (or let `guided-diffusion inspect {path} "
            f"--probe FOLDER_OF_IMAGES` decide by the denoising loss):\n  {lines}"
        )
    config = RunConfig.from_flags(layout.kind, {**known, **settled})
    values = {**config.model.to_dict(), **config.diffusion.to_dict()}
    assumed = {flag: values[flag] for names in missing for flag in names if flag in values}
    _log.warning("%s: not typed and in no tensor's shape, so as by default in 2021: %s", path, flag_line(assumed))
    return settled


def flag_line(flags: Mapping[str, Any]) -> str:
    """Flags as they are typed; what is empty or has no meaning on a command line is left out."""
    return " ".join(f"--{name} {value}" for name, value in flags.items() if value not in ("", None))
