"""What a training objective hands to the trainer, and the running means that the log shows."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

QUARTILES = 4


class Losses(NamedTuple):
    """One microbatch of losses. All tensors are `[B]`, on the device, one entry per example."""

    loss: Tensor
    """What is differentiated, importance weight included."""
    terms: dict[str, Tensor]
    """What is logged, by column name: "loss", "mse", "vb", "acc@1", ... """
    i: Tensor | None = None
    """Step position of each example in `[0, num_steps)`; None if the objective has no time."""
    num_steps: int = 1
    raw: Tensor | None = None
    """Losses without importance weight, for a loss-aware choice of steps; None means `loss`."""


class Feedback(Protocol):
    """Something that learns from the losses which steps to train on, and that is part of a checkpoint."""

    def update(self, i: Tensor, losses: Tensor) -> None:
        """Take in the whole global batch in order of position: steps and raw losses, both `[B_global]`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result."""


class LossMeans:
    """Sums of every term, in total and by quartile of time, kept on the device until a log line reads them.

    Quartile `q` holds the examples with `floor(4 i / num_steps) = q`, the 2021 columns `loss_q0` (little noise) to
    `loss_q3` (almost only noise). Non-finite values belong to skipped steps and are left out.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, Tensor] = {}

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

    def tensor(self) -> Tensor:
        """All sums as one tensor `[terms, 2, 5]`, so that one collective and one copy to the host are enough."""
        if not self._sums:
            return torch.zeros(0, 2, QUARTILES + 1, device=self._device)
        return torch.stack(list(self._sums.values()))

    def means(self, sums: Tensor) -> dict[str, float]:
        """Means by column name from `tensor()`'s result on the host; quartiles without an example have no column."""
        out: dict[str, float] = {}
        for name, (total, count) in zip(self._sums, sums.tolist()):
            if sum(count) > 0:
                out[name] = sum(total) / sum(count)
            out.update({f"{name}_q{q}": total[q] / count[q] for q in range(QUARTILES) if count[q] > 0})
        return out

    def clear(self) -> None:
        """Start the next interval."""
        for sums in self._sums.values():
            sums.zero_()
