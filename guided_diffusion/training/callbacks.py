"""Progress of a training run: validation of classifiers, grids of samples, accuracy by noise level."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..diffusion.samplers import NotFinite
from ..diffusion.timesteps import Drawn
from ..runtime import compiler, storage
from ..runtime.log import Log
from ..runtime.streams import EVALUATE, Streams
from . import batching
from .losses import QUARTILES, LossFn

if TYPE_CHECKING:
    from .trainer import Trainer

_log = logging.getLogger(__name__)


class Validation:
    """Evaluate one global batch of held-out images: the means of `loss_fn`'s terms become columns of the next log row.

    Also by quarter of the noise steps: val_acc@1_q0 (little noise) to val_acc@1_q3 (almost only noise).
    """

    def __init__(
        self, loss_fn: LossFn, batches: Callable[[int], Iterator[Any]], *, every: int, seed: int, log: Log
    ) -> None:
        """`batches(k)` yields the batches from validation `k` = 0, 1, ... on; `every`: steps between validations."""
        self._loss_fn, self._make, self._every, self._seed, self._log = loss_fn, batches, every, seed, log
        self._batches: Iterator[Any] | None = None

    def __call__(self, trainer: Trainer) -> None:
        device = trainer.device
        if self._batches is None:
            self._batches = self._make(trainer.steps_done // self._every - 1)
        batch = next(self._batches)
        streams = Streams(self._seed, EVALUATE, trainer.steps_done, ids=batch.positions, device=device)
        trainer.net.eval()
        with torch.no_grad():
            losses = self._loss_fn(trainer.net, batching.to_device(batch, device), streams)
        assert losses.i is not None
        quarter = losses.i * QUARTILES // losses.num_steps
        for name, values in losses.terms.items():
            self._log.mean(name, values, quarter >= 0)  # of all examples
            for q in range(QUARTILES):
                self._log.mean(f"{name}_q{q}", values, quarter == q)


class SampleGrid:
    """Draw samples with the EMA weights of the largest decay, from the same noise each time, to compare them."""

    def __init__(self, draw: Callable[[nn.Module, str], None], folder: str) -> None:
        """`draw(net, path)` draws samples of a network into a file."""
        self._draw, self._folder = draw, folder

    def __call__(self, trainer: Trainer) -> None:
        decay = max(trainer.ema.decays, key=float, default=None)
        path = storage.join(self._folder, f"samples_{trainer.steps_done:06d}.png")
        with trainer.ema.swapped_in(decay) if decay else contextlib.nullcontext(trainer.net) as net:
            if not trainer.world.is_main:
                return
            net.eval()
            try:
                # For a few images compiling takes longer than it saves; and if it failed, this process would train uncompiled.
                with compiler.uncompiled(net):
                    self._draw(net, path)
                _log.info(f"wrote {path}{f' (EMA {decay})' if decay else ''}")
            except NotFinite as error:  # no reason to end training: `Trainer` checks the losses itself
                _log.warning(f"no picture of samples at step {trainer.steps_done}: {error}")
            except OSError as error:  # neither is a picture that cannot be written
                _log.warning(str(error))
        trainer.net.train()


def accuracy_by_noise(
    net: nn.Module,
    loss_at: Callable[[Any], LossFn],
    batches: Iterable[Any],
    num_steps: int,
    *,
    seed: int,
    device: torch.device,
) -> dict[int, float]:
    """Held-out accuracy at ten of `num_steps` noise levels, which shows where this classifier can guide samples.

    `loss_at(timesteps)` returns the classifier's loss function for steps drawn by `timesteps`.
    """
    levels = sorted({round(k * (num_steps - 1) / 9) for k in range(10)})
    hits: dict[int, list[float]] = {level: [] for level in levels}
    net.eval()
    for number, batch in enumerate(batches):
        streams = Streams(seed, EVALUATE, number, ids=batch.positions, device=device)
        moved = batching.to_device(batch, device)
        for level in levels:
            with torch.no_grad():
                hits[level] += loss_at(_ConstantTimesteps(level))(net, moved, streams).terms["train_acc@1"].tolist()
    accuracy = {level: sum(correct) / len(correct) for level, correct in hits.items()}
    words = ", ".join(f"step {level}: {share:.3f}" for level, share in accuracy.items())
    _log.info(f"held-out accuracy by noise level: {words}")
    return accuracy


class _ConstantTimesteps:
    """A schedule sampler that always draws the same step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def draw(self, u: Tensor) -> Drawn:
        return Drawn(torch.full((len(u),), self._step, device=u.device), torch.ones(len(u), device=u.device))
