"""Mean and covariance of features: float64, streaming, and the same bits however the images were cut into batches.

Floating-point addition is not associative, so a running sum depends on the batch size. Here the order of additions is fixed by the
index of each image instead. Rows are grouped into blocks of 1024 consecutive images; each block is reduced in one go; blocks are
combined along a binary tree over block numbers. Any batches give the same tree, hence the same bits on one machine with one number
of BLAS threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

BLOCK = 1024


class Node(NamedTuple):
    """Partial result, float64: number of rows, their mean [d], and their scatter [d, d], the sum of (x - mean)(x - mean)^T."""

    rows: int
    mean: np.ndarray
    scatter: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """Mean `mu` [d] and covariance `sigma` [d, d] (divided by n - 1), float64.

    `count` is the number of images behind them, or None where a file does not hold it. `rows` [n, d] are their features, or None where
    these are not at hand.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    rows: np.ndarray | None = None

    @property
    def dim(self) -> int:
        """Number of features d."""
        return int(self.mu.shape[0])


class Stored(NamedTuple):
    """Precomputed statistics of Inception features: `pool` for FID, `spatial` for sFID, None where a file has none."""

    pool: Statistics
    spatial: Statistics | None


class Moments:
    """Accumulates the features of images in order; see the module's text for the order of additions.

    >>> m = Moments(2048); m.add(batch); m.add(next_batch); m.statistics()
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        """Number of images added so far."""
        self._pending: list[np.ndarray] = []  # rows of the block that is not full yet
        self._nodes: list[
            tuple[int, Node]
        ] = []  # (level, node) from left to right; a node of level l covers 2**l blocks

    def add(self, rows: Any) -> None:
        """Add `rows` [n, d] (array or CPU tensor) of the next n images."""
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"features must have shape [n, {self.dim}], got {list(rows.shape)}")
        while len(rows):
            part, rows = np.split(rows, [BLOCK - self.count % BLOCK])
            self._pending.append(part.copy())  # the caller may reuse its buffer
            self.count += len(part)
            if self.count % BLOCK == 0:
                self._close_block()

    def _close_block(self) -> None:
        """Reduce a full block, and combine as binary numbers carry: two nodes of one level become one of the next."""
        level, node = 0, _reduce(np.concatenate(self._pending))
        self._pending = []
        while self._nodes and self._nodes[-1][0] == level:
            level, node = level + 1, _combine(self._nodes.pop()[1], node)
        self._nodes.append((level, node))

    def statistics(self) -> Statistics:
        """Mean and covariance of all images added. ValueError when fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        nodes = [node for _, node in self._nodes]
        if self._pending:
            nodes.append(_reduce(np.concatenate(self._pending)))
        # From right to left, so that the small pieces at the end are combined first: with a large one each would lose digits.
        total = nodes.pop()
        for node in reversed(nodes):
            total = _combine(node, total)
        return Statistics(total.mean, total.scatter / (total.rows - 1), total.rows)


def _reduce(rows: np.ndarray) -> Node:
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    return Node(len(rows), mean, rows.T @ rows)


def _combine(left: Node, right: Node) -> Node:
    """Pairwise update of mean and scatter: Chan, Golub & LeVeque (1983), equation 2.1."""
    count = left.rows + right.rows
    delta = right.mean - left.mean
    mean = left.mean + delta * (right.rows / count)
    scatter = left.scatter + right.scatter
    scatter += np.outer(delta, delta) * (left.rows * right.rows / count)
    return Node(count, mean, scatter)


def from_features(features: Any) -> Statistics:
    """Statistics of a whole matrix [n, d] (array or CPU tensor) already in memory."""
    features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"features must be a matrix [images, features], got shape {list(features.shape)}")
    moments = Moments(features.shape[1])
    moments.add(features)
    return replace(moments.statistics(), rows=features)


def validated(mu: Any, sigma: Any, *, name: str = "statistics") -> Statistics:
    """Statistics from outside, mean [d] and covariance [d, d], as float64; ValueError unless they are finite
    and the covariance symmetric and positive semi-definite."""
    mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: mean or covariance holds values that are not finite")
    scale = float(np.abs(sigma).max(initial=0.0))
    if float(np.abs(sigma - sigma.T).max(initial=0.0)) > 1e-4 * scale:
        raise ValueError(f"{name}: the covariance is not symmetric")
    # Rounding to float32 can leave eigenvalues down to about -1e-7 times the largest. As much as 1e-4 times the largest entry is
    # allowed: with that on the diagonal the Cholesky decomposition must exist.
    slack = 1e-4 * scale * np.eye(len(mu))
    if scale and torch.linalg.cholesky_ex(torch.from_numpy(sigma + slack)).info:
        raise ValueError(f"{name}: the covariance is not positive semi-definite (it has negative eigenvalues)")
    return Statistics(mu, sigma)
