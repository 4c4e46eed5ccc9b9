"""What all samplers share: the steps that they yield, the end of a chain, and the positions of its nodes on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .process import Process


class Step(NamedTuple):
    """One finished step: the position it left, x `[B, ...]` after it, and the clean prediction `[B, ...]` it was made from."""

    i: float
    x: Tensor
    x0: Tensor


_NOT_FINITE = "its values are not finite (NaN or infinite)"


class NotFinite(ValueError):
    """A chain's values are not finite. `row` is the place in the batch; where a step is known, the message names it."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def check_finite(x: Tensor) -> None:
    """NotFinite naming the first row of `x` `[B, ...]` that holds NaN or infinity. Waits for the device."""
    finite = _finite_rows(x)
    if not finite.all():
        raise NotFinite(int(finite.long().argmin()), _NOT_FINITE)


def last(steps: Iterable[Step]) -> Tensor:
    """Run a sampler to its end; the final x. NotFinite naming the row and the step where values stop being finite.

    On the CPU at that step. Elsewhere at the end, for to look at each step would be to wait for the device as often.
    """
    x = finite = None
    count: Any = 0
    made: list[float] = []
    for step in steps:
        x = step.x
        rows = _finite_rows(x)
        finite = rows if finite is None else finite & rows
        count = count + finite  # a row's number of steps before the first that was not finite
        made.append(step.i)
        if x.device.type == "cpu" and not finite.all():
            break
    if x is None or finite is None:
        raise ValueError("the sampler made no step")
    if x.device.type != "meta" and not finite.all():
        row = int(finite.long().argmin())
        first = int(count[row])
        raise NotFinite(
            row, f"{_NOT_FINITE} from step {first + 1} of the sampler on (timestep {made[first]:g} of its process)"
        )
    return x


def _finite_rows(x: Tensor) -> Tensor:
    return x.isfinite().reshape(len(x), -1).all(dim=1)


def on_device(positions: np.ndarray, process: Process, x: Tensor) -> list[Tensor]:
    """Step positions on x's device, one `[B]` view for each: the only copy a sampler makes, before its first step.

    Integers where all are whole numbers.
    """
    whole = bool((positions == positions.round()).all())
    rows = torch.tensor(positions.tolist(), dtype=torch.long if whole else process.time.dtype, device=x.device)
    return list(rows[:, None].expand(-1, x.shape[0]).unbind())


def final(x0: Tensor, x: Tensor) -> Tensor:
    """The end of a chain: x0 at its last node, a tensor of its own in the number format of x."""
    return x0.to(x.dtype, copy=True)
