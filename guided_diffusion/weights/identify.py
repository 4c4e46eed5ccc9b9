"""The configuration of a file that stores none: from names and shapes of its tensors, the released models, and the user's flags.

`recognise` reads off what shapes fix. What they cannot tell (heads, attention order, schedule) comes from the flags, or from the
released model of exactly this layout; an assumption is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ..config import NETWORKS, DiffusionConfig, RunConfig, classes_of, flatten
from ..config.fields import numbers
from ..config.networks import CLASSES_OF_2021
from .recognise import OPEN, SIZE_OF_MULTIPLIERS, Layout, Shapes, inspect_shapes, signature
from .released import PRESETS, SIGNATURES, Preset

_log = logging.getLogger(__name__)

KINDS = {"diffusion": "a diffusion model", "super_resolution": "an upsampler", "classifier": "a classifier"}
# Flags that may differ from those of training: they change how a network is used, not what its weights mean.
FREE = {
    "timestep_respacing", "use_fp16", "classifier_use_fp16", "use_checkpoint", "dropout", "use_kl", "rescale_learned_sigmas",
}  # fmt: skip
# What no shape can tell about a denoising network; the heads may be given by either of two flags.
_OPEN = ("num_heads", "num_head_channels", *OPEN)


def released_as(path: str, shapes: Shapes) -> tuple[Preset, bool] | None:
    """(the released model of this layout, whether the file has its name too); None for any other layout."""
    names = SIGNATURES.get(signature(shapes))
    if not names:
        return None
    stem = PurePosixPath(path.replace("\\", "/")).stem
    return PRESETS[stem if stem in names else names[0]], stem in names


def require_kind(path: str, kind: str, needed: str | None) -> None:
    """ValueError if a file is of another kind than the `needed` one (None: any)."""
    if needed not in (None, kind):
        raise ValueError(f"{path} is {KINDS[kind]}; {KINDS[needed]} is needed here")


def identify(
    path: str, shapes: Shapes, *, flags: Mapping[str, Any] | None = None, kind: str | None = None
) -> RunConfig:
    """The configuration of a file that stores none.

    `flags` are those the user typed, spelled as in 2021; `kind` is what is needed, None for any. Raises ValueError where the
    file is of another kind, where a typed flag contradicts it (the message has the differences and flags that work), or where
    something that shapes cannot tell was not typed (the message has the candidates, as flags).
    """
    flags = dict(flags or {})
    layout = inspect_shapes(shapes, kind=kind, image_channels=flags.get("image_channels"))
    kind, needed = layout.kind, kind
    require_kind(path, kind, needed)
    names = {*NETWORKS[kind].names(), *DiffusionConfig.names()}
    # A classifier's tensors say nothing about its noise process, so those flags cannot contradict them.
    unchecked = {*FREE, *(DiffusionConfig.names() if kind == "classifier" else ())}
    usage = {name: value for name, value in flags.items() if name in names & unchecked}
    typed = {name: value for name, value in flags.items() if name in names - unchecked}
    known = flags_of(layout, flags, path)
    preset, name_agrees = released_as(path, shapes) or (None, False)
    if preset is not None and preset.kind != kind:
        preset, name_agrees = None, False

    # If name and layout are those of a released model, every typed flag must agree with it. Else typed flags must agree with what shapes
    # fix; if the layout is a released one and others of them differ, the file was trained with other settings.
    released_differs = contradictions(RunConfig(preset.model, preset.diffusion), typed) if preset else {}
    wrong = released_differs
    if not name_agrees:
        size = 2 ** (len(layout.multipliers) + 2)  # some size that every level can halve, for this comparison alone
        config = RunConfig.from_flags(kind, {"image_size": size, "large_size": size, "small_size": 1, **known})
        wrong = {name: each for name, each in contradictions(config, typed).items() if name in known}
    refuse(path, wrong, f"Its own flags are: {flag_line(preset.flags if preset else known)}")
    if preset is None or (released_differs and not name_agrees):
        _check_choices(path, layout, known, typed)
        return RunConfig.from_flags(kind, {**typed, **usage, **known})
    if not name_agrees:
        _log.warning(
            "%s has the names and shapes of the released %s and is taken for it, with its heads, attention order and schedule "
            "(%s). If it was trained with others, give them: %s",
            path,
            preset.file,
            flag_line({name: preset.flags[name] for name in _OPEN if name in preset.flags}),
            ", ".join(f"--{name}" for name in _OPEN),
        )
    return RunConfig.from_flags(kind, {**preset.flags, **usage})


def flags_of(layout: Layout, flags: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Every flag that the layout fixes, with the image sizes in `flags`, or else the image size that has these multipliers by default.

    `null_row` in `flags` says what the last row of the label embedding is; ValueError if it is missing where a file may well have one.
    """
    known, upsampler = dict(layout.flags), layout.kind == "super_resolution"
    prefix, size_flag = "classifier_" * (layout.kind == "classifier"), "large_size" if upsampler else "image_size"
    size: Any = known.get("image_size") or flags.get(size_flag) or SIZE_OF_MULTIPLIERS.get(layout.multipliers)
    if upsampler:
        if layout.multipliers == (1, 1, 2, 2, 4, 4) and layout.attention_ds == (16, 32):
            size = flags.get("large_size", 512)  # the released 128 -> 512 upsampler has the levels of a 256 network
        if "small_size" in flags:
            known["small_size"] = flags["small_size"]
    if size:
        known[size_flag] = size
        known[f"{prefix}attention_resolutions"] = ",".join(str(size // ds) for ds in layout.attention_ds)
    if known.get("class_cond"):
        rows: Any = known["num_classes"]
        if rows == CLASSES_OF_2021 + 1 and "null_row" not in flags and flags.get("num_classes") != rows:
            raise ValueError(
                f"the label embedding of {path} has {rows} rows: {rows} classes, or {rows - 1} classes and a row for images without "
                "a class? Nothing in the file tells. Give --null_row False for the former, --null_row True for the latter"
            )
        if flags.get("null_row"):
            known |= {"num_classes": rows - 1, "null_row": True}
    known[f"{prefix}channel_mult"] = ",".join(f"{m:g}" for m in layout.multipliers)
    return known


def refuse(path: str, wrong: Mapping[str, tuple[Any, str]], remedy: str = "") -> None:
    """ValueError that lists the `contradictions` between a file and the flags, if there are any."""
    if wrong:
        own = flag_line({name: value for name, (value, _) in wrong.items()})
        raise ValueError(
            f"{path} is another network than the flags say: {'; '.join(text for _, text in wrong.values())}. "
            f"{remedy or f'Leave these flags out, or give its own: {own}'}"
        )


def contradictions(config: RunConfig, flags: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """{flag: (value in `config`, message)} of each of `flags` that contradicts `config`; another spelling of the same value does not."""
    wrong = {}
    sections: tuple[Any, ...] = (config.model, config.diffusion)
    for values in sections:
        for name in (name for name in values.names() if name in flags and flags[name] != getattr(values, name)):
            typed = flags[name]
            # `predict` would override `predict_xstart`. --num_classes 0 means that the data decide, and contradicts nothing.
            other = replace(values, **({"predict": ""} if name == "predict_xstart" else {}), **{name: typed})
            if _meaning(values, name) != _meaning(other, name) and (typed or name != "num_classes"):
                value = values.reading["predicts"] if name == "predict" else getattr(values, name)
                wrong[name] = value, _text(values, name, value, typed)
    return wrong


def _meaning(values: Any, name: str) -> Any:
    """The value of a flag in a form that is equal for all its spellings."""
    if name.endswith("attention_resolutions"):  # resolutions that the network never reaches have no effect
        return {2**level for level in range(len(values.multipliers))} & set(values.attention_downsamplings)
    if name.endswith("channel_mult"):
        return values.multipliers
    if name == "num_classes":
        return classes_of(values)
    if name in ("predict", "predict_xstart"):
        return values.reading["predicts"]
    if name in ("num_heads", "num_heads_upsample") and values.num_head_channels != -1:
        return None  # num_head_channels decides the heads
    if name == "num_heads_upsample" and values.num_heads_upsample == -1:
        return values.num_heads
    return getattr(values, name)


def _text(values: Any, name: str, has: Any, typed: Any) -> str:
    if name == "class_cond":
        has = f"{values.num_classes} classes" if has else "no classes"
        return f"the file has {has}; you asked for --class_cond {typed}"
    if name.endswith("attention_resolutions"):
        return f"the file has attention at {_listed(has)}; you asked for {_listed(typed)}"
    if name.endswith("channel_mult"):
        return f"the file has channel multipliers {_listed(values.multipliers)}; you asked for {_listed(typed)}"
    return f"the file has {name} {has}; you asked for {typed}"


def _listed(text: Any) -> str:
    return ", ".join(map(str, numbers(text, ""))) or "none"


def _check_choices(path: str, layout: Layout, known: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """ValueError with the candidates if a flag is missing that shapes leave open.

    If the user typed any flag that shapes fix, the flags are taken for a command line of 2021: missing ones have the defaults of 2021,
    and a warning lists them. Otherwise nothing is assumed.
    """
    heads = "classifier_num_head_channels"
    if layout.kind == "classifier" and heads not in typed:
        _log.warning(
            f"{path}: taken to have 64 channels per attention head, as every classifier of 2021; --{heads} says otherwise"
        )
    missing = [options for options in layout.open if not any(flag in {**typed, **known} for flag, _ in options)]
    if not missing:
        return
    if not any(name in layout.flags for name in typed if name not in ("num_classes", "image_channels")):
        lines = "\n  ".join(" | ".join(f"--{flag} {value}" for flag, value in options) for options in missing)
        raise ValueError(
            f"{path} carries no configuration, and names and shapes cannot tell everything about it. Known from them: "
            f"{flag_line(known)}\nChoose one of each line (or let `guided-diffusion inspect {path} "
            f"--probe FOLDER_OF_IMAGES` decide by the denoising loss):\n  {lines}"
        )
    values = flatten(RunConfig.from_flags(layout.kind, {**typed, **known}).to_dict())
    assumed = {flag: values[flag] for options in missing for flag, _ in options}
    _log.warning("%s: not typed and in no tensor's shape, so as by default in 2021: %s", path, flag_line(assumed))


def flag_line(flags: Mapping[str, Any]) -> str:
    """Flags as typed on a command line; those that are empty or None are left out."""
    return " ".join(f"--{name} {value}" for name, value in flags.items() if value not in ("", None))
