"""`train`, `train-classifier`, `train-upsampler` and the training scripts of 2021: train as the flags say, into a run folder with
checkpoints, a log and pictures of samples."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import WEIGHTS, RunConfig, Section, classes_of, flag
from ..runtime import storage
from . import arguments, runs

if TYPE_CHECKING:
    from torch import nn

    from ..data.listing import Records
    from ..data.loader import Batches
    from ..runtime.log import Log
    from ..runtime.signals import Stop
    from ..runtime.world import World
    from ..training.trainer import Callback, Trainer
    from ..weights.continuing import Origin
    from ..weights.runs import SavedRun


@dataclass(frozen=True)
class StartFlags(Section):
    """Train a network on a folder of images."""

    # These flags concern one start of a run only, and are not stored in its configuration.

    out: str = flag("", "run folder for checkpoints, log and pictures")
    progress: bool = flag(True, "show a progress bar")
    timeout_s: float = flag(600.0, "seconds that a process waits for the others before it ends with an error")
    tensorboard: bool = flag(False, "also write curves for TensorBoard")
    new_classes: bool = flag(
        False,
        "train on the data's classes instead of the checkpoint's; classes with the same name keep their learned weights",
    )
    resume_from: str = flag(
        "", "with --resume_checkpoint: ema or model, these weights alone, at step 0; empty = all of a save"
    )
    weights: str = flag("", "alias of --resume_from")


MAX_ACCURACY_IMAGES = 2000  # held-out images for the table of accuracy by noise level
_log = logging.getLogger(__name__)


def main(argv: Sequence[str], program: str, *, kind: str, script: bool = False) -> int:
    """Train as the flags say; exit codes: 0 = finished, 85 = stopped on request and resumable, 130 = Ctrl-C."""
    parsed = flags(argv, kind, program, script=script)
    check_start(parsed, kind)  # before torch is loaded and the processes connect, which takes seconds
    values = parsed.flags
    if not values["data_dir"] and not values["resume_checkpoint"] and not values["out"]:
        raise ValueError("--data_dir is empty; give the folder of training images")

    from ..runtime import signals

    # Stop comes first: a signal that arrives while the processes connect must not be lost.
    with (
        signals.Stop(signals.TRAINING_SIGNALS) as stop,
        runs.session(values["device"], **{name: values[name] for name in ("debug", "timeout_s", "tf32")}) as world,
    ):
        stop.quiet = not world.is_main
        folder, chosen = world.broadcast_object(runs.run_folder(values["out"], kind), name="run folder")
        plan = _plan(parsed, kind, world, folder, script=script)
        return _train(plan, parsed, stop, f"{folder} ({chosen})")


def flags(
    argv: Sequence[str], kind: str, program: str, *, script: bool = False, start: type[StartFlags] = StartFlags
) -> arguments.Parsed:
    """Parse the flags of a training command. start: the flags of one start (`doctor` adds some)."""
    # As in 2021, classifiers are trained on random crops.
    defaults: dict[str, Any] = {"random_crop": True} if kind == "classifier" else {}
    if script:
        defaults["out"] = runs.script_folder()
    else:
        defaults["microbatch"] = 0  # auto: a batch too large for the device's memory is split instead of failing
    configs = (start, *RunConfig.sections(kind).values())
    return arguments.parse(argv, configs, program=program, description=str(start.__doc__), defaults=defaults)


def check_start(parsed: arguments.Parsed, kind: str) -> None:
    """ValueError where flags are impossible or contradict each other in what training starts from."""
    if parsed.flags["resume_checkpoint"] in ("", "auto", "none"):
        RunConfig.from_flags(kind, parsed.flags)
        for name in ("new_classes", "resume_from", "weights"):
            if parsed.flags[name]:
                raise ValueError(f"--{name} needs --resume_checkpoint FILE, the weights to start from")
    which = {name: parsed.flags[name] for name in ("resume_from", "weights") if parsed.flags[name]}
    if not set(which.values()) <= set(WEIGHTS) or len(set(which.values())) > 1:
        values = " and ".join(f"--{name} is {value!r}" for name, value in which.items())
        raise ValueError(
            f"{values}; it must be ema or model (--weights is an alias of --resume_from: give one of them)"
        )


def configured(
    parsed: arguments.Parsed, kind: str, world: World, folder: str, *, script: bool = False
) -> tuple[RunConfig, SavedRun | None, Origin | None]:
    """(configuration, save to continue or None, checkpoint to start from or None) of a start in `folder`. Flags that are not typed have
    the values stored in that save or checkpoint."""
    import torch

    from ..training.saver import find_save
    from ..weights.continuing import configuration, started_from

    saved = find_save(folder, parsed.flags["resume_checkpoint"] or "auto", kind=kind, world=world)
    saved, start = started_from(saved, folder, kind, parsed.flags, parsed.typed)
    on_gpu = world.device.type == "cuda"
    default_bf16 = not script and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return configuration(kind, parsed.flags, parsed.typed, saved, default_bf16=default_bf16), saved, start


class _Plan(NamedTuple):
    """What is trained, on which data, starting from which weights."""

    world: World
    folder: str
    config: RunConfig
    records: Records
    held_out: Records | None  # for validation, of classifiers only
    names: tuple[str, ...]  # of the classes; () without labels
    resume: str  # --resume_checkpoint, or auto
    saved: SavedRun | None  # the save to continue
    start: Origin | None  # the checkpoint to start from

    @property
    def batch_size(self) -> int:
        """The global batch size: images per step over all processes."""
        return self.config.train.global_batch_size

    def batches(self, records: Records, batch_size: int, first: int, **options: Any) -> Batches:
        """This process's share of the batches from step `first` on."""
        from ..build import build_batches

        process: dict[str, Any] = {"rank": self.world.rank, "size": self.world.size}
        return build_batches(records, self.config, batch_size=batch_size, start_step=first, **process, **options)


def _plan(parsed: arguments.Parsed, kind: str, world: World, folder: str, *, script: bool) -> _Plan:
    from ..data.classes import some
    from ..runtime.devices import require_compiler, set_float32_products
    from ..training.checks import check_same_everywhere
    from ..weights.continuing import already_begun, require_same_rows, with_classes, with_global_batch

    resume = parsed.flags["resume_checkpoint"] or "auto"
    config, saved, start = configured(parsed, kind, world, folder, script=script)
    set_float32_products(tf32=config.train.tf32)  # of a run that goes on, as it was begun
    if config.train.compile == "on":
        require_compiler(world.device)
    if not config.data.data_dir:
        raise ValueError("--data_dir is empty; give the folder of training images")
    records, held_out = list_images(config, saved, start)
    config = with_classes(config, records.class_names, records.root)
    names = records.class_names if records.labels is not None else ()
    if start is not None and start.tensors is not None:  # only the weights are used, and training starts at step 0
        saved = None
    require_same_rows(saved, config)
    if resume == "none":
        # A scheduler may restart the same command, which then continues the run that its first start has begun.
        saved = already_begun(folder, config, world)
        if saved is not None and names and saved.class_names != names:
            raise ValueError(
                f"the run in {folder} has the classes {some(saved.class_names)}, {records.root} has {some(names)}; leave out "
                "--resume_checkpoint none to go on with those of the run, or give another --out"
            )
    # After such a restart the global batch size stays, on any number of processes.
    before = saved if resume == "none" and "global_batch_size" not in parsed.typed else None
    config = with_global_batch(config, world.size, before=before)
    check_same_everywhere(world, records, config.to_dict())
    return _Plan(world, folder, config, records, held_out, names, resume, saved, start)


def list_images(config: RunConfig, saved: SavedRun | None, start: Origin | None) -> tuple[Records, Records | None]:
    """(training, validation) records, the latter for classifiers only. Class numbers are those of the checkpoint, if there is one."""
    from ..data.classes import hold_out, renumber
    from ..data.listing import list_records

    data, count = config.data, classes_of(config.model)
    records = list_records(data.data_dir, labels=data.labels if count else "none")
    if not count:
        return records, None
    records.require_labels()
    if saved is not None and not (start is not None and start.new_classes):
        source = start.path if start else saved.directory
        remedy = "; or give --new_classes True" + ("" if start else f", another --out and --resume_checkpoint {source}")
        as_2021 = start is not None and start.as_2021
        records, note = renumber(records, saved.class_names, count, source, as_2021=as_2021, remedy=remedy)
        if note:
            _log.info(note)
    if config.kind != "classifier":
        return records, None
    return hold_out(records, data.val_data_dir, data.labels, fraction=data.val_fraction, seed=config.train.seed)


def _train(plan: _Plan, parsed: arguments.Parsed, stop: Stop, where: str) -> int:
    from ..runtime.log import Log, setup_messages, silence_closed_streams
    from ..training.saver import Checkpoints

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
    writers = ["stdout", "csv", "json", *(["tensorboard"] if parsed.flags["tensorboard"] else [])]
    log = Log(folder, world=world, writers=writers, continuing=saved is not None)
    setup_messages(world, log)
    if world.is_main:
        _announce(plan, where)
        storage.write_json_atomic(storage.join(folder, "config.json"), config.to_dict())
    progress = parsed.flags["progress"] and sys.stderr.isatty()
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


def _network(plan: _Plan) -> nn.Module:
    """The network on its device: with the weights of a file or, in a new run, with those drawn from the seed.

    Empty in a run that continues, for `Trainer.restore`.
    """
    from .. import build
    from ..weights.continuing import fill

    config, device = plan.config, plan.world.device
    of_file = plan.start if plan.saved is None and plan.start is not None and plan.start.tensors is not None else None
    # With --new_classes the file may lack rows for some classes, so all weights are drawn first.
    if plan.saved is None and (of_file is None or of_file.new_classes):
        net = build.build_network(config.model, config.diffusion, seed=config.train.seed, device=device)
    else:
        net = build.build_empty(config.model, config.diffusion, device=device)
    if of_file is not None:
        fill(net, of_file, plan.names, null_row=getattr(config.model, "null_row", False))
    return net


def _trainer(plan: _Plan, **options: Any) -> Trainer:
    """The trainer before its first step: weights loaded, batch fitted to the memory, network compiled."""
    from .. import build
    from ..runtime.devices import choose_precision
    from ..training.compiling import compile_training
    from ..training.losses import classifier_loss, diffusion_loss
    from ..training.memory import fit, set_recompute
    from ..training.trainer import Trainer

    config, world = plan.config, plan.world
    train = config.train
    net = _network(plan)
    precision = choose_precision(train.precision, config.model.fp16, world.device)
    process = build.build_process(config.diffusion).to(world.device)
    timesteps = build.build_timesteps(train.schedule_sampler, len(process))
    if config.kind == "classifier":
        loss = classifier_loss(process, timesteps, noised=getattr(train, "noised", True))
    else:
        loss = diffusion_loss(process, timesteps, **build.loss_options(config))

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
        callbacks=_callbacks(plan, process, options["log"]),
        world=world,
        **options,
        **build.trainer_options(train),
    )
    _log.info(f"{sum(p.numel() for p in net.parameters()):,} parameters, computing in {precision} on {world.device}")
    if plan.saved is not None:
        trainer.restore(plan.saved)
    auto, shrink = train.recompute == "auto", train.microbatch == 0
    if train.recompute and not auto:
        set_recompute(net, train.recompute)
    if auto or (shrink and world.device.type == "cuda"):
        norms = train.compile != "on"  # torch.compile itself chooses what to recompute between norms
        # One real batch, read as held-out images are: by this process, as workers take seconds to start and to end.
        trial = plan.batches(plan.records, plan.batch_size, trainer.steps_done, held_out=True)
        with contextlib.closing(trial):
            fit(trainer, next(trial), recompute=auto, shrink=shrink, norms=norms, limit_gb=train.memory_limit_gb)
    share = plan.batch_size // world.size
    if train.static_graph and world.size > 1 and 0 < trainer.microbatch < share:
        raise ValueError(
            f"--static_graph True asks for one pass per step, but {share} images on each process go in passes of "
            f"{trainer.microbatch}; leave --static_graph out, or give a batch that fits whole (or --recompute auto)"
        )
    if train.compile == "on":
        with contextlib.closing(batches(trainer.steps_done)) as trial:
            compile_training(trainer, next(trial))
    return trainer


def _callbacks(plan: _Plan, process: Any, log: Log) -> list[Callback]:
    """(n, function) pairs, which the trainer calls every n steps: validation, pictures of samples, and `--compile auto`."""
    from ..build import build_timesteps
    from ..sampling.pipeline import write_preview
    from ..training.callbacks import SampleGrid, Validation
    from ..training.compiling import CompileWhenItPays
    from ..training.losses import classifier_loss
    from ..weights.load import Loaded

    config, train, held_out = plan.config, plan.config.train, plan.held_out
    callbacks: list[Callback] = []
    if held_out is not None:
        timesteps = build_timesteps("uniform", len(process))
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


def _write_accuracy(trainer: Trainer, held_out: Records, plan: _Plan) -> None:
    """`accuracy_by_noise.json`: the classifier's accuracy on held-out images by noise level."""
    from .. import build
    from ..training.callbacks import accuracy_by_noise
    from ..training.losses import classifier_loss

    process = build.build_process(plan.config.diffusion).to(trainer.device)
    count = min(len(held_out), MAX_ACCURACY_IMAGES)
    size = min(count, 64)
    batches = build.build_batches(held_out.take(range(count)), plan.config, batch_size=size, held_out=True)
    some = islice(batches, math.ceil(count / size))
    losses, seed = partial(classifier_loss, process), plan.config.train.seed
    table = accuracy_by_noise(trainer.net, losses, some, len(process), seed=seed, device=trainer.device)
    storage.write_json_atomic(storage.join(plan.folder, "accuracy_by_noise.json"), table)


def _announce(plan: _Plan, where: str) -> None:
    records, local_batch = plan.records, plan.batch_size // plan.world.size
    for section, values in plan.config.to_dict().items():
        _log.info("\n".join([f"[{section}]", *(f"  {name} = {value!r}" for name, value in values.items())]))
    _log.info(f"run folder: {where}")
    labels = (
        "no labels" if records.labels is None else f"{len(records.class_names)} classes from {records.label_source}"
    )
    _log.info(f"{len(records):,} images in {plan.config.data.data_dir}, {labels}")
    if records.left_out:
        _log.warning(records.left_out)
    _log.info(f"global batch size {plan.batch_size}: {local_batch} on each of {plan.world.size} processes")
    if not plan.config.train.last_step:
        _log.info("no end is set: training goes on until it is stopped; --max_steps sets one")
