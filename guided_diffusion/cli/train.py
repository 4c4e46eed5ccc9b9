"""`train` and `train-classifier`: flags -> a run folder with checkpoints, a log and pictures on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import WEIGHTS, RunConfig, changed, flatten, laid_over
from . import arguments, runs, watching

if TYPE_CHECKING:
    from ..data.listing import Records
    from ..runtime.log import Log
    from ..runtime.world import World
    from ..weights.finetuning import Origin
    from ..weights.runs import SavedRun

EXTRA: dict[str, tuple[Any, str]] = {
    "out": ("", "run folder for checkpoints, log and pictures"),
    "progress": (True, "show a progress bar"),
    "timeout_s": (600.0, "seconds that a process waits for the others before it ends with an error"),
    "tensorboard": (False, "also write curves for TensorBoard"),
    "new_classes": (
        False,
        "with --resume_checkpoint: the classes of the data; those the file has by name keep what was learned",
    ),
    "resume_from": (
        "",
        "with --resume_checkpoint: ema or model, these weights alone, at step 0; empty = all of a save",
    ),
    "weights": ("", "as --resume_from"),
}
_NO_FILE = ("", "auto", "none")  # values of --resume_checkpoint that are no path
# What may differ between two starts of one command: how far it goes, on how many processes.
_NOT_COMPARED = ("resume_checkpoint", "max_steps", "global_batch_size")
_DESCRIPTIONS = {
    "diffusion": "Train a diffusion model on a folder of images.",
    "super_resolution": "Train a diffusion model that enlarges images.",
    "classifier": "Train a classifier of noised images, for guidance.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion train`."""
    return run(argv, "diffusion", program="guided-diffusion train")


def main_classifier(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion train-classifier`."""
    return run(argv, "classifier", program="guided-diffusion train-classifier")


def image_train(argv: Sequence[str] | None = None) -> int:
    """`scripts/image_train.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, "diffusion", program="image_train.py", script=True), argv)


def classifier_train(argv: Sequence[str] | None = None) -> int:
    """`scripts/classifier_train.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, "classifier", program="classifier_train.py", script=True), argv)


def super_res_train(argv: Sequence[str] | None = None) -> int:
    """`scripts/super_res_train.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, "super_resolution", program="super_res_train.py", script=True), argv)


def flags(argv: Sequence[str] | None, kind: str, *, program: str, script: bool = False) -> arguments.Parsed:
    """The flags of a training command."""
    # As in 2021: the classifier learns from random crops.
    defaults: dict[str, Any] = {"random_crop": True} if kind == "classifier" else {}
    if script:
        defaults["out"] = runs.script_folder()
    else:
        defaults["microbatch"] = 0  # as fits: a batch too large for the device's memory is no reason to fail
    return arguments.parse(
        argv,
        list(RunConfig.sections(kind).values()),
        program=program,
        description=_DESCRIPTIONS[kind],
        extra=EXTRA,
        defaults=defaults,
    )


def run(argv: Sequence[str] | None, kind: str, *, program: str, script: bool = False) -> int:
    """Train as the flags say; returns the exit code: 0; 85 where it was asked to stop early and start again later, 130 by Ctrl-C."""
    parsed = flags(argv, kind, program=program, script=script)
    if parsed.flags["resume_checkpoint"] in _NO_FILE:
        RunConfig.from_flags(kind, parsed.flags)  # complain before torch is loaded and processes meet
        for name in ("new_classes", "resume_from", "weights"):
            if parsed.flags[name]:
                raise ValueError(f"--{name} is for starting from a file; give it as --resume_checkpoint")
    if not {parsed.flags["resume_from"], parsed.flags["weights"]} <= set(WEIGHTS):
        raise ValueError(
            f"--resume_from is {parsed.flags['resume_from'] or parsed.flags['weights']!r}; it must be ema or model"
        )
    if not parsed.flags["data_dir"] and not parsed.flags["resume_checkpoint"] and not parsed.flags["out"]:
        raise ValueError("--data_dir is empty; give the folder of training images")

    from ..runtime import signals

    # A signal that comes while the processes meet must not be lost.
    with (
        signals.Stop(signals.TRAINING_SIGNALS) as stop,
        runs.session(parsed.flags, timeout_s=parsed.flags["timeout_s"]) as here,
    ):
        stop.quiet = not here.is_main
        return _run(parsed, kind, here, stop, script=script)


def _run(parsed: arguments.Parsed, kind: str, world: World, stop: Any, *, script: bool = False) -> int:
    from .. import build
    from ..data.classes import some
    from ..runtime.devices import require_compiler
    from ..runtime.log import Log, mute_unheard
    from ..sampling.pipeline import compile_network
    from ..training.fitting import fit_checkpointing, fitting_microbatch
    from ..training.losses import classifier_loss, diffusion_loss
    from ..training.measuring import recompute
    from ..training.saver import Checkpoints, find_save
    from ..training.trainer import Trainer
    from ..weights import finetuning

    say: Callable[[str], None] = print if world.is_main else _silent
    folder, chosen = world.broadcast_object(runs.run_folder(parsed.flags["out"], kind), name="run folder")
    resume = parsed.flags["resume_checkpoint"] or "auto"
    saved = find_save(folder, resume, kind=kind, world=world)
    modern = not script and _has_bfloat16(world)
    start = _start(saved, folder, parsed, kind)
    if saved is not None and start is not None:
        saved = replace(saved, config=_of_start(saved, start), class_names=start.class_names)
    config = _configuration(parsed, kind, saved, modern=modern, tell=say)
    if config.train.compile:
        require_compiler(world.device)
    if not config.data.data_dir:
        raise ValueError("--data_dir is empty; give the folder of training images")
    records, held_out = _records(config, saved, start, tell=say)
    config = _with_classes(config, records)
    if start is not None and start.tensors is not None:
        saved = None
    begun = _already_begun(folder, config, world) if resume == "none" else None
    if begun is not None and "global_batch_size" not in parsed.typed:
        whole = flatten(begun.config or {}).get("global_batch_size", 0)
        config = replace(config, train=replace(config.train, global_batch_size=whole))
    batch_size = config.train.global_batch_size or config.train.batch_size * world.size
    if batch_size % world.size:
        raise ValueError(f"--global_batch_size is {batch_size}; it must be a multiple of the {world.size} processes")
    # Stored, so that the run goes on with the same batches on another number of processes.
    config = replace(config, train=replace(config.train, global_batch_size=batch_size))
    _same_everywhere(world, config, records)

    process = build.build_process(config.diffusion).to(world.device)
    names = records.class_names if records.labels is not None else ()
    checkpoints = Checkpoints(
        folder,
        kind=kind,
        config=config.to_dict(),
        class_names=names,
        started_from="" if resume == "auto" else resume,
        keep_last=config.train.keep_last,
        keep_every=config.train.keep_every,
        world=world,
    )
    if resume == "none":
        saved = begun
        if saved is not None and names and saved.class_names != names:
            raise ValueError(
                f"the run in {folder} has the classes {some(saved.class_names)}, {records.root} has {some(names)}; leave out "
                "--resume_checkpoint none to go on with those of the run, or give another --out"
            )
        if saved is None:
            checkpoints.set_aside()
    checkpoints.continue_from(saved)
    writers = ["stdout", "csv", "json", *(["tensorboard"] if parsed.flags["tensorboard"] else [])]
    log = Log(folder, world=world, writers=writers, continuing=saved is not None)
    if world.is_main:
        _announce(log, config, records, folder, chosen, batch_size, world)
        runs.write_config(folder, parsed, dict(config.to_dict()))

    net = build.build_network(config.model, config.diffusion, seed=config.train.seed)
    if start is not None and start.tensors is not None and saved is None:
        finetuning.fill(net, start, names)
    timesteps = build.build_timesteps(config.train.schedule_sampler, len(process))
    half = getattr(config.model, "use_fp16", False) or getattr(config.model, "classifier_use_fp16", False)
    tell: Callable[[str], None] = log.info if world.is_main else _silent
    precision = build.choose_precision(config.train.precision, half, world.device)
    if kind == "classifier":
        loss = classifier_loss(process, timesteps, noised=getattr(config.train, "noised", True))
    else:
        loss = diffusion_loss(process, timesteps, **build.loss_options(config))

    def batches(start: int) -> Any:
        return build.build_batches(
            records,
            config.data,
            config.model,
            batch_size=batch_size,
            rank=world.rank,
            size=world.size,
            seed=config.train.seed,
            start_step=start,
            start_image=trainer.samples_seen if start else None,
        )

    batches(0).close()  # complain about batch size and data now, not after the checkpoint is read
    trainer = Trainer(
        net,
        loss,
        batches,
        precision=precision,
        batch_size=batch_size,
        feedback=timesteps if kind != "classifier" else None,
        hooks=watching.hooks(config, process, held_out, batch_size, names, folder, log),
        world=world,
        log=log,
        checkpoints=checkpoints,
        stop=stop,
        progress=parsed.flags["progress"] and _terminal(),
        **build.trainer_options(config.train),
    )
    if world.is_main:
        log.info(f"{sum(p.numel() for p in net.parameters()):,} parameters, computing in {precision} on {world.device}")
    if saved is not None:
        trainer.restore(saved)
    recompute(net, config.train.checkpoint)
    if config.train.checkpoint == "auto":  # before the network is compiled: it is tried several ways
        with contextlib.closing(batches(trainer.steps_done)) as trial:
            limit, shrink = config.train.memory_limit_gb, config.train.microbatch == 0
            norms = not config.train.compile  # a compiler chooses for itself what to keep between norms
            tell(fit_checkpointing(trainer, next(iter(trial)), limit_gb=limit, shrink=shrink, norms=norms))
    if config.train.microbatch == 0 and config.train.checkpoint != "auto" and world.device.type == "cuda":
        with contextlib.closing(batches(trainer.steps_done)) as trial:
            trainer.microbatch = fitting_microbatch(trainer, next(iter(trial)))
        tell(f"--microbatch auto: {trainer.microbatch} images per forward and backward pass fit")
    if config.train.static_graph and world.size > 1 and 0 < trainer.microbatch < batch_size // world.size:
        raise ValueError(
            f"--static_graph True asks for one pass per step, but {batch_size // world.size} images on each process go in passes "
            f"of {trainer.microbatch}; leave --static_graph out, or give a batch that fits whole (or --checkpoint auto)"
        )
    if config.train.compile:
        compile_network(net)
    try:
        outcome = trainer.run(config.train.last_step)
        if outcome == "finished" and held_out is not None and world.is_main:
            watching.accuracy_by_noise(trainer, config, process, held_out, folder, log)
    finally:
        failure = checkpoints.close()
        log.close()
    if failure is not None:
        raise failure
    if outcome == "stopped":
        mute_unheard()
        if world.is_main:
            print(
                f"stopped on request after {trainer.steps_done} steps, all saved in {folder}; the same command goes on"
            )
        return int(stop.exit_code)
    return 0


def _silent(_: str) -> None:
    return None


def _terminal() -> bool:
    import sys

    return sys.stderr.isatty()


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def _has_bfloat16(world: World) -> bool:
    import torch

    return world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _configuration(
    parsed: arguments.Parsed, kind: str, saved: SavedRun | None, *, modern: bool, tell: Callable[[str], None]
) -> RunConfig:
    """Flags, completed by what the save that is continued was trained with; typed ones that contradict it are refused.

    A new run that is `modern` computes in bfloat16 unless a flag says otherwise. Where the run was started from is no part of the result: a
    later start goes on from the run's own saves.
    """
    from ..weights.identify import FREE
    from ..weights.load import agree

    chosen = any(name in parsed.typed for name in ("precision", "use_fp16", "classifier_use_fp16"))
    begun = saved is not None and bool(saved.config and saved.config["train"])
    flags = {**parsed.flags, **({"precision": "bf16"} if modern and not chosen and not begun else {})}
    if saved is not None and saved.config:
        agree(RunConfig.from_dict(kind, saved.config), parsed.typed, saved.directory)
        stored = flatten(saved.config)
        # What the weights are is agreed upon, and stays as it is spelled there.
        fixed = {name for section in ("model", "diffusion") for name in saved.config[section]} - FREE
        flags = {**flags, **{name: stored[name] for name in fixed}, **laid_over(stored, parsed.typed)}
        for sentence in changed(stored, parsed.typed, flags):
            tell(sentence)
    return RunConfig.from_flags(kind, {**flags, "resume_checkpoint": ""})


def _start(saved: SavedRun | None, folder: str, parsed: arguments.Parsed, kind: str) -> Origin | None:
    """What the file says that a run starts from; None where the run's own save says it, or nothing is given."""
    from ..runtime import storage
    from ..weights import finetuning

    if saved is None or (saved.config and storage.same_folder(saved.directory, folder)):
        return None
    which = parsed.flags["resume_from"] or parsed.flags["weights"]
    new_classes = parsed.flags["new_classes"]
    return finetuning.origin(saved, kind, parsed.typed, weights=which, new_classes=new_classes)


def _of_start(saved: SavedRun, start: Origin) -> dict[str, Any]:
    """The configuration to go on with: how another run was trained holds only where all of its save is continued."""
    whole = saved.config or {} if start.tensors is None else {}
    return {"data": {}, "train": {}, **whole, **{name: start.config.to_dict()[name] for name in ("model", "diffusion")}}


def _same_everywhere(world: World, config: RunConfig, records: Records) -> None:
    """ValueError, on all processes, where one of them sees other images or another configuration than the first."""
    if world.size == 1:
        return
    rows = world.all_gather_object(
        (records.digest(), f"{len(records)} images in {records.root}", config.to_dict()), "do all see the same data?"
    )
    for rank, (digest, told, settings) in enumerate(rows):
        if digest != rows[0][0]:
            raise ValueError(
                f"the processes see different data: rank 0 has {rows[0][1]}, rank {rank} {told}, and names, order or labels differ; "
                "give all of them the same folder, on storage that every machine sees, or complete the copies"
            )
        if settings != rows[0][2]:
            raise ValueError(
                f"rank {rank} has another configuration than rank 0; start all with the same flags, and put --out on storage "
                "that every machine sees"
            )


def _records(
    config: RunConfig, saved: SavedRun | None, start: Origin | None, *, tell: Callable[[str], None]
) -> tuple[Records, Records | None]:
    """(training, validation) records, with the class numbers of what is continued; the latter only for classifiers."""
    from ..config import classes_of
    from ..data.classes import renumber
    from ..data.listing import list_records, split_records

    if not classes_of(config.model):
        return list_records(config.data.data_dir, labels="none"), None
    records = list_records(config.data.data_dir, labels=config.data.labels)
    records.require_labels()
    if saved is not None and not (start is not None and start.new_classes):
        count, whose = classes_of(config.model), start.path if start else saved.directory
        remedy = "; or give --new_classes True" + ("" if start else f", another --out and --resume_checkpoint {whose}")
        as_2021 = start is not None and start.as_2021
        records, note = renumber(records, saved.class_names, count, whose, as_2021=as_2021, remedy=remedy)
        if note:
            tell(note)
    if config.kind != "classifier":
        return records, None
    if config.data.val_data_dir:
        held_out = list_records(config.data.val_data_dir, labels=config.data.labels)
        held_out, _ = renumber(held_out, records.class_names, len(records.class_names), records.root)
        held_out.require_labels()
        return records, held_out
    if config.data.val_fraction:
        return split_records(records, config.data.val_fraction, config.train.seed)
    return records, None


def _with_classes(config: RunConfig, records: Records) -> RunConfig:
    """The number of classes, from the data where it was not given."""
    if config.kind != "classifier" and not getattr(config.model, "class_cond", False):
        return config
    found = len(records.class_names)
    if config.model.num_classes and found > config.model.num_classes:
        raise ValueError(f"--num_classes is {config.model.num_classes}, but {records.root} has {found} classes")
    return replace(config, model=replace(config.model, num_classes=config.model.num_classes or found))


def _already_begun(folder: str, config: RunConfig, world: World) -> SavedRun | None:
    """The save to go on from although --resume_checkpoint is none: such a run's, of these very settings. That is the command of
    before, started again by a scheduler: it would make the same saves once more."""
    from ..weights.runs import find_latest

    saved = None
    if world.is_main and (found := find_latest(folder)) is not None and found.started_from == "none":
        before, now = ({**flatten(c), **dict.fromkeys(_NOT_COMPARED)} for c in (found.config or {}, config.to_dict()))
        # The precision that was chosen for a device is no setting: the next start may find another device.
        apart = {
            name for name in now if name in before and before[name] != now[name] and (name != "precision" or now[name])
        }
        saved = None if apart else found
        if apart:
            print(
                f"--resume_checkpoint none begins anew in {folder}: {', '.join(sorted(apart))} differ from the run there"
            )
    saved = world.broadcast_object(saved, name="was the run begun already?")
    if saved is not None and world.is_main:
        print(
            f"--resume_checkpoint none has begun the run in {folder} before, with these settings: it goes on. To begin once more, give "
            "another --out"
        )
    return saved


def _announce(
    log: Log, config: RunConfig, records: Records, folder: str, chosen: str, batch_size: int, world: World
) -> None:
    log.info(runs.show(dict(config.to_dict())))
    log.info(f"run folder: {folder} ({chosen})")
    labelled = (
        f"{len(records.class_names)} classes from {records.label_source}" if records.labels is not None else "no labels"
    )
    log.info(f"{len(records):,} images in {config.data.data_dir}, {labelled}")
    if records.left_out:
        log.warn(records.left_out)
    log.info(f"global batch size {batch_size}: {batch_size // world.size} on each of {world.size} processes")
    if not config.train.last_step:
        log.info("no end is set: training goes on until it is stopped; --max_steps sets one")
