"""`nll`: the variational bound of images in bits per dimension, with its standard error and its terms."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import DataConfig, DiffusionConfig, LikelihoodConfig, ModelConfig
from . import arguments, runs

if TYPE_CHECKING:
    from ..runtime.world import World

log = logging.getLogger(__name__)


def main(argv: Sequence[str], program: str, *, script: bool = False) -> int:
    """Measure as the flags say; returns the exit code."""
    parsed = arguments.parse(
        argv,
        (LikelihoodConfig, ModelConfig, DiffusionConfig, DataConfig),
        program=program,
        description="Measure the bits per dimension of images.",
        defaults={"out": runs.script_folder()} if script else {},
        groups=arguments.MEASURING,
    )
    config = LikelihoodConfig.from_flags(parsed.flags)
    for name in ("random_crop", "random_flip", "val_data_dir", "val_fraction"):
        if parsed.typed.get(name):
            raise ValueError(
                f"--{name} is {parsed.typed[name]!r}, which is for training; images are measured once each, cropped at the centre "
                f"and not mirrored: leave --{name} out"
            )
    data = DataConfig.from_flags({**parsed.flags, "random_flip": False, "random_crop": False})
    if not config.model_path or not data.data_dir:
        name = "data_dir" if config.model_path else "model_path"
        raise ValueError(f"--{name} is empty; give --model_path WEIGHTS and --data_dir FOLDER_OF_IMAGES")
    of_network = (*ModelConfig.names(), *DiffusionConfig.names())
    typed = {name: parsed.typed[name] for name in of_network if name in parsed.typed}
    with runs.session(parsed.flags["device"], debug=parsed.flags["debug"], tf32=config.tf32) as world:
        _measure(config, data, typed, world)
    return 0


def _measure(config: LikelihoodConfig, data: DataConfig, typed: dict[str, Any], world: World) -> None:
    """Measure the bound on images chosen by the seed, and write it. typed: the flags of network and noise process that were given."""
    from ..data.classes import renumber
    from ..data.listing import list_records
    from ..sampling import bounds
    from ..weights.load import load

    options = {"precision": config.precision, "weights": config.weights}
    model = load(config.model_path, kind="diffusion", flags=typed, device=world.device, **options)
    records = list_records(data.data_dir, labels=data.labels if model.num_classes else "none")
    if model.num_classes:
        records, note = renumber(records, model.class_names, model.num_classes, model.path)
        records.require_labels()
        if note:
            log.info(note)
    count = min(config.num_samples, len(records))
    if count < config.num_samples:
        log.info(f"--num_samples is {config.num_samples}, but {data.data_dir} has {count} images: each is used once")
    folder, chosen = world.broadcast_object(runs.run_folder(config.out, "nll"), name="folder of results")
    log.info(f"{count} images, {len(model.process)} steps each, into {folder} ({chosen})")
    how: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "clip": config.clip_denoised}
    bound = bounds.measure(model, records, count, world=world, workers=data.workers, on_error=data.on_error, **how)
    if world.is_main:
        flags = {**config.to_dict(), **data.to_dict(), **typed}
        del flags["out"]  # the same measurement again goes into another folder
        bounds.write(folder, bound, flags)
        log.info(bounds.summary(bound))
