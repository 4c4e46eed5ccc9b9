"""Formulas of averages of weights over a share of the training, and of any such average from those that a run kept (EDM2, arXiv
2312.02696, sections 3.1 and C).

After t updates the power-function average of exponent gamma holds the weights after update s with the share
(s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1): the integral over (s-1, s] of its profile (gamma+1) s^gamma / t^(gamma+1). Its length
is given as sigma_rel, the standard deviation of the profile as a part of t. So it grows with the training, and nothing is left of
the first, random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def sigma_rel_of(gamma: float) -> float:
    """The relative length of the profile of exponent `gamma`."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of relative length `sigma_rel`, the positive root of a cubic; ValueError for a length that no gamma > 0 has."""
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(
            f"an average of relative length {sigma_rel}: it must lie between 0 and 0.288, usual are 0.05 to 0.15"
        )
    square = sigma_rel**-2
    return float(max(np.roots([1, 7, 16 - square, 12 - square]).real))


def decay_at(gamma: float, step: int) -> float:
    """The decay with which the average takes in the weights after update `step`, counted from 1, where it is 0."""
    return float((1 - 1 / step) ** (gamma + 1))


def coefficients(snapshots: Sequence[tuple[int, float]], step: int, gamma: float) -> tuple[np.ndarray, float]:
    """(weights, float64, of the averages `snapshots`, as (step, gamma), whose sum is nearest to the average of `gamma` at `step`;
    the error of the profile that they give, as a part of the profile's norm).

    Least squares over profiles, whose inner products are known in closed form. Beyond the paper, the weights sum to 1: from a few
    snapshots the sum is else up to some percent less, and so would all averaged weights be.
    """
    steps, gammas = (np.array(values, dtype=np.float64) for values in zip(*snapshots))
    products = _inner(steps[:, None], gammas[:, None], steps[None], gammas[None])
    wanted = _inner(steps, gammas, float(step), gamma)
    own = float(_inner(step, gamma, step, gamma))
    # Profiles are scaled to norm 1, as those of early steps are far higher than those of late ones. The last row and column say
    # that the weights sum to 1, with a Lagrange multiplier.
    norms = np.sqrt(np.diag(products))
    sums = norms.min() / norms
    system = np.block([[products / np.outer(norms, norms), sums[:, None]], [sums[None], np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(wanted / norms, norms.min()), rcond=1e-14)[0][:-1] / norms
    error = own - 2 * found @ wanted + found @ products @ found
    return found, float(np.sqrt(max(0.0, error) / own))


def _inner(step: Any, gamma: Any, other_step: Any, other_gamma: Any) -> np.ndarray:
    """The integral of the product of two profiles. It is that of s^(gamma + other_gamma) up to the earlier of both steps."""
    earlier, later = np.minimum(step, other_step), np.maximum(step, other_step)
    ratio = (earlier / later) ** np.where(np.less(step, other_step), other_gamma, gamma)
    return np.asarray((gamma + 1) * (other_gamma + 1) * ratio / ((gamma + other_gamma + 1) * later))
