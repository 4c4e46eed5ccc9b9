"""Multistep rules: the weights of every move of a chain, numbers of the host in float64, made from its grid before the first step.

All advance the same linear equation exactly and differ in how they extrapolate the prediction over a move. With h = lam' - lam, where a
prime marks the node moved to, and the predictions f newest first:

    data form    x' = (sigma'/sigma) e^(-tau2 h) x + alpha' sum_j w_j x0_j + sigma' sqrt(1 - e^(-2 tau2 h)) z
    noise form   x' = (alpha'/alpha) x + sum_j w_j eps_j

tau2 = 0 is the probability-flow equation, tau2 = 1 the reverse diffusion. In points, time over a move goes from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .grids import Grid


class Row(NamedTuple):
    """One move: x' = `x` times x, plus `terms[j]` times the prediction of j nodes before, plus `noise` times normal numbers."""

    x: float
    terms: tuple[float, ...]
    noise: float = 0.0


# Weights in x' of the newest predictions, newest first, for the move from node n.
Weights = Callable[[int], np.ndarray]


class Move(NamedTuple):
    """From node n to the next: the weight of x, the factor of the sum, the exponent H of the integrals, and the scale of the noise."""

    x: float
    factor: float
    exponent: float
    noise: float


def data_moves(grid: Grid, tau2: float = 0.0) -> list[Move]:
    """Moves in data form; the exponent is (1 + tau2) h."""
    h = np.diff(grid.lam)
    x = grid.sigma[1:] / grid.sigma[:-1] * np.exp(-tau2 * h)
    noise = grid.sigma[1:] * np.sqrt(-np.expm1(-2 * tau2 * h))
    columns = (x, grid.alpha[1:], (1 + tau2) * h, noise)
    return [Move(*move) for move in zip(*(column.tolist() for column in columns))]


def noise_moves(grid: Grid) -> list[Move]:
    """Moves in noise form: the same integrals with -h as exponent."""
    x, h = grid.alpha[1:] / grid.alpha[:-1], np.diff(grid.lam)
    columns = (x, grid.sigma[1:], -h, 0 * h)
    return [Move(*move) for move in zip(*(column.tolist() for column in columns))]


def merged(moves: Sequence[Move], predict: Weights, correct: Weights | None = None) -> list[Row]:
    """One row per move. `correct(n)` are the weights of the corrected move, those of the new node's prediction first.

    A corrector changes x at the new node by a sum of predictions that the next move uses anyway: its weights are merged into those of
    the next move. The last node, which no move leaves, is not corrected. Normal numbers are the same in both.
    """
    rows, change = [], np.zeros(0)
    for n, move in enumerate(moves):
        weights = predict(n)
        rows.append(Row(move.x, tuple(_sum(move.x * change, weights).tolist()), move.noise))
        if correct is not None:
            change = _sum(correct(n), -np.append(0.0, weights))
    return rows


def of_noise(rows: Sequence[Row], grid: Grid) -> list[Row]:
    """Rows of eps as rows of sigma eps = x - alpha x0, which is one operation less."""
    sigma = grid.sigma
    return [
        row._replace(terms=tuple(float(w / sigma[n - j]) for j, w in enumerate(row.terms)))
        for n, row in enumerate(rows)
    ]


def _sum(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    length = max(len(one), len(other))
    return np.pad(one, (0, length - len(one))) + np.pad(other, (0, length - len(other)))


def order_of(n: int, grid: Grid, order: int, final_order: int) -> int:
    """The order of the move from node n: less at the start, where the past is short, and less before the end, where moves are wide."""
    return min(order, n + 1, len(grid) - 2 - n + final_order)


def points(n: int, axis: np.ndarray, count: int, new: bool = False) -> np.ndarray:
    """Node n and those before it on an axis (lam, say) where node n is 0 and the next is 1; with `new` the next one first."""
    nodes = axis[n - count + 1 + new : n + 1 + new][::-1]
    return (nodes - axis[n]) / (axis[n + 1] - axis[n])


@lru_cache(maxsize=1)
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre places and weights for integrals from 0 to 1, exact to rounding for what follows."""
    at, weights = np.polynomial.legendre.leggauss(60)
    return (at + 1) / 2, weights / 2


def lagrange(nodes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The Lagrange polynomials of these nodes at places, `[nodes, places]`."""
    others = [np.delete(nodes, j) for j in range(len(nodes))]
    return np.array(
        [np.prod([(at - m) / (node - m) for m in rest], axis=0) + 0 * at for node, rest in zip(nodes, others)]
    )


def mean_weights(nodes: np.ndarray) -> np.ndarray:
    """Weights with which a polynomial through these nodes has its mean over the move."""
    at, weights = _quadrature()
    return lagrange(nodes, at) @ weights


def exact(nodes: np.ndarray, exponent: float) -> np.ndarray:
    """Integrals over the move of H e^(H (v - 1)) times the Lagrange polynomials: exact where f is a polynomial in lam."""
    if len(nodes) == 1:
        return np.array([-math.expm1(-exponent)])
    at, weights = _quadrature()
    return lagrange(nodes, at) @ (weights * exponent * np.exp(exponent * (at - 1)))


def midpoint(nodes: np.ndarray, exponent: float, extent: float | None = None) -> np.ndarray:
    """Second order with half the slope over the whole move; `extent` is what the slope is multiplied by, else that of f."""
    whole = -math.expm1(-exponent)
    slope = (whole if extent is None else extent) / 2 / (nodes[0] - nodes[1])
    return np.array([whole + slope, -slope])


def published(nodes: np.ndarray, exponent: float) -> np.ndarray:
    """Third order as public code has it (Lu et al. 2022, arXiv 2211.01095): half of the second difference, and so of second order."""
    at, weights = _quadrature()
    curve = weights @ (exponent * np.exp(exponent * (at - 1)) * at**2)
    differences = np.array([1 / np.prod(node - np.delete(nodes, j)) for j, node in enumerate(nodes)])
    return exact(nodes, exponent) - curve / 2 * differences


def dpm_weights(nodes: np.ndarray, exponent: float, taylor: bool = False, third_exact: bool = False) -> np.ndarray:
    """DPM-Solver of as many nodes: midpoint at order 2 unless `taylor`; as published at order 3 unless `third_exact`."""
    if len(nodes) == 2 and not taylor:
        return midpoint(nodes, exponent)
    return published(nodes, exponent) if len(nodes) == 3 and not third_exact else exact(nodes, exponent)


def unipc_predictor(nodes: np.ndarray, exponent: float, bh1: bool) -> np.ndarray:
    """UniP (Zhao et al. 2023, arXiv 2302.04867): the exact rule, at order 2 with the shortcut of one half."""
    if len(nodes) == 2:
        return midpoint(nodes, exponent, exponent if bh1 else None)
    return exact(nodes, exponent)


def unipc_corrector(nodes: np.ndarray, exponent: float, bh1: bool) -> np.ndarray:
    """UniC with the new node first: the exact rule, at order 1 with the shortcut of one half on each side."""
    if len(nodes) == 2:
        half = (exponent if bh1 else -math.expm1(-exponent)) / 2
        return np.array([half, -math.expm1(-exponent) - half])
    return exact(nodes, exponent)
