"""One row of the log: everything since the last one, read from the device in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import batching
from .optimizer import total_norm

if TYPE_CHECKING:
    from .trainer import Trainer

MUCH_WAITING = 0.2
"""Share of the time spent waiting for data from which on the log says what helps."""


def write(trainer: Trainer, clock: batching.Clock) -> None:
    """All processes take part, the main one writes."""
    sums = trainer.means.tensor()
    # What other processes met counts too; float32 holds counts up to 16 million.
    pictures = torch.tensor([float(getattr(trainer.source, "skipped", 0))], device=trainer.device)
    flat = torch.cat([sums.flatten(), trainer.interval, pictures])
    flat = trainer.world.all_reduce_sum_(flat, name="log line").cpu()
    sums, (steps, norms, skipped, unreadable) = flat[:-4].view(sums.shape), flat[-4:].tolist()
    numbers = trainer.means.means(sums)
    if steps > skipped:
        numbers["grad_norm"] = norms / (steps - skipped)
    with torch.no_grad():
        numbers["param_norm"] = total_norm([p.detach() for p in trainer.params]).item()
    if trainer.precision.scales:
        numbers["lg_loss_scale"] = trainer.precision.lg_loss_scale.item()
    if skipped:
        numbers["skipped_steps"] = skipped / trainer.world.size
    if unreadable:
        numbers["unreadable_images"] = unreadable
    numbers["lr"] = float(trainer.optimizer.param_groups[0]["lr"])
    numbers.update(clock.read())
    trainer.means.clear()
    trainer.interval.zero_()
    clock.show(numbers.get("loss"))
    if trainer.log is not None:
        trainer.log.put("step", trainer.steps_done)
        trainer.log.put("samples", trainer.samples_seen)
        for name, value in numbers.items():
            trainer.log.put(name, value)
        trainer.log.dump(trainer.steps_done)
    if clock.hint_due(numbers["data_wait_share"] > MUCH_WAITING):
        trainer.say(
            f"hint: {numbers['data_wait_share']:.0%} of the time is spent waiting for images. More --workers, or "
            "`guided-diffusion data pack` (decode and crop once, map into memory), would make training faster"
        )
