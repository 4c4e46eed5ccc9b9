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
    return _of_prediction(snr.clamp(max=gamma), snr, predicts)


def p2(process: Process, i: Tensor, predicts: str, *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """(k + SNR)^-gamma as weight of eps's error, converted to what is predicted (arXiv 2204.00227, eq. 8): less for little noise."""
    snr = process.at("log_snr", i, i).exp()
    return _of_prediction(snr * (k + snr) ** -gamma, snr, predicts)


def _of_prediction(weight: Tensor, snr: Tensor, predicts: str) -> Tensor:
    """The weight of the predicted quantity's error that equals `weight` on that of x0."""
    return {"x0": weight, "eps": weight / snr, "v": weight / (snr + 1)}[predicts]


# Name -> function of (process, steps `i` `[B]`, what the network predicts: "eps", "x0" or "v") -> weights `[B]`.
# Programs may add entries before they train.
WEIGHTS: dict[str, Callable[..., Tensor]] = {"min_snr": min_snr, "p2": p2}


def named_weight(name: str) -> Callable[..., Tensor] | None:
    """The weight of that name, None for ""."""
    if name and name not in WEIGHTS:
        raise ValueError(f"--loss_weight is {name!r}; it must be one of {', '.join(WEIGHTS)}")
    return WEIGHTS.get(name)
