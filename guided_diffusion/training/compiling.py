"""Compiling the network of a run: at once, or after some steps, when their speed says that it pays."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch

from ..runtime import compiler
from . import batching

if TYPE_CHECKING:
    from .trainer import Trainer

_FEWEST = 10  # steps that are timed


class CompileWhenItPays:
    """A callback of the trainer that compiles its network once the steps that are left take so long that it pays.

    The first call ends the warm-up; the first one at least ten steps later decides, for all processes. Not where norms are recomputed:
    a compiler chooses for itself what to recompute, and the step could need more memory than there is.
    """

    def __init__(self, last_step: int) -> None:
        """`last_step`: the number of updates after which training ends; 0 = never."""
        self._last_step, self._decided = last_step or float("inf"), False
        self._since: tuple[int, float] | None = None

    def __call__(self, trainer: Trainer) -> None:
        if self._decided or any(getattr(module, "recompute_norms", False) for module in trainer.net.modules()):
            return
        done, now = trainer.steps_done, time.perf_counter()
        if self._since is None:
            self._since = done, now
        elif done - self._since[0] >= _FEWEST:
            self._decided = True
            # Validation and saves in between count too, as they will until the end.
            remaining = (self._last_step - done) * (now - self._since[1]) / (done - self._since[0])
            remaining = trainer.world.broadcast_object(remaining, name="does compiling pay?")
            if compiler.pays(remaining, compiler.TRAINING):
                compiler.announce(remaining, compiler.TRAINING)
                compile_training(trainer, trainer.batch)


def compile_training(trainer: Trainer, batch: Any) -> None:
    """Compile the trainer's network, with a forward and backward pass on a part of `batch`, on all processes or on none.

    Weights and the state of training stay. Where it fails there is a warning, and training goes on without.
    """
    trainer.net.train()
    trainer.optimizer.zero_grad(set_to_none=True)  # as a step begins, so that the pass takes no more memory than one
    part = next(batching.split(batch, trainer.microbatch))
    ids = batching.positions(batch, trainer.world.rank, trainer.world.size)[: batching.length(part)]
    # In here, DistributedDataParallel lets the graph end where a bucket of gradients is full, which is sent meanwhile.
    parallel = getattr(trainer.model, "_inside_ddp_forward", contextlib.nullcontext)

    def trial() -> None:
        """`autograd.grad` instead of `backward`: no gradient is kept, and no hook of DistributedDataParallel starts a collective."""
        with parallel():
            loss = trainer.losses_of(trainer.net, part, ids).loss.float().sum()
        torch.autograd.grad(trainer.precision.scale(loss), trainer.params, allow_unused=True)

    compiled = compiler.compile_or_leave([trainer.net], trial)
    if trainer.world.any_true(not compiled, name="did compiling fail?"):
        compiler.undo(trainer.net)
