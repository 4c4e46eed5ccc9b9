"""`cascade`: noise -> small images -> large ones, in one command; both npz files stay."""

from __future__ import annotations

import json
import os
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
    first = _first(parsed, out)
    second = upsample.flags(_words_of_second(parsed, out), program="guided-diffusion cascade --upsampler_flags")

    def work(world: World, stop: Any) -> None:
        folder = world.broadcast_object(out, name="folder of the cascade")
        npz = _finished(first, folder, world)
        if npz is None:
            npz = sample.work(_into(first, os.path.join(folder, "base")), world, stop)
        else:
            making.teller(world)(f"the small images are there already: {npz}")
        last = _into(second, os.path.join(folder, "upsampled"))
        upsample.work(arguments.Parsed({**last.flags, "base_samples": npz}, last.typed), world, stop)

    return making.session(parsed, work)


def _first(parsed: arguments.Parsed, out: str) -> arguments.Parsed:
    """The first stage's flags: those of `sample`."""
    own = {f.name for config in _CONFIGS for f in fields(config)} | {"device", "debug"}
    flags = {name: value for name, value in parsed.flags.items() if name in own}
    typed = {name: value for name, value in parsed.typed.items() if name in own}
    return arguments.Parsed({**flags, "out": os.path.join(out, "base")}, typed)


def _into(parsed: arguments.Parsed, out: str) -> arguments.Parsed:
    return arguments.Parsed({**parsed.flags, "out": out}, parsed.typed)


def _words_of_second(parsed: arguments.Parsed, out: str) -> list[str]:
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


def _finished(first: arguments.Parsed, folder: str, world: World) -> str | None:
    """The npz of the first stage where it is complete and was made with these flags, so that it is not made again."""
    from ..runtime import storage

    def look() -> str | None:
        path = storage.join(folder, "base", _NOTE)
        if not storage.exists(path):
            storage.makedirs(storage.join(folder, "base"))
            storage.write_text_atomic(path, _note(first))
            return None
        if storage.read_bytes(path).decode() != _note(first):
            raise ValueError(
                f"{folder} holds a cascade with other flags of the base model; give another --out, or remove the folder"
            )
        receipt = storage.join(folder, "base", "sampling.json")
        if not storage.exists(receipt):
            return None
        npz = json.loads(storage.read_bytes(receipt)).get("file", "")
        return npz if npz and storage.exists(npz) else None

    found: dict[str, Any] | None = None
    if world.is_main:
        try:
            found = {"npz": look()}
        except ValueError as error:
            found = {"error": str(error)}
    found = world.broadcast_object(found, name="what is there of the cascade")
    assert found is not None
    if "error" in found:
        raise ValueError(found["error"])
    npz: str | None = found["npz"]
    return npz


_NOTE = "cascade.json"


def _note(first: arguments.Parsed) -> str:
    same = {name: value for name, value in first.flags.items() if name not in ("out", "device", "debug", "batch_size")}
    return json.dumps(same, indent=1, sort_keys=True) + "\n"
