"""`upsample`: enlarge images by a super-resolution model; `cascade`: make small images from noise and enlarge them, in one command."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..config import flag
from ..runtime import storage
from . import making, runs, sample

if TYPE_CHECKING:
    from ..runtime.signals import Stop
    from ..runtime.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upsampling(making.Making):
    """Enlarge images."""

    kind: ClassVar[str] = "super_resolution"
    base_samples: str = flag("", "what is enlarged: an npz (arr_0 uint8 NHWC, arr_1 labels), or a folder of images")


def main(argv: Sequence[str], program: str, *, script: bool = False) -> int:
    """Enlarge as the flags say; returns the exit code."""
    options = Upsampling.of(Upsampling.flags(argv, program, script=script))
    options.require(model_path="the weights of an upsampler", base_samples="the images to enlarge")
    every = not script and "num_samples" not in options.typed  # scripts make 10000 as in 2021, repeating small images
    with making.session(options) as (world, stop):
        make(options, world, stop, every=every)
    return 0


def make(options: Upsampling, world: World, stop: Stop, *, every: bool = False) -> None:
    """Enlarge. every: one image of each small one, not `num_samples`. Called on every process."""
    from ..sampling.jobs import Request
    from ..sampling.pipeline import noise_seed

    setup = making.Setup.read(options, world)
    small, labels, _ = setup.images("base_samples", setup.model.small_size)
    log.info("enlarging %d images of %s (%s)", len(small), options.base_samples, small.about)
    if every:
        setup = replace(setup, options=replace(options, num_samples=len(small)))
    seed = noise_seed(setup.model, options.seed)
    request = Request("", setup.options.num_samples, seed, labels, small.low_res)
    receipt = {"base_samples": small.identity(), "small_size": setup.model.small_size}
    job = setup.job(request, "upsampled", **receipt)
    setup.make([job], job.out, stop)


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


# Flags of the first stage that apply to both stages.
_SHARED = (
    "num_samples batch_size seed precision clip_denoised timestep_respacing steps picture device compile cuda_graphs tf32 deterministic"
).split()


def cascade(argv: Sequence[str], program: str) -> int:
    """Make small images, then enlarge them; returns the exit code."""
    options = Cascade.of(Cascade.flags(argv, program))
    weights = "the weights of the {}, or the folder of its run"
    options.require(model_path=weights.format("base model"), upsampler_path=weights.format("upsampler"))
    second = _upsampling_options(options)  # raises ValueError now, not after the first stage
    out, _ = runs.run_folder(options.out, "cascade")

    from ..runtime.devices import float32_products

    typed = {name: value for name, value in options.typed.items() if not name.startswith("upsampler_")}
    with making.session(options) as (world, stop):
        out = world.broadcast_object(out, name="folder of the cascade")
        first = replace(options, out=storage.join(out, "base"), typed=typed)
        npz, _ = sample.make(making.Setup.read(first, world), stop)
        # --upsampler_flags may ask for other arithmetic.
        with float32_products(tf32=second.tf32, deterministic=second.deterministic):
            make(replace(second, out=storage.join(out, "upsampled"), base_samples=npz), world, stop)
    return 0


def _upsampling_options(options: Cascade) -> Upsampling:
    """The second stage's flags: `--upsampler_flags` win over `--upsampler_...`, those over flags that both stages share."""
    words = shlex.split(options.upsampler_flags)
    # --upsampler_flags may come from a --config file, and a configuration file must not be able to run a program.
    if any(word.startswith("--import") for word in words):
        raise ValueError("--upsampler_flags has --import; give it to cascade itself")
    own = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    # A second stage that says itself where its steps are does not share those of the first.
    left_out = making.WHERE if options.upsampler_timestep_respacing or own.intersection(making.WHERE) else ()
    flags = {name: value for name, value in options.typed.items() if name in _SHARED and name not in left_out}
    flags |= {
        "model_path": options.upsampler_path,
        "use_ddim": options.upsampler_use_ddim,
        "classifier_path": options.upsampler_classifier_path,
        "classifier_scale": options.upsampler_classifier_scale,
        "num_samples": options.num_samples,
    }
    for name in ("timestep_respacing", "batch_size"):
        flags[name] = getattr(options, f"upsampler_{name}") or flags.get(name, "")
    shared = [f"--{name}={value}" for name, value in flags.items() if value != ""]
    return Upsampling.of(Upsampling.flags([*shared, *words], "guided-diffusion cascade --upsampler_flags"))
