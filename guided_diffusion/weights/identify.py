"""Which configuration a file without one has: from names and shapes of its tensors, the released models, and the user's flags.

What shapes fix is read off them (`recognise`). What they cannot tell (heads, attention order, schedule) comes from a
released model of exactly this layout or from the user; an assumption is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ..config import NETWORKS, DiffusionConfig, RunConfig, classes_of, flatten
from ..config.fields import numbers
from .recognise import OPEN, SIZE_OF_MULTIPLIERS, Layout, Shapes, inspect_shapes, signature
from .released import PRESETS, SIGNATURES, Preset

_log = logging.getLogger(__name__)

KINDS = {"diffusion": "a diffusion model", "super_resolution": "an upsampler", "classifier": "a classifier"}
# Flags that may differ from those of training: they change how a network is used, not what its weights mean.
FREE = {
    "timestep_respacing", "use_fp16", "classifier_use_fp16", "use_checkpoint", "dropout", "use_kl", "rescale_learned_sigmas",
}  # fmt: skip
# What no shape can tell about a denoising network, with both ways to give its heads.
_OPEN = ("num_heads", "num_head_channels", *OPEN)


def released_as(path: str, shapes: Shapes) -> tuple[Preset, bool] | None:
    """The released model of this layout, and whether the file's name says so too; None for any other layout."""
    names = SIGNATURES.get(signature(shapes))
    if not names:
        return None
    stem = PurePosixPath(path.replace("\\", "/")).stem
    return PRESETS[stem if stem in names else names[0]], stem in names


def require_kind(path: str, kind: str, needed: str | None) -> None:
    """ValueError, in words, where a file is of another kind than the one needed."""
    if needed not in (None, kind):
        raise ValueError(f"{path} is {KINDS[kind]}; {KINDS[needed]} is needed here")


def identify(
    path: str, shapes: Shapes, *, flags: Mapping[str, Any] | None = None, kind: str | None = None
) -> RunConfig:
    """The configuration of a file that carries none.

    `flags` are those the user typed, spelled as in 2021; `kind` is what is needed, None for any. Raises ValueError where the
    file is of another kind, where a typed flag contradicts it (a short difference and the flag line that works), or where
    something that shapes cannot tell was not typed (the candidates, and the flags to choose with).
    """
    flags = dict(flags or {})
    layout = inspect_shapes(shapes, kind=kind, image_channels=flags.get("image_channels"))
    kind, needed = layout.kind, kind
    require_kind(path, kind, needed)
    names = {*NETWORKS[kind].names(), *DiffusionConfig.names()}
    # A classifier's tensors say nothing of the noise that it was trained on.
    free = {*FREE, *(DiffusionConfig.names() if kind == "classifier" else ())}
    use = {name: value for name, value in flags.items() if name in names & free}
    typed = {name: value for name, value in flags.items() if name in names - free}
    known = flags_of(layout, flags)
    preset, named = released_as(path, shapes) or (None, False)
    if preset is not None and preset.kind != kind:
        preset, named = None, False

    # Name and layout are those of a released model: every flag must agree with it. Else only what shapes fix must be agreed with; if
    # the layout is that of a release but other flags differ, the file was trained with other settings.
    as_released = contradictions(RunConfig(preset.model, preset.diffusion), typed) if preset else {}
    wrong = as_released
    if not named:
        size = 2 ** (len(layout.multipliers) + 2)  # some size that every level can halve, for this comparison alone
        config = RunConfig.from_flags(kind, {"image_size": size, "large_size": size, "small_size": 1, **known})
        wrong = {name: each for name, each in contradictions(config, typed).items() if name in known}
    refuse(path, wrong, f"Its own flags are: {flag_line(preset.flags if preset else known)}")
    if preset is None or (as_released and not named):
        _check_choices(path, layout, known, typed)
        return RunConfig.from_flags(kind, {**typed, **use, **known})
    if not named:
        _log.warning(
            "%s has the names and shapes of the released %s and is taken for it, with its heads, attention order and schedule "
            "(%s). If it was trained with others, give them: %s",
            path,
            preset.file,
            flag_line({name: preset.flags[name] for name in _OPEN if name in preset.flags}),
            ", ".join(f"--{name}" for name in _OPEN),
        )
    return RunConfig.from_flags(kind, {**preset.flags, **use})


def flags_of(layout: Layout, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Every flag that the layout fixes, with the sizes of `flags`, or the image size that its multipliers belong to."""
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
    known[f"{prefix}channel_mult"] = ",".join(f"{m:g}" for m in layout.multipliers)
    return known


def refuse(path: str, wrong: Mapping[str, tuple[Any, str]], remedy: str = "") -> None:
    """ValueError, in words, where there are `contradictions` of the file."""
    if wrong:
        own = flag_line({name: value for name, (value, _) in wrong.items()})
        raise ValueError(
            f"{path} is another network than the flags say: {'; '.join(text for _, text in wrong.values())}. "
            f"{remedy or f'Leave these flags out, or give its own: {own}'}"
        )


def contradictions(config: RunConfig, flags: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """{flag: (value of the configuration, sentence)} of each typed flag that contradicts it. Another spelling of the same does not."""
    wrong = {}
    sections: tuple[Any, ...] = (config.model, config.diffusion)
    for values in sections:
        for name in (name for name in values.names() if name in flags and flags[name] != getattr(values, name)):
            typed = flags[name]
            # `predict` would override `predict_xstart`; --num_classes 0, as counted in the data, contradicts nothing.
            other = replace(values, **({"predict": ""} if name == "predict_xstart" else {}), **{name: typed})
            if _meaning(values, name) != _meaning(other, name) and (typed or name != "num_classes"):
                value = values.reading["predicts"] if name == "predict" else getattr(values, name)
                wrong[name] = value, _text(values, name, value, typed)
    return wrong


def _meaning(values: Any, name: str) -> Any:
    """What a flag's value says, the same for all its spellings."""
    if name.endswith("attention_resolutions"):  # sizes that the network never reaches change nothing
        return {2**level for level in range(len(values.multipliers))} & set(values.attention_downsamplings)
    if name.endswith("channel_mult"):
        return values.multipliers
    if name == "num_classes":
        return classes_of(values)
    if name in ("predict", "predict_xstart"):
        return values.reading["predicts"]
    if name in ("num_heads", "num_heads_upsample") and values.num_head_channels != -1:
        return None  # heads go by their channels
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
    """ValueError with the candidates where something that shapes leave open was not typed.

    Who typed any flag that shapes fix has typed a command line of 2021: what is missing in it has the defaults of 2021, and the log says
    so. Else nothing is assumed.
    """
    heads = "classifier_num_head_channels"
    if layout.kind == "classifier" and heads not in typed:
        _log.warning(
            f"{path}: taken to have 64 channels per attention head, as every classifier of 2021; --{heads} says otherwise"
        )
    missing = [choice for choice in layout.open if not any(flag in {**typed, **known} for flag, _ in choice)]
    if not missing:
        return
    if not any(name in layout.flags for name in typed if name not in ("num_classes", "image_channels")):
        lines = "\n  ".join(" | ".join(f"--{flag} {value}" for flag, value in choice) for choice in missing)
        raise ValueError(
            f"{path} carries no configuration, and names and shapes cannot tell everything about it. Known from them: "
            f"{flag_line(known)}\nChoose one of each line (or let `guided-diffusion inspect {path} "
            f"--probe FOLDER_OF_IMAGES` decide by the denoising loss):\n  {lines}"
        )
    values = flatten(RunConfig.from_flags(layout.kind, {**typed, **known}).to_dict())
    assumed = {flag: values[flag] for choice in missing for flag, _ in choice}
    _log.warning("%s: not typed and in no tensor's shape, so as by default in 2021: %s", path, flag_line(assumed))


def flag_line(flags: Mapping[str, Any]) -> str:
    """Flags as they are typed; what is empty or has no meaning on a command line is left out."""
    return " ".join(f"--{name} {value}" for name, value in flags.items() if value not in ("", None))
