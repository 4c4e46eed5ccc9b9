"""The formulas of single sampling steps, for arrays or numbers; used by `samplers` and by the class of 2021."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Noise(Protocol):
    """Standard normal numbers of `like`'s shape, dtype and device: those of the draw number `draw` at the step number `step` of a chain.

    Steps count from 0, the first one taken. Draws are addressed, not consumed: a step that draws nothing changes no later one.
    """

    def __call__(self, like: Tensor, /, step: int, draw: int = 0) -> Tensor: ...


def fresh_noise(like: Tensor, step: int, draw: int = 0) -> Tensor:
    """A `Noise` from torch's global generator: each call draws the next numbers."""
    return torch.randn_like(like)


Number = Any  # Tensor, np.ndarray or float: the same formula for all


def ancestral_update(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A sample of N(mean, e^log_variance), given standard normal `noise`."""
    return mean + (0.5 * log_variance).exp() * noise


def eps_between(x: Tensor, x0: Tensor, alpha_bar: float) -> Tensor:
    """The noise eps in x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps."""
    return (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)


def ddim_sigma(alpha_bar: Number, alpha_bar_prev: Number, eta: float) -> Number:
    """Standard deviation of the fresh noise in a DDIM step, arXiv 2010.02502, eq. 16."""
    return eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5 * (1 - alpha_bar / alpha_bar_prev) ** 0.5


def ddim_update(x0: Tensor, eps: Tensor, alpha_bar_to: Number, sigma: Number = 0.0) -> Tensor:
    """Mean of x at noise level `alpha_bar_to`, before fresh noise of standard deviation `sigma` is added (eq. 12)."""
    return x0 * alpha_bar_to**0.5 + (1 - alpha_bar_to - sigma**2) ** 0.5 * eps


def ddim_weights(
    alpha_bar: np.ndarray, alpha_bar_to: np.ndarray, sigma: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(weights of x0, weights of x) whose sum is `ddim_update` with eps = `eps_between(x, x0)`; one per step."""
    from_x = np.sqrt(1 - alpha_bar_to - sigma**2) / np.sqrt(1 - alpha_bar)
    return np.sqrt(alpha_bar_to) - from_x * np.sqrt(alpha_bar), from_x


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def check_order(order: int) -> None:
    """ValueError unless a multistep rule of this order is known."""
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order={order!r} must be a whole number from 1 to 4")


def adams_bashforth_weights(order: int) -> tuple[float, ...]:
    """Weights of the last 1 to 4 values, newest first, in the mean over the next of even steps."""
    return _ADAMS_BASHFORTH[order - 1]


def adams_bashforth(past: list[Tensor]) -> Tensor:
    """The mean of eps over the next step, extrapolated from its last 1 to 4 values `past` (oldest first)."""
    weights = adams_bashforth_weights(len(past))
    return sum((weight * eps for weight, eps in zip(weights[1:], reversed(past[:-1]))), weights[0] * past[-1])
