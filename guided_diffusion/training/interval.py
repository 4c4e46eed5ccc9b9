"""What a log row tells of the steps since the last one: kept on the device, read from it in one go."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.world import World
from .losses import Losses

QUARTILES = 4


class Interval:
    """Sums of every loss term, in total and by quartile of time, and of the gradient norms, from one log row to the next.

    Quartile `q` holds the examples with `floor(4 i / num_steps) = q`, the 2021 columns `loss_q0` (little noise) to
    `loss_q3` (almost only noise). Non-finite values belong to skipped steps and are left out.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, Tensor] = {}  # by term: [sum, count] by quartile, and last of examples without a time
        self._steps = torch.zeros(3, device=self._device)  # steps, sum of gradient norms, skipped steps

    @torch.no_grad()
    def add(self, losses: Losses) -> None:
        """Take in one microbatch; nothing leaves the device."""
        for name, values in losses.terms.items():
            values = values.detach().to(torch.float32).reshape(-1)
            finite = torch.isfinite(values)
            row = torch.stack([torch.where(finite, values, 0.0), finite.to(torch.float32)])
            sums = self._sums.get(name)
            if sums is None:
                sums = self._sums[name] = torch.zeros(2, QUARTILES + 1, device=self._device)
            if losses.i is None:
                sums[:, QUARTILES] += row.sum(dim=1)
            else:
                quartile = (losses.i * QUARTILES / losses.num_steps).long().clamp(0, QUARTILES - 1)
                sums.index_add_(1, quartile, row)

    def count_step(self, grad_norm: Tensor, skipped: Tensor) -> None:
        """One step is done; both are scalars on the device."""
        norm = torch.where(skipped, 0.0, grad_norm)
        self._steps += torch.stack([torch.ones_like(norm), norm, skipped.float()])

    def read(self, world: World, unreadable: float = 0.0) -> dict[str, float]:
        """Means over all processes by column name, and start again. A collective with one copy to the host.

        Quartiles without an example have no column. `unreadable`: images that this process could not read, a sum over the run.
        """
        shape = (len(self._sums), 2, QUARTILES + 1)
        terms = torch.stack(list(self._sums.values())) if self._sums else torch.zeros(shape, device=self._device)
        # float32 holds counts up to 16 million.
        images = torch.tensor([float(unreadable)], device=self._device)
        flat = world.all_reduce_sum_(torch.cat([terms.flatten(), self._steps, images]), name="log line").cpu()
        steps, norms, skipped, unreadable = flat[-4:].tolist()
        row: dict[str, float] = {}
        for name, (total, count) in zip(self._sums, flat[:-4].view(shape).tolist()):
            if sum(count) > 0:
                row[name] = sum(total) / sum(count)
            row.update({f"{name}_q{q}": total[q] / count[q] for q in range(QUARTILES) if count[q] > 0})
        if steps > skipped:
            row["grad_norm"] = norms / (steps - skipped)
        if skipped:
            row["skipped_steps"] = skipped / world.size
        if unreadable:
            row["unreadable_images"] = unreadable
        for sums in (*self._sums.values(), self._steps):
            sums.zero_()
        return row
