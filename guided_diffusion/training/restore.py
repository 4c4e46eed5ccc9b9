"""Weights, averages and moments from a save on disk, and a line about each: where it came from, or that it was not there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from ..runtime.world import World
from ..weights.files import load_object, load_weights, load_weights_into, read_own_weights
from ..weights.runs import SavedRun
from .ema import EMA
from .optimizer import load_state


def load_tensors(
    saved: SavedRun, net: nn.Module, ema: EMA, optimizer: Optimizer, params: Sequence[nn.Parameter], *, world: World
) -> list[str]:
    """Fill `net`, `ema` and `optimizer` from `saved`; returns what came from where. An average that it lacks starts from the weights.

    Every process of `world` reads the files itself, and all fail together if one cannot.
    """
    problem: ValueError | OSError | None = None
    lines: list[str] = []
    try:
        lines = _load(saved, net, ema, optimizer, params)
    except (ValueError, OSError) as error:
        problem = error
    if world.any_true(problem is not None, name="could all processes read the save?"):
        raise problem or ValueError(
            f"another process cannot read {saved.directory}; put it on storage that all machines see, or see its message"
        )
    return lines


def _load(saved: SavedRun, net: nn.Module, ema: EMA, optimizer: Optimizer, params: Sequence[nn.Parameter]) -> list[str]:
    if saved.model is None:
        raise ValueError(f"the save at step {saved.step} in {saved.directory} has no file of weights")
    read = load_weights if saved.is_unet else read_own_weights
    load_weights_into(net, read(saved.model), saved.model)
    lines = [f"resuming from {saved.directory} at step {saved.step}", f"weights: {saved.model}"]
    ema.reset()
    for decay in ema.decays:
        if decay in saved.ema:
            ema.load_state_dict_of(decay, read(saved.ema[decay]))
            lines.append(f"EMA {decay}: {saved.ema[decay]}")
        else:
            lines.append(f"EMA {decay}: not saved, starts from the weights")
    lines += [f"EMA {decay}: saved, but not kept by this run" for decay in saved.ema if decay not in ema.decays]
    if saved.optimizer is not None:
        load_state(optimizer, load_object(saved.optimizer), params)
        lines.append(f"optimizer: {saved.optimizer}")
    return lines
