"""Noise schedules: a name and a number of steps -> the variances `betas` added at each step, float64 `[T]`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def betas_for_alpha_bar(num_steps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999) -> np.ndarray:
    """Betas whose cumulative product of `1 - beta` is `alpha_bar`, a falling function on [0, 1] with values in (0, 1].

    `max_beta` (below 1) caps the last steps, where alpha_bar nears zero. Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.2.
    """
    times = [step / num_steps for step in range(num_steps + 1)]
    pairs = zip(times[:-1], times[1:])
    return np.array([min(1 - alpha_bar(t2) / alpha_bar(t1), max_beta) for t1, t2 in pairs], dtype=np.float64)


def linear_betas(num_steps: int) -> np.ndarray:
    """Evenly spaced from 1e-4 to 0.02 at 1000 steps (Ho et al. 2020); times 1000/T at T steps, for about the same noise."""
    scale = 1000 / num_steps
    if scale * 0.02 >= 1:
        raise ValueError(
            f"the linear schedule has no {num_steps}-step form: its last beta would be {scale * 0.02:g}, and betas must stay below 1. "
            "Use at least 21 steps, or the cosine schedule, or train with 1000 steps and respace when sampling."
        )
    return np.linspace(scale * 0.0001, scale * 0.02, num_steps, dtype=np.float64)


def cosine_betas(num_steps: int) -> np.ndarray:
    """alpha_bar falls as a squared cosine, with an offset that keeps the first steps from vanishing (arXiv 2102.09672, eq. 17)."""
    return betas_for_alpha_bar(num_steps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


LAST_ALPHA_BAR = 1e-9


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """The schedule shifted and scaled so that nothing of the data is left at the last step (arXiv 2305.08891, algorithm 1).

    sqrt(alpha_bar) becomes 0 at the last step and stays what it was at the first. To keep every table finite, alpha_bar is not 0 there
    but `LAST_ALPHA_BAR`, or half of the step before if that is less: sqrt(alpha_bar) differs from 0 by at most 3.2e-5.
    """
    if len(betas) < 2:
        raise ValueError(f"--zero_terminal_snr True needs at least 2 steps; --diffusion_steps is {len(betas)}")
    root = np.sqrt(np.cumprod(1.0 - betas))
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alpha_bar[-1] = min(LAST_ALPHA_BAR, alpha_bar[-2] / 2)
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])


# Name -> function of the number of steps. Programs may add entries before they train or load.
SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": linear_betas, "cosine": cosine_betas}


def named_betas(name: str, num_steps: int) -> np.ndarray:
    """The schedule of that name over `num_steps` steps, float64 `[num_steps]`."""
    if name not in SCHEDULES:
        raise ValueError(f"--noise_schedule is {name!r}; it must be one of {', '.join(SCHEDULES)}")
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {num_steps}")
    return SCHEDULES[name](num_steps)
