"""Which configuration a training run goes on with: that of its own save, of the file it starts from, and of the flags given now."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config import UNET, RunConfig, changed, flatten, laid_over
from ..runtime import storage
from ..runtime.world import World
from .finetuning import Origin, origin
from .identify import FREE
from .load import agree
from .runs import SavedRun, find_latest

# What may differ between two starts of one command: how far it goes, on how many processes.
_NOT_COMPARED = ("resume_checkpoint", "max_steps", "global_batch_size")
_log = logging.getLogger(__name__)


def started_from(
    saved: SavedRun | None, folder: str, kind: str, flags: Mapping[str, Any], typed: Mapping[str, Any]
) -> tuple[SavedRun | None, Origin | None]:
    """The save with the configuration to go on with, and what the file says that a run in `folder` starts from.

    The latter is None where the run's own save says it, or nothing is given.
    """
    if saved is None or (saved.config and storage.same_folder(saved.directory, folder)):
        return saved, None
    which = flags["resume_from"] or flags["weights"]
    start = origin(saved, kind, typed, weights=which, new_classes=flags["new_classes"])
    # How another run was trained holds only where all of its save is continued.
    whole = saved.config or {} if start.tensors is None else {}
    of_network = {name: start.config.to_dict()[name] for name in ("model", "diffusion")}
    return replace(saved, config={"data": {}, "train": {}, **whole, **of_network}, class_names=start.class_names), start


def configuration(
    kind: str, flags: Mapping[str, Any], typed: Mapping[str, Any], saved: SavedRun | None, *, default_bf16: bool
) -> RunConfig:
    """Flags, completed by what the save that is continued was trained with; `typed` ones that contradict it are refused.

    With `default_bf16` a new run of a U-Net computes in bfloat16 unless a flag says otherwise. Where the run was started from is no part of
    the result: a later start goes on from the run's own saves.
    """
    chosen = any(name in typed for name in ("precision", "use_fp16", "classifier_use_fp16"))
    begun = saved is not None and bool(saved.config and saved.config["train"])
    of_network = {**flags, **flatten(saved.config or {} if saved else {})}
    unet = {of_network.get(f"{prefix}architecture", UNET) for prefix in ("", "classifier_")} == {UNET}
    flags = {**flags, **({"precision": "bf16"} if default_bf16 and unet and not chosen and not begun else {})}
    if saved is not None and saved.config:
        agree(RunConfig.from_dict(kind, saved.config), typed, saved.directory)
        stored = flatten(saved.config)
        # What the weights are is agreed upon, and stays as it is spelled there.
        fixed = {name for section in ("model", "diffusion") for name in saved.config[section]} - FREE
        flags = {**flags, **{name: stored[name] for name in fixed}, **laid_over(stored, typed)}
        for sentence in changed(stored, typed, flags):
            _log.info(sentence)
    return RunConfig.from_flags(kind, {**flags, "resume_checkpoint": ""})


def already_begun(folder: str, config: RunConfig, world: World) -> SavedRun | None:
    """The save to go on from although --resume_checkpoint is none: such a run's, of these very settings.

    That is the command of before, started again by a scheduler: it would make the same saves once more.
    """
    saved = None
    if world.is_main and (latest := find_latest(folder)) is not None and latest.started_from == "none":
        before, now = ({**flatten(c), **dict.fromkeys(_NOT_COMPARED)} for c in (latest.config or {}, config.to_dict()))
        # The precision that was chosen for a device is no setting: the next start may find another device.
        apart = {
            name for name in now if name in before and before[name] != now[name] and (name != "precision" or now[name])
        }
        saved = None if apart else latest
        if apart:
            _log.info(
                f"--resume_checkpoint none begins anew in {folder}: {', '.join(sorted(apart))} differ from the run there"
            )
    saved = world.broadcast_object(saved, name="was the run begun already?")
    if saved is not None:
        _log.info(
            f"--resume_checkpoint none has begun the run in {folder} before, with these settings: it goes on. To begin once more, "
            "give another --out"
        )
    return saved


def with_classes(config: RunConfig, class_names: Sequence[str], where: str) -> RunConfig:
    """The number of classes, from the data in `where`, if it was not given."""
    if config.kind != "classifier" and not getattr(config.model, "class_cond", False):
        return config
    count = len(class_names)
    if config.model.num_classes and count > config.model.num_classes:
        raise ValueError(f"--num_classes is {config.model.num_classes}, but {where} has {count} classes")
    return replace(config, model=replace(config.model, num_classes=config.model.num_classes or count))


def with_global_batch(config: RunConfig, processes: int, *, before: SavedRun | None = None) -> RunConfig:
    """The batch of all processes together, that of the run `before` if there is one: stored, so that the run goes on with the
    same batches on another number of processes."""
    size = flatten(before.config or {}).get("global_batch_size", 0) if before is not None else 0
    size = size or config.train.global_batch_size or config.train.batch_size * processes
    if size % processes:
        raise ValueError(f"--global_batch_size is {size}; it must be a multiple of the {processes} processes")
    return replace(config, train=replace(config.train, global_batch_size=size))
