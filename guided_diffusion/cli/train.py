"""`train` and `train-classifier`: flags -> a run folder with checkpoints, a log and pictures on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, flatten
from . import arguments, runs

if TYPE_CHECKING:
    from ..data.listing import Records
    from ..runtime.log import Log
    from ..runtime.world import World
    from ..training.checkpoint import SavedRun
    from ..training.trainer import Trainer

EXTRA: dict[str, tuple[Any, str]] = {
    "out": ("", "run folder for checkpoints, log and pictures"),
    "progress": (True, "show a progress bar"),
    "tensorboard": (False, "also write curves for TensorBoard"),
}
_DESCRIPTIONS = {
    "diffusion": "Train a diffusion model on a folder of images.",
    "super_resolution": "Train a diffusion model that enlarges images.",
    "classifier": "Train a classifier of noised images, for guidance.",
}
GRID = 16  # images in the pictures drawn while training
_MEASURED = 2000  # images at most in the table of accuracy by noise level


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
    return arguments.parse(
        argv,
        list(RunConfig.sections(kind).values()),
        program=program,
        description=_DESCRIPTIONS[kind],
        extra=EXTRA,
        defaults=defaults,
    )


def run(argv: Sequence[str] | None, kind: str, *, program: str, script: bool = False) -> int:
    """Train as the flags say; returns the exit code: 0, or 85 where it was asked to stop early and start again later."""
    parsed = flags(argv, kind, program=program, script=script)
    RunConfig.from_flags(kind, parsed.flags)  # complain before torch is loaded and processes meet
    if not parsed.flags["data_dir"] and not parsed.flags["resume_checkpoint"] and not parsed.flags["out"]:
        raise ValueError("--data_dir is empty; give the folder of training images")

    from ..runtime import signals, world

    with world.session(parsed.flags["device"]) as here, signals.Stop() as stop:
        return _run(parsed, kind, here, stop)


def _run(parsed: arguments.Parsed, kind: str, world: World, stop: Any) -> int:
    from .. import build
    from ..runtime.log import Log
    from ..training.saver import Checkpoints
    from ..training.trainer import Trainer

    folder, chosen = world.broadcast_object(runs.run_folder(parsed.flags["out"], kind), name="run folder")
    config = _configuration(parsed, kind, folder)
    if not config.data.data_dir:
        raise ValueError("--data_dir is empty; give the folder of training images")
    records, held_out = _records(config)
    config = _with_classes(config, records)
    batch_size = config.train.global_batch_size or config.train.batch_size * world.size
    if batch_size % world.size:
        raise ValueError(f"--global_batch_size is {batch_size}; it must be a multiple of the {world.size} processes")

    process = build.build_process(config.diffusion).to(world.device)
    names = records.class_names if records.labels is not None else ()
    checkpoints = Checkpoints(
        folder,
        kind=kind,
        config=config.to_dict(),
        class_names=names,
        keep_last=config.train.keep_last,
        keep_every=config.train.keep_every,
        world=world,
    )
    saved = _saved(config, checkpoints)
    writers = ["stdout", "csv", "json", *(["tensorboard"] if parsed.flags["tensorboard"] else [])]
    log = Log(folder, world=world, writers=writers, continuing=saved is not None)
    if world.is_main:
        _announce(log, config, records, folder, chosen, batch_size, world)
        runs.write_config(folder, parsed, dict(config.to_dict()))

    net = build.build_network(config.model, config.diffusion, seed=config.train.seed)
    timesteps = build.build_timesteps(config.train.schedule_sampler, len(process))
    half = getattr(config.model, "use_fp16", False) or getattr(config.model, "classifier_use_fp16", False)
    tell = log.info if world.is_main else _silent
    precision = build.choose_precision(config.train.precision, half, world.device, tell)
    if kind == "classifier":
        loss = build.classifier_loss(process, timesteps, noised=getattr(config.train, "noised", True))
    else:
        loss = build.generator_loss(config, process, timesteps)

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
        )

    batches(0).close()  # complain about batch size and data now, not after the checkpoint is read
    trainer = Trainer(
        net,
        loss,
        batches,
        precision=precision,
        batch_size=batch_size,
        feedback=timesteps if kind != "classifier" else None,
        hooks=_hooks(config, process, held_out, batch_size, names, folder, log),
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
    try:
        outcome = trainer.run(config.train.last_step)
        if outcome == "finished" and held_out is not None and world.is_main:
            _accuracy_by_noise(trainer, config, process, held_out, folder, log)
    finally:
        failure = checkpoints.close()
        log.close()
    if failure is not None:
        raise failure
    if outcome == "stopped":
        print(f"stopped on request after {trainer.steps_done} steps, all saved in {folder}; the same command goes on")
        return runs.REQUEUE
    return 0


def _silent(_: str) -> None:
    return None


def _terminal() -> bool:
    import sys

    return sys.stderr.isatty()


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def _configuration(parsed: arguments.Parsed, kind: str, folder: str) -> RunConfig:
    """Flags, completed by what the save that is continued was trained with; typed ones that contradict it are refused."""
    from .. import build
    from ..training.checkpoint import read_run_json

    resume = parsed.flags["resume_checkpoint"]
    source = folder if resume in ("", "auto") else resume
    before = read_run_json(source) if resume != "none" else None
    if before is None or not before["config"]:
        return RunConfig.from_flags(kind, parsed.flags)
    if before["kind"] != kind:
        raise ValueError(
            f"{source} holds a run of kind {before['kind']!r}, this command trains {kind!r}; give another --out"
        )
    build.agree(RunConfig.from_dict(kind, before["config"]), parsed.typed, source)
    return RunConfig.from_flags(kind, {**parsed.flags, **flatten(before["config"]), **parsed.typed})


def _records(config: RunConfig) -> tuple[Records, Records | None]:
    """(training, validation) records; the latter only for classifiers."""
    from .. import build
    from ..data.listing import list_records

    records = list_records(config.data.data_dir, labels=config.data.labels)
    if config.kind != "classifier":
        if getattr(config.model, "class_cond", False):
            records.require_labels()
        return records, None
    records.require_labels()
    if config.data.val_data_dir:
        held_out = list_records(config.data.val_data_dir, labels=config.data.labels)
        held_out = _same_classes(held_out, records)
        return records, held_out
    if config.data.val_fraction:
        return build.split_records(records, config.data.val_fraction, config.train.seed)
    return records, None


def _same_classes(held_out: Records, records: Records) -> Records:
    """Held-out records with the class numbers of the training records; some classes may be absent there."""
    import numpy as np

    strange = sorted(set(held_out.class_names) - set(records.class_names))
    if strange:
        raise ValueError(
            f"--val_data_dir has the classes {_some(strange)}, which --data_dir lacks; it has {_some(records.class_names)}"
        )
    number = np.array([records.class_names.index(name) for name in held_out.class_names], dtype=np.int64)
    return replace(held_out, labels=number[held_out.require_labels()], class_names=records.class_names)


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"


def _with_classes(config: RunConfig, records: Records) -> RunConfig:
    """The number of classes, from the data where it was not given."""
    if config.kind != "classifier" and not getattr(config.model, "class_cond", False):
        return config
    found = len(records.class_names)
    if config.model.num_classes and found > config.model.num_classes:
        raise ValueError(f"--num_classes is {config.model.num_classes}, but {records.root} has {found} classes")
    return replace(config, model=replace(config.model, num_classes=config.model.num_classes or found))


def _saved(config: RunConfig, checkpoints: Any) -> SavedRun | None:
    resume = config.train.resume_checkpoint or "auto"
    return None if resume == "none" else checkpoints.find(resume)


def _announce(
    log: Log, config: RunConfig, records: Records, folder: str, chosen: str, batch_size: int, world: World
) -> None:
    log.info(runs.show(dict(config.to_dict())))
    log.info(f"run folder: {folder} ({chosen})")
    labelled = (
        f"{len(records.class_names)} classes from {records.label_source}" if records.labels is not None else "no labels"
    )
    log.info(f"{len(records):,} images in {config.data.data_dir}, {labelled}")
    log.info(f"global batch size {batch_size}: {batch_size // world.size} on each of {world.size} processes")
    if not config.train.last_step:
        log.info("no end is set: training goes on until it is stopped; --max_steps sets one")


# ---------------------------------------------------------------------------------------------------------------------
# On the way


def _hooks(
    config: RunConfig,
    process: Any,
    held_out: Records | None,
    batch_size: int,
    names: Sequence[str],
    folder: str,
    log: Log,
) -> list[tuple[int, Callable[[Trainer], None]]]:
    hooks: list[tuple[int, Callable[[Trainer], None]]] = []
    if held_out is not None:
        hooks.append(
            (getattr(config.train, "eval_interval", 5), _Validation(config, process, held_out, batch_size, log))
        )
    if config.train.sample_interval and config.kind == "diffusion":
        hooks.append((config.train.sample_interval, _Pictures(config, names, folder, log)))
    return hooks


class _Validation:
    """One batch of held-out images, all processes together; columns val_loss, val_acc@1, val_acc@5 of the next log row."""

    def __init__(self, config: RunConfig, process: Any, records: Records, batch_size: int, log: Log) -> None:
        from .. import build

        self._config, self._records, self._log = config, records, log
        self._batch_size = batch_size
        timesteps = build.build_timesteps("uniform", len(process))
        self._loss = build.classifier_loss(
            process, timesteps, noised=getattr(config.train, "noised", True), prefix="val"
        )
        self._batches: Any = None

    def __call__(self, trainer: Trainer) -> None:
        import torch

        from .. import build
        from ..runtime.streams import EVALUATE, Streams
        from ..training.batching import to_device

        world, train = trainer.world, self._config.train
        if self._batches is None:
            size = max(world.size, min(self._batch_size, len(self._records) // world.size * world.size))
            data = replace(self._config.data, random_crop=False, random_flip=False, workers=0)
            first = trainer.steps_done // getattr(train, "eval_interval", 5) - 1
            self._batches = build.build_batches(
                self._records,
                data,
                self._config.model,
                batch_size=size,
                rank=world.rank,
                size=world.size,
                seed=train.seed,
                start_step=first,
            )
        batch = next(self._batches)
        streams = Streams(train.seed, EVALUATE, trainer.steps_done, ids=batch.positions, device=world.device)
        trainer.net.eval()
        with torch.no_grad():
            losses = self._loss(trainer.net, to_device(batch, world.device), streams)
        for name, values in losses.terms.items():
            self._log.mean(name, values)


class _Pictures:
    """A grid of samples of the averaged weights, always from the same noise, so that one sees training at work."""

    def __init__(self, config: RunConfig, names: Sequence[str], folder: str, log: Log) -> None:
        self._config, self._names, self._folder, self._log = config, names, folder, log

    def __call__(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        import contextlib

        import torch

        from .. import build
        from ..data.images import to_uint8
        from ..runtime import storage
        from ..runtime.streams import SAMPLE, Streams
        from ..sampling import writers

        config, model = self._config, self._config.model
        process = build.build_process(config.diffusion, respacing=_possible(config)).to(trainer.device)
        streams = Streams(config.train.seed, SAMPLE, ids=range(GRID), device=trainer.device)
        cond, captions = {}, None
        if getattr(model, "class_cond", False):
            labels = torch.arange(GRID) * max(1, model.num_classes // GRID) % model.num_classes
            cond = {"y": labels.to(trainer.device)}
            captions = [self._names[int(k)] if int(k) < len(self._names) else str(int(k)) for k in labels]
        rate = max(trainer.ema.rates, key=float, default=None)
        with trainer.ema.swapped_in(rate) if rate else contextlib.nullcontext(trainer.net) as net:
            net.eval()
            loaded = build.Loaded(net, process, config, "")
            sample = build.build_sample(loaded, process, method="ddim")
            images = sample(streams.normal((model.image_channels, *model.size)), streams.randn_like, cond)
        trainer.net.train()
        path = storage.join(self._folder, f"samples_{trainer.steps_done:06d}.png")
        writers.write_grid(path, to_uint8(images).cpu().numpy(), captions)
        self._log.info(f"wrote {path}{f' (EMA {rate})' if rate else ''}")


def _possible(config: RunConfig) -> str:
    """The respacing for pictures, or every step where the process has no more than it asks for."""
    from ..diffusion.process import space_timesteps

    try:
        space_timesteps(config.diffusion.diffusion_steps, config.train.sample_steps)
    except ValueError:
        return ""
    return config.train.sample_steps


def _accuracy_by_noise(
    trainer: Trainer, config: RunConfig, process: Any, records: Records, folder: str, log: Log
) -> None:
    """Accuracy on held-out images at ten noise levels: what guidance can expect of this classifier."""
    import json

    import torch

    from .. import build
    from ..runtime import storage
    from ..runtime.streams import EVALUATE, Streams
    from ..training.batching import to_device

    count = min(len(records), _MEASURED)
    size = min(count, 64)
    data = replace(config.data, random_crop=False, random_flip=False, workers=0)
    levels = sorted({round(k * (len(process) - 1) / 9) for k in range(10)})
    seen: Mapping[int, list[float]] = {level: [] for level in levels}
    batches = build.build_batches(
        records.take(range(count)), data, config.model, batch_size=size, seed=config.train.seed
    )
    trainer.net.eval()
    for number in range(math.ceil(count / size)):
        batch = next(batches)
        streams = Streams(config.train.seed, EVALUATE, number, ids=batch.positions, device=trainer.device)
        moved = to_device(batch, trainer.device)
        for level in levels:
            fixed = _At(level)
            with torch.no_grad():
                found = build.classifier_loss(process, fixed)(trainer.net, moved, streams)
            seen[level] += found.terms["train_acc@1"].tolist()
    table = {level: sum(hits) / len(hits) for level, hits in seen.items()}
    log.info(
        "held-out accuracy by noise level: " + ", ".join(f"step {level}: {hit:.3f}" for level, hit in table.items())
    )
    storage.write_text_atomic(storage.join(folder, "accuracy_by_noise.json"), json.dumps(table, indent=1) + "\n")


class _At:
    """Timesteps that are all the same."""

    def __init__(self, step: int) -> None:
        self._step = step

    def draw(self, u: Any) -> Any:
        import torch

        from ..diffusion.timesteps import Drawn

        return Drawn(torch.full((len(u),), self._step, device=u.device), torch.ones(len(u), device=u.device))

    def update(self, i: Any, losses: Any) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
