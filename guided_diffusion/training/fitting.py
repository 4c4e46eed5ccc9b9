"""How many examples one forward and backward pass can take, found before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..runtime.fitting import halved_until_it_fits
from . import batching

if TYPE_CHECKING:
    from .trainer import Trainer


def fitting_microbatch(trainer: Trainer, batch: Any) -> int:
    """The largest of the whole `batch`, half, a quarter ... of it that trains without running out of memory, on all processes.

    Each attempt is a forward and a backward pass with room kept for the optimizer's moments; weights, averages and what is
    logged stay as they are. Raises ValueError where not even one example fits.
    """
    size = batching.length(batch)
    positions = batching.positions(batch, trainer.world.rank, trainer.world.size)

    def attempt(count: int) -> None:
        moments = [torch.empty_like(p) for p in trainer.params for _ in range(2)]
        try:
            part = next(batching.split(batch, count))
            # As a pass that is not the last: the processes do not wait for each other, of whom one may have failed.
            trainer.forward_backward(part, positions[:count], size * trainer.world.size, last=False)
        finally:
            del moments
            trainer.optimizer.zero_grad(set_to_none=True)

    trainer.net.train()
    found = halved_until_it_fits(attempt, size)
    found = int(trainer.world.all_gather_cat(torch.tensor([found], device=trainer.device), name="microbatch").min())
    if not found:
        raise ValueError(
            "not even one example at a time fits into this device's memory; "
            "--use_checkpoint True and --precision bf16 need less of it"
        )
    return found
