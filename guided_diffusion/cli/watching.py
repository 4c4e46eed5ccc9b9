"""What a training run shows on the way: validation of classifiers, pictures of samples, accuracy by noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import RunConfig

if TYPE_CHECKING:
    from ..data.listing import Records
    from ..runtime.log import Log
    from ..training.trainer import Trainer

GRID = 16  # images in the pictures drawn while training
_MEASURED = 2000  # images at most in the table of accuracy by noise level


def hooks(
    config: RunConfig,
    process: Any,
    held_out: Records | None,
    batch_size: int,
    names: Sequence[str],
    folder: str,
    log: Log,
) -> list[tuple[int, Callable[[Trainer], None]]]:
    """What to call every n steps, as (n, function)."""
    found: list[tuple[int, Callable[[Trainer], None]]] = []
    if held_out is not None:
        found.append(
            (getattr(config.train, "eval_interval", 5), Validation(config, process, held_out, batch_size, log))
        )
    if config.train.sample_interval >= 0 and config.kind == "diffusion":
        every = config.train.sample_interval or config.train.save_interval
        found.append((every, Pictures(config, names, folder, log)))
    return found


class Validation:
    """One batch of held-out images, all processes together: columns val_loss, val_acc@1, val_acc@5 of the next log row.

    Each also by quarter of the noise steps: val_acc@1_q0 (little noise) to val_acc@1_q3 (almost only noise).
    """

    def __init__(self, config: RunConfig, process: Any, records: Records, batch_size: int, log: Log) -> None:
        from .. import build
        from ..training.losses import classifier_loss

        self._config, self._records, self._log = config, records, log
        self._batch_size = batch_size
        timesteps = build.build_timesteps("uniform", len(process))
        self._loss = classifier_loss(process, timesteps, noised=getattr(config.train, "noised", True), prefix="val")
        self._batches: Any = None

    def __call__(self, trainer: Trainer) -> None:
        import torch

        from .. import build
        from ..runtime.streams import EVALUATE, Streams
        from ..training.batching import to_device
        from ..training.losses import QUARTILES

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
        assert losses.i is not None
        quarter = losses.i * QUARTILES // losses.num_steps
        for name, values in losses.terms.items():
            self._log.mean(name, values)
            for q in range(QUARTILES):
                here = quarter == q
                self._log.total(f"{name}_q{q}", torch.where(here, values, 0.0).sum(), here.sum())


class Pictures:
    """A grid of samples of the averaged weights, always from the same noise, so that one sees training at work."""

    def __init__(self, config: RunConfig, names: Sequence[str], folder: str, log: Log) -> None:
        self._config, self._names, self._folder, self._log = config, names, folder, log

    def __call__(self, trainer: Trainer) -> None:
        import contextlib

        import torch

        from .. import build
        from ..data.images import to_uint8
        from ..diffusion.samplers import NotFinite
        from ..runtime import storage
        from ..runtime.streams import SAMPLE, Streams
        from ..sampling import writers
        from ..sampling.pipeline import build_sample
        from ..weights.load import Loaded

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
            if not trainer.world.is_main:
                return
            net.eval()
            loaded = Loaded(net, process, config, "")
            sample = build_sample(loaded, process, method="ddim")
            images = None
            try:
                images = sample(streams.normal((model.image_channels, *model.size)), streams.randn_like, cond)
            except NotFinite as error:  # training itself watches its losses, and says what it does
                self._log.warn(f"no picture of samples at step {trainer.steps_done}: row {error.row}: {error}")
        trainer.net.train()
        if images is None:
            return
        path = storage.join(self._folder, f"samples_{trainer.steps_done:06d}.png")
        try:
            writers.write_grid(path, to_uint8(images).cpu().numpy(), captions)
            self._log.info(f"wrote {path}{f' (EMA {rate})' if rate else ''}")
        except OSError as error:  # no reason to end training
            self._log.warn(str(error))


def _possible(config: RunConfig) -> str:
    """The respacing for pictures, or every step where the process has no more than it asks for."""
    from ..diffusion.process import space_timesteps

    try:
        space_timesteps(config.diffusion.diffusion_steps, config.train.sample_steps)
    except ValueError:
        return ""
    return config.train.sample_steps


def accuracy_by_noise(
    trainer: Trainer, config: RunConfig, process: Any, records: Records, folder: str, log: Log
) -> None:
    """Accuracy on held-out images at ten noise levels: what guidance can expect of this classifier."""
    import torch

    from .. import build
    from ..runtime import storage
    from ..runtime.streams import EVALUATE, Streams
    from ..training.batching import to_device
    from ..training.losses import classifier_loss

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
                found = classifier_loss(process, fixed)(trainer.net, moved, streams)
            seen[level] += found.terms["train_acc@1"].tolist()
    table = {level: sum(hits) / len(hits) for level, hits in seen.items()}
    log.info(
        "held-out accuracy by noise level: " + ", ".join(f"step {level}: {hit:.3f}" for level, hit in table.items())
    )
    storage.write_json_atomic(storage.join(folder, "accuracy_by_noise.json"), table)


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
