"""Which configuration a file without one has: its tensors' names and shapes, the released models, and the user's flags.

What shapes fix is read off them; what they cannot tell (heads, attention order, schedule) comes from a released model of
exactly this layout or from the user. It is never guessed in silence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from .config import RunConfig
from .presets import PRESETS, Preset
from .recognise import SIZE_OF_MULTIPLIERS, Layout, Shapes, inspect_shapes, normalise_keys

Tell = Callable[[str], None]

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


def signature(shapes: Shapes) -> str:
    """A short name of the set of tensor names and shapes; a renamed key or a changed shape changes it."""
    lines = sorted(f"{name} {','.join(map(str, shape))}" for name, shape in normalise_keys(shapes).items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def released_as(path: str, shapes: Shapes) -> tuple[Preset, bool] | None:
    """The released model of this layout, and whether the file's name says so too; None for any other layout."""
    names = SIGNATURES.get(signature(shapes))
    if not names:
        return None
    stem = PurePosixPath(path.replace("\\", "/")).stem
    return PRESETS[stem if stem in names else names[0]], stem in names


def identify(path: str, shapes: Shapes, *, flags: Mapping[str, Any] | None = None, tell: Tell = print) -> RunConfig:
    """The configuration of a file that carries none.

    `flags` are those the user typed, spelled as in 2021. Raises ValueError: where
    a typed flag contradicts the file (a short difference and the flag line that works), or where something that shapes cannot tell
    was not typed (the candidates, and the flags to choose with).
    """
    flags = dict(flags or {})
    layout = inspect_shapes(shapes)
    layout = _read_as(layout, flags)
    chosen = layout.kind
    known = flags_of(layout, chosen, flags)
    release = released_as(path, shapes)
    preset = release[0] if release and release[0].kind == chosen else None
    complaints = differences(known, layout, flags, chosen)
    typed_open = _open_of(flags)
    own_open = _open_of(preset.model.to_dict() | preset.diffusion.to_dict()) if preset else {}
    if preset is not None and release is not None and release[1]:
        # A released file under its own name: what it was trained with is known, also what shapes cannot tell.
        complaints += [
            f"{preset.file} was released with {name} {own_open[name]}; you asked for {value}"
            for name, value in typed_open.items()
            if own_open.get(name, value) != value and not (name == "num_heads" and own_open["num_head_channels"] != -1)
        ]
    if complaints:
        line = flag_line({**known, **(_open_of(preset.flags) if preset else {})})
        raise ValueError(
            f"{path} is another network than the flags say: {'; '.join(complaints)}. Its own flags are: {line}"
        )
    if preset is not None and release is not None and release[1]:
        return RunConfig.from_flags(chosen, {**preset.flags, **_use(flags)})
    if preset is not None and all(own_open.get(name) == value for name, value in typed_open.items()):
        others = ", ".join(f"--{name}" for name in own_open if name not in typed_open)
        tell(
            f"{path} has the names and shapes of the released {preset.file} and is taken for it, with its heads, attention "
            f"order and schedule ({flag_line(_open_of(preset.flags))}). If it was trained with others, give them: {others}"
        )
        return RunConfig.from_flags(chosen, {**preset.flags, **_use(flags)})
    return RunConfig.from_flags(chosen, {**known, **_settle(path, layout, chosen, flags), **_use(flags)})


def _read_as(layout: Layout, flags: Mapping[str, Any]) -> Layout:
    """Six channels in and six out are an RGB upsampler, unless the user says that images have six channels."""
    asked = flags.get("image_channels")
    for kind, channels, learned in layout.readings:
        if channels == asked and (kind, channels) != (layout.kind, layout.flags["image_channels"]):
            known = {**layout.flags, "image_channels": channels, "learn_sigma": learned}
            return replace(layout, kind=kind, flags=known)
    return layout


# What no shape can tell about a generator.
_OPEN = (
    "num_heads",
    "num_head_channels",
    "use_new_attention_order",
    "noise_schedule",
    "rescale_timesteps",
    "diffusion_steps",
)


def _open_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: flags[name] for name in _OPEN if name in flags}


def _use(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Typed flags about the use of a network, which no file contradicts."""
    free = ("timestep_respacing", "use_fp16", "classifier_use_fp16", "use_checkpoint", "dropout", "use_kl")
    return {
        name: flags[name] for name in (*free, "rescale_learned_sigmas", "predict_xstart", "predict") if name in flags
    }


def flags_of(layout: Layout, kind: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Every flag that the layout fixes, given (or knowing from the multipliers) the image size."""
    known = dict(layout.flags)
    size_flag = "large_size" if kind == "super_resolution" else "image_size"
    size: Any = known.get("image_size") or flags.get(size_flag) or SIZE_OF_MULTIPLIERS.get(layout.multipliers)
    if kind == "super_resolution" and layout.multipliers == (1, 1, 2, 2, 4, 4) and layout.attention_ds == (16, 32):
        size = flags.get(size_flag, 512)  # the released 128 -> 512 upsampler has the levels of a 256 network
    prefix = "classifier_" if kind == "classifier" else ""
    if size:
        known[size_flag] = size
        known[f"{prefix}attention_resolutions"] = ",".join(str(size // ds) for ds in layout.attention_ds)
    if kind == "super_resolution" and "small_size" in flags:
        known["small_size"] = flags["small_size"]
    known[f"{prefix}channel_mult"] = ",".join(f"{m:g}" for m in layout.multipliers)
    return known


def differences(known: Mapping[str, Any], layout: Layout, flags: Mapping[str, Any], kind: str) -> list[str]:
    """In words, what the file has and the typed flags deny."""
    found = []
    if (
        flags.get("class_cond") is False
        and layout.flags.get("class_cond")
        or (flags.get("class_cond") is True and layout.flags.get("class_cond") is False)
    ):
        has = f"{layout.flags.get('num_classes')} classes" if layout.flags.get("class_cond") else "no classes"
        found.append(f"the file has {has}; you asked for --class_cond {flags['class_cond']}")
    for name, asked in flags.items():
        if name not in known or name in ("class_cond", "image_size", "large_size", "small_size"):
            continue
        if name == "num_classes" and not asked:
            continue
        has = known[name]
        if name.endswith("attention_resolutions"):
            if _pixels(asked) & _levels_of(known, layout) == _pixels(has):
                continue  # sizes that the network never reaches change nothing
            found.append(f"the file has attention at {_spaced(has)}; you asked for {_spaced(asked)}")
        elif name.endswith("channel_mult"):
            if str(asked).strip() and tuple(float(p) for p in str(asked).split(",")) != tuple(
                map(float, layout.multipliers)
            ):
                found.append(f"the file has channel multipliers {_spaced(has)}; you asked for {_spaced(asked)}")
        elif asked != has:
            found.append(f"the file has {name} {has}; you asked for {asked}")
    size = flags.get("image_size")
    if size and layout.flags.get("image_size") not in (None, size):
        found.append(f"the file is for image_size {layout.flags['image_size']}; you asked for {size}")
    return found


def _pixels(text: object) -> set[int]:
    return {int(float(part)) for part in str(text).split(",") if part.strip()}


def _levels_of(known: Mapping[str, Any], layout: Layout) -> set[int]:
    size = known.get("image_size") or known.get("large_size") or 0
    return {int(size) // 2**level for level in range(len(layout.multipliers))}


def _spaced(text: object) -> str:
    return ", ".join(part.strip() for part in str(text).split(",")) or "none"


def _settle(path: str, layout: Layout, kind: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Typed values of what shapes leave open; ValueError lists what is missing, with candidates.

    A user who typed any flag that shapes fix has typed a line of 2021, whose untyped flags have the defaults of 2021.
    """
    typed = {name: flags[name] for name in (*_OPEN, "image_size", "large_size", "small_size") if name in flags}
    if kind == "classifier":
        typed.update({name: flags[name] for name in ("classifier_num_head_channels",) if name in flags})
    whole_line = any(name in layout.flags for name in flags if name not in ("num_classes", "image_channels"))
    if whole_line:
        return typed
    missing = []
    for name, candidates in layout.open.items():
        size_flag = "large_size" if name == "image_size" and kind == "super_resolution" else name
        given = "num_heads" in flags or "num_head_channels" in flags if name == "heads" else size_flag in flags
        if name == "small_size" and kind != "super_resolution":
            continue
        if not given:
            options = candidates if name == "heads" else [f"--{size_flag} {value}" for value in candidates]
            missing.append(f"{' | '.join(map(str, options))}")
    if missing:
        lines = "\n  ".join(missing)
        raise ValueError(
            f"{path} carries no configuration, and names and shapes cannot tell everything about it. Known from them: "
            f"{flag_line(flags_of(layout, kind, flags))}\nChoose one of each line (or let `guided-diffusion inspect {path} "
            f"--probe FOLDER_OF_IMAGES` decide by the denoising loss):\n  {lines}"
        )
    return typed


def flag_line(flags: Mapping[str, Any]) -> str:
    """Flags as they are typed; what is empty or has no meaning on a command line is left out."""
    return " ".join(f"--{name} {value}" for name, value in flags.items() if value not in ("", None))


def files_like(preset: Preset) -> Iterable[str]:
    """Released files that no shape can tell from this one."""
    return next((names for names in SIGNATURES.values() if preset.name in names), (preset.name,))
