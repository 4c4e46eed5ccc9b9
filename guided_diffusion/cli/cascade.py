"""`cascade`: noise -> small images -> large ones, in one command; both npz files stay."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import flag
from . import making, runs, sample, upsample


@dataclass(frozen=True)
class Cascade(making.Making):
    """Make small images from noise, then enlarge them, in one command."""

    out: str = flag("", "folder; the small images come into its base/, the large ones into its upsampled/")
    upsampler_path: str = flag("", "weights of the upsampler: a file or a run folder")
    upsampler_timestep_respacing: str = flag("", "steps of the upsampler; empty = as --timestep_respacing")
    upsampler_use_ddim: bool = flag(False, "enlarge with DDIM")
    upsampler_batch_size: int = flag(0, "large images per pass and process; 0 = as --batch_size")
    upsampler_classifier_path: str = flag("", "a classifier of the large size, to guide the upsampler as well")
    upsampler_classifier_scale: float = flag(0.0, "strength of that guidance; 0 = none, as in the paper")
    upsampler_flags: str = flag("", "further flags of the upsample command, as one quoted text")


# Flags of the first stage that hold for both.
_SHARED = ("num_samples", "batch_size", "seed", "precision", "clip_denoised", "timestep_respacing", "grid", "device")


def main(argv: Sequence[str] | None = None, program: str = "guided-diffusion cascade") -> int:
    """Make small images, then enlarge them; returns the exit code."""
    from ..runtime import storage

    options = Cascade.of(Cascade.flags(argv, program))
    for name, what in (("model_path", "the base model"), ("upsampler_path", "the upsampler")):
        if not getattr(options, name):
            raise ValueError(f"--{name} is empty; give the weights of {what}, or the folder of its run")
    second = _second(options)  # an impossible value is an error now, not after the first stage
    out, _ = runs.run_folder(options.out, "cascade")
    typed = {name: value for name, value in options.typed.items() if not name.startswith("upsampler_")}
    with making.session(options) as (world, stop):
        out = world.broadcast_object(out, name="folder of the cascade")
        npz = sample.make(replace(options, out=storage.join(out, "base"), typed=typed), world, stop)
        upsample.make(replace(second, out=storage.join(out, "upsampled"), base_samples=npz), world, stop)
    return 0


def _second(options: Cascade) -> upsample.Upsampling:
    """The second stage's flags: `--upsampler_flags` over `--upsampler_...` over those that both stages share."""
    words = shlex.split(options.upsampler_flags)
    if any(word.startswith("--import") for word in words):  # the value may be a file's, and no file may run a program
        raise ValueError("--upsampler_flags has --import; give it to cascade itself")
    given = {name: options.typed[name] for name in _SHARED if name in options.typed}
    given |= {
        "model_path": options.upsampler_path,
        "use_ddim": options.upsampler_use_ddim,
        "classifier_path": options.upsampler_classifier_path,
        "classifier_scale": options.upsampler_classifier_scale,
        "timestep_respacing": options.upsampler_timestep_respacing or given.get("timestep_respacing", ""),
        "batch_size": options.upsampler_batch_size or given.get("batch_size", ""),
        "num_samples": options.num_samples,
    }
    given = {name: value for name, value in given.items() if value != ""}
    program = "guided-diffusion cascade --upsampler_flags"
    return upsample.Upsampling.of(upsample.Upsampling.flags(words, program, given=given))
