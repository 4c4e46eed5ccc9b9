"""Mean and covariance of features: float64, streaming, mergeable, and the same bits however the images were cut up.

Floating-point addition is not associative, so a running sum depends on batch size and on the number of processes. Here
the order of additions is fixed by the *absolute index* of each image instead. Rows are grouped into blocks of 1024
consecutive indices; each block is reduced in one go; blocks are combined along the one binary tree over block numbers
(node `(level, j)` covers blocks `j * 2**level` up to `(j + 1) * 2**level`). Any batches, shards or order of merging
give the same tree, hence the same bits on one machine with one number of BLAS threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

BLOCK = 1024


class Node(NamedTuple):
    """Partial result: number of rows, their mean [d] and their scatter [d, d], float64."""

    rows: int
    mean: np.ndarray
    scatter: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """Mean `mu` [d] and covariance `sigma` [d, d] (divided by n - 1), float64.

    `count` is the number of images behind them, or None where a file did not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None

    @property
    def dim(self) -> int:
        """Number of features d."""
        return int(self.mu.shape[0])


class Moments:
    """Accumulates features by absolute image index; see the module's text for the order of additions.

    >>> m = Moments(2048); m.add(batch, start=0); m.add(next_batch, start=64); m.statistics()
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"the number of features must be at least 1, got {dim}")
        self.dim = dim
        self._nodes: dict[tuple[int, int], Node] = {}
        self._pending: dict[int, dict[int, np.ndarray]] = {}

    def add(self, rows: Any, start: int) -> None:
        """Add `rows` [n, d] (array or CPU tensor) of the images with absolute indices `start`, `start + 1`, ..."""
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"features must have shape [n, {self.dim}], got {list(rows.shape)}")
        if start < 0:
            raise ValueError(f"the absolute index of the first image must not be negative, got {start}")
        stop, at = start + len(rows), start
        while at < stop:
            block = at // BLOCK
            end = min(stop, (block + 1) * BLOCK)
            self._place(block, at, rows[at - start : end - start])
            at = end

    def merge(self, other: Moments) -> None:
        """Take in what another part of the same set has gathered; the other is left as it was."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge {other.dim} features into {self.dim}")
        for block, pieces in other._pending.items():
            for at, rows in pieces.items():
                self._place(block, at, rows)
        for key, node in other._nodes.items():
            self._insert(key, node)

    @property
    def count(self) -> int:
        """Number of images added so far."""
        waiting = sum(len(rows) for pieces in self._pending.values() for rows in pieces.values())
        return waiting + sum(node.rows for node in self._nodes.values())

    def statistics(self) -> Statistics:
        """Mean and covariance of all images added. ValueError when fewer than two, or when an index is missing."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        leaves = [(block * BLOCK, *self._leaf(block)) for block in self._pending]
        spans = [(j * BLOCK << level, node) for (level, j), node in self._nodes.items()]
        spans += [(first, node) for first, _, node in leaves]
        spans.sort(key=lambda item: item[0])
        ends = {first: end for first, end, _ in leaves}
        expected = 0
        for first, node in spans:
            if first != expected:
                raise ValueError(f"images {expected} to {first - 1} were never added, so the set has a hole")
            expected = ends.get(first, first + node.rows)
        # Right to left: small last pieces meet each other before they meet the big left ones.
        total = spans[-1][1]
        for _, node in reversed(spans[:-1]):
            total = _combine(node, total)
        return Statistics(total.mean, total.scatter / (total.rows - 1), total.rows)

    def _place(self, block: int, at: int, rows: np.ndarray) -> None:
        if self._covered(block):
            raise ValueError(f"image {at} was added twice")
        pieces = self._pending.setdefault(block, {})
        for other, there in pieces.items():
            if at < other + len(there) and other < at + len(rows):
                raise ValueError(f"image {max(at, other)} was added twice")
        pieces[at] = np.array(rows)  # a copy: the caller may reuse its buffer
        if sum(len(piece) for piece in pieces.values()) == BLOCK:
            _, node = self._leaf(block)
            del self._pending[block]
            self._insert((0, block), node)

    def _leaf(self, block: int) -> tuple[int, Node]:
        """Reduce what is there of one block: (index after the last image, node)."""
        pieces = sorted(self._pending[block].items())
        at = pieces[0][0]
        if at != block * BLOCK:
            raise ValueError(f"images {block * BLOCK} to {at - 1} were never added, so the set has a hole")
        for start, rows in pieces:
            if start != at:
                raise ValueError(f"images {at} to {start - 1} were never added, so the set has a hole")
            at = start + len(rows)
        return at, _reduce(np.concatenate([rows for _, rows in pieces]))

    def _covered(self, block: int) -> bool:
        return any(block >> level == j for level, j in self._nodes)

    def _insert(self, key: tuple[int, int], node: Node) -> None:
        level, j = key
        inside = [i << lower for lower, i in self._nodes] + list(self._pending)
        if self._covered(j << level) or any(block >> level == j for block in inside):
            raise ValueError(f"an image among {j * BLOCK << level} to {((j + 1) * BLOCK << level) - 1} was added twice")
        while (sibling := (level, j ^ 1)) in self._nodes:
            other = self._nodes.pop(sibling)
            node = _combine(node, other) if j % 2 == 0 else _combine(other, node)
            level, j = level + 1, j // 2
        self._nodes[level, j] = node


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
    moments.add(features, 0)
    return moments.statistics()


def from_batches(batches: Iterable[Any]) -> Statistics:
    """Statistics of a stream of feature batches [b, d] in image order; holds no more than a few covariances."""
    moments: Moments | None = None
    at = 0
    for batch in batches:
        batch = np.asarray(batch)
        moments = moments or Moments(batch.shape[1])
        moments.add(batch, at)
        at += len(batch)
    if moments is None:
        raise ValueError("no features were given")
    return moments.statistics()


def checked(mu: Any, sigma: Any, *, name: str = "statistics", count: int | None = None) -> Statistics:
    """Statistics from outside, as float64, after a look at shape, finiteness and symmetry."""
    mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{name}: mean and covariance must be [d] and [d, d], got {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: mean or covariance holds values that are not finite")
    scale = float(np.abs(sigma).max(initial=0.0))
    if float(np.abs(sigma - sigma.T).max(initial=0.0)) > 1e-4 * scale:
        raise ValueError(f"{name}: the covariance is not symmetric")
    # Rounding to float32 makes eigenvalues of some 1e-7 of the largest negative; no more can come from images.
    slack = 1e-4 * scale * np.eye(len(mu))
    if scale and torch.linalg.cholesky_ex(torch.from_numpy(sigma + slack)).info:
        raise ValueError(f"{name}: the covariance is that of no data (it has negative eigenvalues)")
    return Statistics(mu, sigma, count)
