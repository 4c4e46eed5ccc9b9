"""One start of a training run: its configuration, data, network and trainer, from the flags of `train`."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import build
from ..config import RunConfig, classes_of
from ..data.classes import hold_out, renumber, some
from ..data.listing import Records, list_records
from ..data.loader import Batches
from ..diffusion.process import Process
from ..runtime import devices, storage
from ..runtime.log import Log, setup_messages, silence_closed_streams
from ..runtime.signals import Stop
from ..runtime.world import World
from ..sampling.pipeline import write_preview
from ..training.callbacks import SampleGrid, Validation, accuracy_by_noise
from ..training.checks import check_same_everywhere
from ..training.compiling import CompileWhenItPays, compile_training
from ..training.losses import classifier_loss, diffusion_loss
from ..training.memory import fit, set_recompute
from ..training.saver import Checkpoints, find_save
from ..training.trainer import Callback, Trainer
from ..weights import continuing
from ..weights.load import Loaded
from ..weights.runs import SavedRun
from .arguments import Parsed

MAX_ACCURACY_IMAGES = 2000  # held-out images for the table of accuracy by noise level
_log = logging.getLogger(__name__)


def configured(
    parsed: Parsed, kind: str, world: World, folder: str, *, script: bool = False
) -> tuple[RunConfig, SavedRun | None, continuing.Origin | None]:
    """(configuration, save to continue or None, checkpoint to start from or None) of a start in `folder`. Flags that are not typed have
    the values stored in that save or checkpoint."""
    saved = find_save(folder, parsed.flags["resume_checkpoint"] or "auto", kind=kind, world=world)
    saved, start = continuing.started_from(saved, folder, kind, parsed.flags, parsed.typed)
    bf16 = not script and world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return continuing.configuration(kind, parsed.flags, parsed.typed, saved, default_bf16=bf16), saved, start


class Plan(NamedTuple):
    """What is trained, on which data, starting from which weights."""

    world: World
    folder: str
    config: RunConfig
    process: Process  # on the device
    records: Records
    held_out: Records | None  # for validation, of classifiers only
    names: tuple[str, ...]  # of the classes; () without labels
    resume: str  # --resume_checkpoint, or auto
    saved: SavedRun | None  # the save to continue
    start: continuing.Origin | None  # the file whose weights are taken, at step 0

    @property
    def batch_size(self) -> int:
        """The global batch size: images per step over all processes."""
        return self.config.train.global_batch_size

    def batches(self, records: Records, batch_size: int, first: int, **options: Any) -> Batches:
        """This process's share of the batches from step `first` on."""
        options |= {"rank": self.world.rank, "size": self.world.size}
        return build.build_batches(records, self.config, batch_size=batch_size, start_step=first, **options)


def make_plan(parsed: Parsed, kind: str, world: World, folder: str, *, script: bool) -> Plan:
    """The plan of a start in `folder`. ValueError if flags, data and what it starts from do not fit together."""
    resume = parsed.flags["resume_checkpoint"] or "auto"
    config, saved, start = configured(parsed, kind, world, folder, script=script)
    devices.set_float32_products(tf32=config.train.tf32)  # of a run that goes on, as it was begun
    if config.train.compile == "on":
        devices.require_compiler(world.device)
    if not config.data.data_dir:
        raise ValueError("--data_dir is empty; give the folder of training images")
    config, records, held_out = list_images(config, saved, start)
    names = records.class_names if records.labels is not None else ()
    if start and start.tensors is not None:  # only the weights are used, and training starts at step 0
        saved = None
    else:
        start = None
    continuing.require_same_rows(saved, config)
    if resume == "none":
        # A scheduler may restart the same command, which then continues the run that its first start has begun.
        saved = continuing.already_begun(folder, config, world)
        if saved is not None and names and saved.class_names != names:
            raise ValueError(
                f"the run in {folder} has the classes {some(saved.class_names)}, {records.root} has {some(names)}; leave out "
                "--resume_checkpoint none to go on with those of the run, or give another --out"
            )
    # After such a restart the global batch size stays, on any number of processes.
    before = saved if resume == "none" and "global_batch_size" not in parsed.typed else None
    config = continuing.with_global_batch(config, world.size, before=before)
    check_same_everywhere(world, records, config.to_dict())
    process = build.build_process(config.diffusion).to(world.device)
    return Plan(world, folder, config, process, records, held_out, names, resume, saved, start)


def list_images(
    config: RunConfig, saved: SavedRun | None, start: continuing.Origin | None
) -> tuple[RunConfig, Records, Records | None]:
    """(configuration with the number of classes, records for training, records for validation: for classifiers only).

    Class numbers are those of the checkpoint, if there is one.
    """
    data, count, held_out = config.data, classes_of(config.model), None
    records = list_records(data.data_dir, labels=data.labels if count else "none")
    if count:
        records.require_labels()
    if count and saved is not None and not (start and start.new_classes):
        source = start.path if start else saved.directory
        remedy = "; or give --new_classes True" + ("" if start else f", another --out and --resume_checkpoint {source}")
        as_2021 = start is not None and start.as_2021
        records, note = renumber(records, saved.class_names, count, source, as_2021=as_2021, remedy=remedy)
        if note:
            _log.info(note)
    if count and config.kind == "classifier":
        fraction, seed = data.val_fraction, config.train.seed
        records, held_out = hold_out(records, data.val_data_dir, data.labels, fraction=fraction, seed=seed)
    return continuing.with_classes(config, records.class_names, records.root), records, held_out


def run(plan: Plan, flags: Mapping[str, Any], stop: Stop, where: str) -> int:
    """Train; returns the exit code. where: the run folder and how it was chosen, for the log."""
    config, folder, saved, world = plan.config, plan.folder, plan.saved, plan.world
    checkpoints = Checkpoints(
        folder,
        kind=config.kind,
        config=config.to_dict(),
        class_names=plan.names,
        started_from="" if plan.resume == "auto" else plan.resume,
        keep_last=config.train.keep_last,
        keep_every=config.train.keep_every,
        world=world,
    )
    if plan.resume == "none" and saved is None:  # start afresh: move the checkpoints of an earlier run out of the way
        checkpoints.set_aside()
    checkpoints.continue_from(saved)
    writers = ["stdout", "csv", "json", *["tensorboard"] * flags["tensorboard"]]
    log = Log(folder, world=world, writers=writers, continuing=saved is not None)
    setup_messages(world, log)
    if world.is_main:
        _announce(plan, where)
        storage.write_json_atomic(storage.join(folder, "config.json"), config.to_dict())
    progress = flags["progress"] and sys.stderr.isatty()
    trainer = _trainer(plan, checkpoints=checkpoints, log=log, stop=stop, progress=progress)
    try:
        outcome = trainer.run(config.train.last_step)
        if outcome == "finished" and plan.held_out is not None and world.is_main:
            _write_accuracy(trainer, plan.held_out, plan)
    finally:
        checkpoints.close()
        log.close()
    if outcome == "stopped":
        silence_closed_streams()
        _log.info(
            f"stopped on request after {trainer.steps_done} steps, all saved in {folder}; the same command goes on"
        )
        return int(stop.exit_code)
    return 0


def _network(plan: Plan) -> nn.Module:
    """The network on its device: with the weights of a file or, in a new run, with those drawn from the seed.

    Empty in a run that continues, for `Trainer.restore`.
    """
    config, start, device = plan.config, plan.start, plan.world.device
    # With --new_classes the file may lack rows for some classes, so all weights are drawn first.
    if plan.saved is None and (start is None or start.new_classes):
        net = build.build_network(config.model, config.diffusion, seed=config.train.seed, device=device)
    else:
        net = build.build_empty(config.model, config.diffusion, device=device)
    if start is not None:
        continuing.fill(net, start, plan.names, null_row=getattr(config.model, "null_row", False))
    return net


def _trainer(plan: Plan, **options: Any) -> Trainer:
    """The trainer before its first step: weights loaded, batch fitted to the memory, network compiled."""
    config, train, world = plan.config, plan.config.train, plan.world
    net = _network(plan)
    precision = devices.choose_precision(train.precision, config.model.fp16, world.device)
    timesteps = build.build_timesteps(train.schedule_sampler, len(plan.process))
    if config.kind == "classifier":
        loss = classifier_loss(plan.process, timesteps, noised=getattr(train, "noised", True))
    else:
        loss = diffusion_loss(plan.process, timesteps, **build.loss_options(config))

    def batches(step: int) -> Batches:
        # A run may continue with another batch size, so its position in the data is counted in images.
        return plan.batches(plan.records, plan.batch_size, step, start_image=trainer.samples_seen if step else None)

    batches(0).close()  # raises now, not after the checkpoint is read, if the batch size does not suit the data
    trainer = Trainer(
        net,
        loss,
        batches,
        precision=precision,
        batch_size=plan.batch_size,
        schedule_sampler=timesteps if config.kind != "classifier" else None,
        callbacks=_callbacks(plan, options["log"]),
        world=world,
        **options,
        **build.trainer_options(train),
    )
    _log.info(f"{sum(p.numel() for p in net.parameters()):,} parameters, computing in {precision} on {world.device}")
    if plan.saved is not None:
        trainer.restore(plan.saved)
    _fit(trainer, plan)
    if train.compile == "on":
        with contextlib.closing(batches(trainer.steps_done)) as trial:
            compile_training(trainer, next(trial))
    return trainer


def _fit(trainer: Trainer, plan: Plan) -> None:
    """Set what is recomputed and the microbatch: as the flags say, or as the memory allows."""
    train, world, share = plan.config.train, plan.world, plan.batch_size // plan.world.size
    auto, shrink = train.recompute == "auto", train.microbatch == 0
    if train.recompute and not auto:
        set_recompute(trainer.net, train.recompute)
    if auto or (shrink and world.device.type == "cuda"):
        norms = train.compile != "on"  # torch.compile itself chooses what to recompute between norms
        # One real batch, read as held-out images are: by this process, as workers take seconds to start and to end.
        trial = plan.batches(plan.records, plan.batch_size, trainer.steps_done, held_out=True)
        with contextlib.closing(trial):
            fit(trainer, next(trial), recompute=auto, shrink=shrink, norms=norms, limit_gb=train.memory_limit_gb)
    if train.static_graph and world.size > 1 and 0 < trainer.microbatch < share:
        raise ValueError(
            f"--static_graph True asks for one pass per step, but {share} images on each process go in passes of "
            f"{trainer.microbatch}; leave --static_graph out, or give a batch that fits whole (or --recompute auto)"
        )


def _callbacks(plan: Plan, log: Log) -> list[Callback]:
    """(n, function) pairs, which the trainer calls every n steps: validation, pictures of samples, and `--compile auto`."""
    config, train, held_out, process = plan.config, plan.config.train, plan.held_out, plan.process
    callbacks: list[Callback] = []
    if held_out is not None:
        timesteps = build.build_timesteps("uniform", len(process))
        loss = classifier_loss(process, timesteps, noised=getattr(train, "noised", True), prefix="val")
        every, processes = getattr(train, "eval_interval", 5), plan.world.size
        size = max(processes, min(plan.batch_size, len(held_out) // processes * processes))
        batches = partial(plan.batches, held_out, size, held_out=True)
        callbacks.append((every, Validation(loss, batches, every=every, seed=train.seed, log=log)))
    if train.sample_interval >= 0 and config.kind == "diffusion":

        def draw(net: nn.Module, path: str) -> None:
            model = Loaded(net, process, config, "", class_names=plan.names)
            write_preview(model, path, steps=train.sample_steps, seed=train.seed)

        callbacks.append((train.sample_interval or train.save_interval, SampleGrid(draw, plan.folder)))
    if train.compile == "auto" and plan.world.device.type == "cuda":
        callbacks.append((train.log_interval, CompileWhenItPays(train.last_step)))
    return callbacks


def _write_accuracy(trainer: Trainer, held_out: Records, plan: Plan) -> None:
    """`accuracy_by_noise.json`: the classifier's accuracy on held-out images by noise level."""
    count = min(len(held_out), MAX_ACCURACY_IMAGES)
    size = min(count, 64)
    batches = build.build_batches(held_out.take(range(count)), plan.config, batch_size=size, held_out=True)
    once, losses = islice(batches, math.ceil(count / size)), partial(classifier_loss, plan.process)
    seed, device = plan.config.train.seed, trainer.device
    table = accuracy_by_noise(trainer.net, losses, once, len(plan.process), seed=seed, device=device)
    storage.write_json_atomic(storage.join(plan.folder, "accuracy_by_noise.json"), table)


def _announce(plan: Plan, where: str) -> None:
    records, local_batch = plan.records, plan.batch_size // plan.world.size
    for section, values in plan.config.to_dict().items():
        _log.info("\n".join([f"[{section}]", *(f"  {name} = {value!r}" for name, value in values.items())]))
    _log.info(f"run folder: {where}")
    classes = f"{len(records.class_names)} classes from {records.label_source}"
    labels = "no labels" if records.labels is None else classes
    _log.info(f"{len(records):,} images in {plan.config.data.data_dir}, {labels}")
    if records.left_out:
        _log.warning(records.left_out)
    _log.info(f"global batch size {plan.batch_size}: {local_batch} on each of {plan.world.size} processes")
    if not plan.config.train.last_step:
        _log.info("no end is set: training goes on until it is stopped; --max_steps sets one")
