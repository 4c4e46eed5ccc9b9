"""`cascade`: noise -> small images -> large ones, in one command; both npz files stay."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..config import ClassifierConfig, DiffusionConfig, ModelConfig, SampleConfig
from . import arguments, making, runs, sample, upsample

if TYPE_CHECKING:
    from ..runtime.world import World

EXTRA: dict[str, tuple[Any, str]] = {
    "out": ("", "folder; the small images come into its base/, the large ones into its upsampled/"),
    "upsampler_path": ("", "weights of the upsampler: a file or a run folder"),
    "upsampler_timestep_respacing": ("", "steps of the upsampler; empty = as --timestep_respacing"),
    "upsampler_use_ddim": (False, "enlarge with DDIM"),
    "upsampler_batch_size": (0, "large images per pass and process; 0 = as --batch_size"),
    "upsampler_classifier_path": ("", "a classifier of the large size, to guide the upsampler as well"),
    "upsampler_classifier_scale": (0.0, "strength of that guidance; 0 = none, as in the paper"),
    "upsampler_flags": ("", "further flags of the upsample command, as one quoted text"),
}
_CONFIGS = (SampleConfig, ModelConfig, DiffusionConfig, ClassifierConfig)
# Flags of the first stage that hold for both.
_SHARED = ("num_samples", "batch_size", "seed", "precision", "clip_denoised", "timestep_respacing", "grid", "device")


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion cascade`."""
    parsed = arguments.parse(argv, _CONFIGS, program="guided-diffusion cascade", description=__doc__ or "", extra=EXTRA)
    for name, what in (("model_path", "the base model"), ("upsampler_path", "the upsampler")):
        if not parsed.flags[name]:
            raise ValueError(f"--{name} is empty; give the weights of {what}, or the folder of its run")
    out, _ = runs.run_folder(parsed.flags["out"], "cascade")
    first = _first(parsed)
    second = upsample.flags(_words_of_second(parsed), program="guided-diffusion cascade --upsampler_flags")

    SampleConfig.from_flags(second.flags)  # an impossible value is told now, not after the first stage

    def work(world: World, stop: Any) -> None:
        from ..runtime import storage

        folder = world.broadcast_object(out, name="folder of the cascade")
        npz = sample.work(_into(first, storage.join(folder, "base")), world, stop)
        last = _into(second, storage.join(folder, "upsampled"))
        upsample.work(arguments.Parsed({**last.flags, "base_samples": npz}, last.typed), world, stop)

    return making.session(parsed, work)


def _first(parsed: arguments.Parsed) -> arguments.Parsed:
    """The first stage's flags: those of `sample`."""
    own = {f.name for config in _CONFIGS for f in fields(config)} | {"device", "debug"}
    flags = {name: value for name, value in parsed.flags.items() if name in own}
    typed = {name: value for name, value in parsed.typed.items() if name in own}
    return arguments.Parsed(flags, typed)


def _into(parsed: arguments.Parsed, out: str) -> arguments.Parsed:
    return arguments.Parsed({**parsed.flags, "out": out}, parsed.typed)


def _words_of_second(parsed: arguments.Parsed) -> list[str]:
    """The second stage's command line; what was typed for the upsampler wins over what both share."""
    told: dict[str, Any] = {name: parsed.flags[name] for name in _SHARED if name in parsed.typed}
    told["num_samples"] = parsed.flags["num_samples"]
    told |= {"model_path": parsed.flags["upsampler_path"], "use_ddim": parsed.flags["upsampler_use_ddim"]}
    told["classifier_scale"] = parsed.flags["upsampler_classifier_scale"]
    told["classifier_path"] = parsed.flags["upsampler_classifier_path"]
    if parsed.flags["upsampler_timestep_respacing"]:
        told["timestep_respacing"] = parsed.flags["upsampler_timestep_respacing"]
    if parsed.flags["upsampler_batch_size"]:
        told["batch_size"] = parsed.flags["upsampler_batch_size"]
    words = [f"--{name}={value}" for name, value in told.items() if value != ""]
    return [*words, *shlex.split(parsed.flags["upsampler_flags"])]
