"""`upsample`: small images -> large ones, by a model trained for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..config import SuperResConfig, flag
from . import making

if TYPE_CHECKING:
    from ..data.samples import Images
    from ..runtime.signals import Stop
    from ..runtime.world import World
    from ..sampling.jobs import LabelPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upsampling(making.Making):
    """Enlarge images."""

    network: ClassVar[type[SuperResConfig]] = SuperResConfig
    base_samples: str = flag("", "what is enlarged: an npz (arr_0 uint8 NHWC, arr_1 labels), or a folder of images")


def main(argv: Sequence[str] | None = None, program: str = "guided-diffusion upsample", *, script: bool = False) -> int:
    """Enlarge as the flags say; returns the exit code."""
    options = Upsampling.of(Upsampling.flags(argv, program, script=script))
    for name, what in (("model_path", "the weights of an upsampler"), ("base_samples", "the images to enlarge")):
        if not getattr(options, name):
            raise ValueError(f"--{name} is empty; give {what}")
    every = not script and "num_samples" not in options.typed  # the scripts of 2021 make 10000 images
    with making.session(options) as (world, stop):
        make(options, world, stop, every=every)
    return 0


def make(options: Upsampling, world: World, stop: Stop, *, every: bool = False) -> str:
    """Enlarge and return the path of the npz; `every` makes as many images as there are small ones. Called on every process."""
    from ..sampling.jobs import Request
    from ..sampling.pipeline import noise_seed

    setup = making.Setup.read(options, world)
    small_size = setup.model.small_size
    small = _open(options, setup)
    log.info("enlarging %d images of %s (%s)", len(small), options.base_samples, small.about)
    if every:
        setup = replace(setup, options=replace(options, num_samples=len(small)))
    seed = noise_seed(setup.model, options.seed)
    request = Request("", setup.options.num_samples, seed, _labels(options, setup, small), small.low_res)
    job = setup.job(request, "upsampled", base_samples=small.identity(), small_size=small_size)
    return setup.make(job, stop)


def _open(options: Upsampling, setup: making.Setup) -> Images:
    """The images to enlarge. ValueError if the model does not take them."""
    from ..data.samples import open_images
    from ..runtime import storage
    from ..sampling.jobs import class_names_beside

    path, model = options.base_samples, setup.model
    if not storage.exists(path):
        raise FileNotFoundError(f"--base_samples {path}: there is no such file or folder")
    try:
        labels = "auto" if setup.num_classes and not options.classes else "none"
        names = class_names_beside(path)
        return open_images(path, model.small_size, model.shape[0], labels=labels, class_names=names)
    except ValueError as error:
        raise ValueError(f"--base_samples {error}") from None


def _labels(options: Upsampling, setup: making.Setup, small: Images) -> LabelPlan:
    """The classes given, else those of the small images."""
    from ..sampling.jobs import LabelPlan

    if options.classes or not setup.num_classes:
        return setup.labels()
    if small.records.labels is None:
        raise ValueError(
            f"--base_samples {options.base_samples} has no labels (arr_1), and the networks want classes; "
            f"give --classes with one or more of 0 to {setup.num_classes - 1}"
        )
    try:
        labels, note = small.labels_for(setup.num_classes, setup.class_names, setup.model.path)
    except ValueError as error:
        raise ValueError(f"--base_samples {error}") from None
    if note:
        log.info(note)
    return LabelPlan.fixed(labels)
