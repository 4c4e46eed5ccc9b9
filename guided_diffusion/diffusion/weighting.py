"""Weights of the squared error by noise level."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .process import Process


def min_snr(process: Process, i: Tensor, predicts: str, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) as weight of x0's error, converted to what is predicted (arXiv 2303.09556); gamma > 0."""
    snr = process.at("log_snr", i, i).exp()
    capped = snr.clamp(max=gamma)
    return {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}[predicts]


# Name -> function of (process, steps `i` `[B]`, what the network predicts: "eps", "x0" or "v") -> weights `[B]`.
# Programs may add entries before they train.
WEIGHTS: dict[str, Callable[..., Tensor]] = {"min_snr": min_snr}


def named_weight(name: str) -> Callable[..., Tensor] | None:
    """The weight of that name, None for ""."""
    if name and name not in WEIGHTS:
        raise ValueError(f"--loss_weight is {name!r}; it must be one of {', '.join(WEIGHTS)}")
    return WEIGHTS.get(name)
