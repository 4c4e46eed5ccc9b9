"""Bringing a trainer to the state of a save, and saying exactly which parts came from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import optimizer
from .checkpoint import SavedRun
from .parallel import unwrapped
from .saver import SaveError
from .weights import load_object, load_weights

if TYPE_CHECKING:
    from .trainer import Trainer


def failure_elsewhere() -> SaveError:
    """What the other processes raise when the main one could not save."""
    return SaveError("the main process could not write a save; its message says why")


def load_weights_into(
    net: nn.Module, weights: Mapping[str, Tensor], source: str = "the state", *, assign: bool = False
) -> None:
    """Strict `load_state_dict` whose error is a short list instead of a wall.

    With `assign` the network takes the tensors themselves, in their dtype and memory: for networks built on the meta device.
    """
    own = net.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    complaints = [
        f"{len(names)} {what} (first: {', '.join(names[:3])})"
        for what, names in (("tensors missing", missing), ("unknown tensors", unexpected), ("of another shape", shapes))
        if names
    ]
    if complaints:
        raise ValueError(f"{source} is of another network: {'; '.join(complaints)}; build the network with its flags")
    net.load_state_dict(dict(weights), assign=assign)


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
