"""Bringing a trainer to the state of a save, and saying exactly which parts came from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..weights.files import load_object, load_weights, load_weights_into
from ..weights.runs import SavedRun
from . import optimizer
from .parallel import unwrapped
from .saver import SaveError

if TYPE_CHECKING:
    from .trainer import Trainer


def failure_elsewhere() -> SaveError:
    """What the other processes raise when the main one could not save."""
    return SaveError("the main process could not write a save; its message says why")


def restore(trainer: Trainer, saved: SavedRun) -> list[str]:
    """Fill `trainer` from `saved`; every process reads the files itself, and all fail together if one cannot."""
    problem: ValueError | OSError | None = None
    lines: list[str] = []
    try:
        lines = _restore(trainer, saved, unwrapped(trainer.net))
    except (ValueError, OSError) as error:
        problem = error
    if trainer.world.any_true(problem is not None, name="could all processes read the save?"):
        raise problem or ValueError(
            f"another process cannot read {saved.directory}; put it on storage that all machines see, or see its message"
        )
    return lines


def _restore(trainer: Trainer, saved: SavedRun, net: nn.Module) -> list[str]:
    if saved.model is None:
        raise ValueError(f"the save at step {saved.step} in {saved.directory} has no file of weights")
    load_weights_into(net, load_weights(saved.model), saved.model)
    lines = [f"resuming from {saved.directory} at step {saved.step}", f"weights: {saved.model}"]

    # Rates an older save does not have start from its weights.
    trainer.ema.reset()
    for rate in trainer.ema.rates:
        if rate in saved.ema:
            trainer.ema.load_state_dict_of(rate, load_weights(saved.ema[rate]))
            lines.append(f"average {rate}: {saved.ema[rate]}")
        else:
            lines.append(f"average {rate}: not saved, starts from the weights")
    lines += [f"average {rate}: saved, but not kept by this run" for rate in saved.ema if rate not in trainer.ema.rates]

    if saved.optimizer is not None:
        optimizer.load_state(trainer.optimizer, load_object(saved.optimizer), trainer.params)
        lines.append(f"optimizer: {saved.optimizer}")
    if saved.state:
        if saved.state.get("seed") != trainer.seed:
            lines.append(f"note: the save was made with seed {saved.state.get('seed')}, this run has {trainer.seed}")
        trainer.load_counters(saved.state)
        lines.append(f"counters: {trainer.samples_seen} images seen; loss scale and step sampler as saved")
    else:
        start = {"precision": trainer.precision.state_dict(), "step": saved.step}
        trainer.load_counters({**start, "samples": saved.step * (trainer.batch_size or 0)})
    lacks = saved.lacks()
    if lacks:
        lines.append(f"not restored, because the save lacks them: {'; '.join(lacks)}")
    return lines
