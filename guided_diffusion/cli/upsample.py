"""`upsample`: small images -> large ones, by a model trained for it. Also the command that trains one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import SuperResConfig, flag
from . import arguments, making, runs

if TYPE_CHECKING:
    from ..data.samples import Images
    from ..runtime.signals import Stop
    from ..runtime.world import World
    from ..sampling.jobs import LabelPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upsampling(making.Making):
    """Enlarge images."""

    base_samples: str = flag("", "what is enlarged: an npz (arr_0 uint8 NHWC, arr_1 labels), or a folder of images")


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion upsample`."""
    return run(argv, program="guided-diffusion upsample")


def main_train(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion train-upsampler`."""
    from . import train

    return train.run(argv, "super_resolution", program="guided-diffusion train-upsampler")


def super_res_sample(argv: Sequence[str] | None = None) -> int:
    """`scripts/super_res_sample.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, program="super_res_sample.py", script=True), argv)


def flags(argv: Sequence[str] | None, *, program: str, script: bool = False, **options: Any) -> arguments.Parsed:
    """The flags of an upsampling command. Options as `making.flags`."""
    return making.flags(argv, Upsampling, SuperResConfig, program=program, script=script, **options)


def run(argv: Sequence[str] | None, *, program: str, script: bool = False) -> int:
    """Enlarge as the flags say; returns the exit code."""
    asked = Upsampling.of(flags(argv, program=program, script=script))
    for name, what in (("model_path", "the weights of an upsampler"), ("base_samples", "the images to enlarge")):
        if not getattr(asked, name):
            raise ValueError(f"--{name} is empty; give {what}")
    every = not script and "num_samples" not in asked.typed  # the scripts of 2021 make 10000 images
    return making.in_session(asked, lambda world, stop: make(asked, world, stop, every=every))


def make(asked: Upsampling, world: World, stop: Stop, *, every: bool = False) -> str:
    """Enlarge and return the path of the npz; `every` makes as many images as there are small ones. Called on every process."""
    from ..sampling.jobs import Request
    from ..sampling.pipeline import noise_seed

    networks = making.read_networks(asked, "super_resolution", world)
    small_size = networks.model.small_size
    small = _open(asked, networks)
    log.info("enlarging %d images of %s (%s)", len(small), asked.base_samples, small.about)
    asked = replace(asked, num_samples=len(small)) if every else asked
    seed = noise_seed(networks.model, asked.seed)
    request = Request("", asked.num_samples, seed, _labels(asked, networks, small), small.low_res)
    job, chosen = making.job_of(asked, networks, request, world, "upsampled")
    job = replace(job, receipt={**job.receipt, "base_samples": small.identity, "small_size": small_size})
    return making.make(asked, networks, job, chosen, world, stop)


def _open(asked: Upsampling, networks: making.Networks) -> Images:
    """The images to enlarge. ValueError if the model does not take them."""
    from ..data.samples import open_folder, open_samples
    from ..runtime import storage
    from ..sampling.jobs import class_names_beside

    path, model = asked.base_samples, networks.model
    if not storage.exists(path):
        raise FileNotFoundError(f"--base_samples {path}: there is no such file or folder")
    try:
        if storage.isdir(path):
            wanted = "auto" if networks.num_classes and not asked.classes else "none"
            return open_folder(path, model.small_size, model.shape[0], labels=wanted)
        return open_samples(path, model.small_size, model.shape[0], class_names_beside(path))
    except ValueError as error:
        raise ValueError(f"--base_samples {error}") from None


def _labels(asked: Upsampling, networks: making.Networks, small: Images) -> LabelPlan:
    """The classes given, else those of the small images."""
    from ..sampling.jobs import LabelPlan

    if asked.classes or not networks.num_classes:
        return making.label_plan(asked, networks)
    if small.labels is None:
        raise ValueError(
            f"--base_samples {small.path} has no labels (arr_1), and the networks want classes; "
            f"give --classes with one or more of 0 to {networks.num_classes - 1}"
        )
    try:
        labels, note = small.labels_for(networks.num_classes, networks.class_names, networks.model.path)
    except ValueError as error:
        raise ValueError(f"--base_samples {error}") from None
    if note:
        log.info(note)
    return LabelPlan.fixed(labels)
