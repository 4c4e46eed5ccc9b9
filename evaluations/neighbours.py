"""Precision, recall, density and coverage from k nearest neighbours, tiled, in bounded memory.

Precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991), as the 2021 evaluator computes them: squared
Euclidean distances, the radius of a point is the distance to its k-th nearest other point of the same set, a point is
inside a ball when distance <= radius. Density and coverage: Naeem et al. 2020 (arXiv:2002.09797), on the same balls.

Distances are computed by a matrix product, `|u|^2 - 2 u.v + |v|^2`. Its rounding errors could move points across a radius, and
they differ between machines and tile sizes. So a comparison within the rounding bound is decided by the float64 distance of that
pair, summed from differences. The result is that of exact arithmetic, for any tile size and device.

`dtype=torch.float16` computes as the 2021 evaluator: each block of 10,000 x 10,000 in half precision, or in float32 if the block
overflows. Scores come out slightly too high (about 0.001 in precision and 0.002 in recall).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from .arithmetic import full_float32

PUBLISHED_BLOCK = 10_000
GROUPS = 20
_SPARE = 4  # candidates kept beyond the k + 1 nearest, so that rounding does not lose one


class Neighbours(NamedTuple):
    """Which images lie in which balls; every metric here is a mean over one of these arrays.

    ball_counts [n samples] int: number of reference balls around each sample. Group i of at most 20 groups has the samples i, i + 20,
    i + 40, ... by_group [groups, m references] bool: the reference is within a ball of the group's samples. occupied_by_group, alike:
    the reference's own ball holds a sample of the group. The groups serve the error bars of recall and coverage.
    """

    ball_counts: np.ndarray
    by_group: np.ndarray
    occupied_by_group: np.ndarray
    k: int

    @property
    def inside_reference(self) -> np.ndarray:
        """[n] bool: within some reference ball."""
        return self.ball_counts > 0

    @property
    def inside_sample(self) -> np.ndarray:
        """[m] bool: within some sample ball."""
        return np.asarray(self.by_group.any(axis=0))

    @property
    def precision(self) -> float:
        """Share of samples within some reference ball."""
        return float(self.inside_reference.mean())

    @property
    def recall(self) -> float:
        """Share of references within some sample ball."""
        return float(self.inside_sample.mean())

    @property
    def density(self) -> float:
        """Mean number of reference balls around a sample, divided by k. May exceed 1."""
        return float(self.ball_counts.mean() / self.k)

    @property
    def coverage(self) -> float:
        """Share of references whose own ball holds some sample."""
        return float(self.occupied_by_group.any(axis=0).mean())


class _Method(NamedTuple):
    """How distances are computed by matrix products."""

    dtype: torch.dtype
    device: torch.device | str
    tile: int
    exact: bool
    """Whether comparisons within the rounding bound are decided in float64."""


def neighbours(
    sample: Any,
    reference: Any,
    *,
    k: int = 3,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    reference_radii: np.ndarray | None = None,
    tile: int = 1024,
) -> Neighbours:
    """Compare two feature matrices [n, d] and [m, d]; see `Neighbours`.

    dtype: torch.float32 or torch.float64 (of the products; same result), or torch.float16 (as the 2021 evaluator).
    reference_radii: squared radii of the reference, to reuse those of an earlier call with the same k and dtype.
    tile: rows per product; memory beyond the inputs is about `tile` x 10,000 x 20 bytes.
    """
    x, y = _matrix(sample, "sample", k), _matrix(reference, "reference", k)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"cannot compare {x.shape[1]} features with {y.shape[1]}")
    how = _how(dtype, device, tile, x, y)
    radii_x, radii_y = _radii(x, k, how), _radii(y, k, how) if reference_radii is None else reference_radii
    shape = min(GROUPS, len(x)), len(y)
    result = Neighbours(np.zeros(len(x), np.int64), np.zeros(shape, bool), np.zeros(shape, bool), k)
    with full_float32():
        for rows in _spans(len(x), PUBLISHED_BLOCK):
            for columns in _spans(len(y), PUBLISHED_BLOCK):
                block_how = how
                if how.dtype == torch.float16 and not _fits_half(x[rows], y[columns], how):
                    block_how = how._replace(dtype=torch.float32)
                for at in _spans(rows.stop, tile, rows.start):
                    masks = _inside(x[at], y[columns], radii_x[at], radii_y[columns], block_how)
                    _add(result, *masks, at, columns)
    return result


def squared_radii(
    points: Any, *, k: int = 3, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tile: int = 1024
) -> np.ndarray:
    """Squared distance [n] of each point to its k-th nearest other point of the set, float64."""
    x = _matrix(points, "points", k)
    return _radii(x, k, _how(dtype, device, tile, x))


def _matrix(features: Any, name: str, k: int) -> np.ndarray:
    matrix = np.ascontiguousarray(np.asarray(features))
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise ValueError(f"{name}: features must be a float matrix [n, d], got {matrix.dtype} {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: features hold values that are not finite")
    if len(matrix) <= k:
        raise ValueError(f"k = {k} neighbours need at least {k + 1} images in each set, got {len(matrix)}")
    return matrix


def _how(dtype: torch.dtype, device: torch.device | str, tile: int, *sets: np.ndarray) -> _Method:
    """The method of computing distances; in float64 if squared distances would overflow float32."""
    largest = max(float(np.einsum("ij,ij->i", part, part, dtype=np.float64).max()) for part in sets)
    if 4 * largest >= torch.finfo(torch.float32).max:
        dtype = torch.float64
    return _Method(dtype, device, tile, dtype != torch.float16)


def _spans(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def _distances(u: np.ndarray, v: np.ndarray, how: _Method) -> torch.Tensor:
    """Squared distances [len(u), len(v)] by one matrix product in `how.dtype`, not negative."""
    a, b = (torch.from_numpy(part).to(device=how.device, dtype=how.dtype) for part in (u, v))
    if how.dtype == torch.float16:
        # As accelerators do, sum products of half-precision numbers in float32 and round once.
        rounded_a, rounded_b = a.float(), b.float()
        norm_a, norm_b = rounded_a.square().sum(dim=1).half(), rounded_b.square().sum(dim=1).half()
        product = (rounded_a @ rounded_b.T).half()
    else:
        norm_a, norm_b = a.square().sum(dim=1), b.square().sum(dim=1)
        product = a @ b.T
    product.mul_(-2).add_(norm_a[:, None]).add_(norm_b[None, :])
    return product if how.dtype == torch.float16 else product.clamp_(min=0)


def _margin(u: np.ndarray, v: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bound [len(u)] of the rounding error of `_distances`, for any order of summation (Higham 2002, section 3.1)."""
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    underflow = torch.finfo(dtype).tiny  # smaller products lose all their digits
    norm_u = np.einsum("ij,ij->i", u, u, dtype=np.float64)
    norm_v = np.einsum("ij,ij->i", v, v, dtype=np.float64).max()
    return (u.shape[1] + 8) * (unit * (norm_u + norm_v) + underflow)


def _exact(x: np.ndarray, i: np.ndarray, y: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Float64 squared distances of the pairs (x[i], y[j]): the same bits for (a, b) and (b, a), and 0 for equal points."""
    result = np.empty(len(i))
    for span in _spans(len(i), max(1, (16 << 20) // (8 * x.shape[1]))):
        difference = x[i[span]].astype(np.float64) - y[j[span]]
        result[span] = np.einsum("ij,ij->i", difference, difference)
    return result


def _radii(x: np.ndarray, k: int, how: _Method) -> np.ndarray:
    """As `squared_radii`. Candidates from float32 distances settle nearly all; those from float64, and finally all pairs, the rest."""
    with full_float32():
        if how.dtype == torch.float16:
            return _published_radii(x, k, how)
        radii, unsettled = np.empty(len(x)), np.arange(len(x))
        for dtype in (how.dtype, torch.float64):
            if len(unsettled):
                unsettled = _settle_radii(x, unsettled, radii, k, how._replace(dtype=dtype))
    everyone = np.arange(len(x))
    for row in unsettled:  # more ties than candidates even in float64
        radii[row] = np.partition(_exact(x, np.full(len(x), row), x, everyone), k)[k]
    return radii


def _settle_radii(x: np.ndarray, rows: np.ndarray, radii: np.ndarray, k: int, how: _Method) -> np.ndarray:
    """Write the radii of those `rows` whose nearest points are certain from a few candidates; return the other rows."""
    keep = min(k + 1 + _SPARE, len(x))
    unsettled = []
    for part in (rows[span] for span in _spans(len(rows), how.tile)):
        values = torch.empty(len(part), 0, device=how.device)
        indices = torch.empty(len(part), 0, dtype=torch.long, device=how.device)
        for block in _spans(len(x), PUBLISHED_BLOCK):
            distances = _distances(x[part], x[block], how)
            near = distances.topk(min(keep, distances.shape[1]), dim=1, largest=False)
            values, indices = torch.cat([values, near.values], 1), torch.cat([indices, near.indices + block.start], 1)
            values, order = values.topk(min(keep, values.shape[1]), dim=1, largest=False)
            indices = indices.gather(1, order)
        candidates = indices.cpu().numpy()
        exact = _exact(x, np.repeat(part, keep), x, candidates.reshape(-1)).reshape(len(part), keep)
        exact.sort(axis=1)
        radii[part] = exact[:, k]
        # All other points are at least as far as the farthest candidate, up to the rounding errors of both.
        left_out = values[:, -1].double().cpu().numpy() - 2 * _margin(x[part], x, how.dtype)
        settled = (exact[:, k] <= left_out) | (exact[:, k] == 0) | (keep == len(x))
        unsettled.append(part[~settled])
    return np.concatenate(unsettled)


def _add(result: Neighbours, in_reference: torch.Tensor, in_sample: torch.Tensor, rows: slice, columns: slice) -> None:
    """Add the masks [rows, columns] of pairs (sample, reference), see `_inside`, to `result`, in place."""
    groups = len(result.by_group)
    result.ball_counts[rows] += in_reference.view(torch.uint8).sum(dim=1, dtype=torch.int32).cpu().numpy()
    for offset in range(min(groups, rows.stop - rows.start)):
        group = (rows.start + offset) % groups
        # The maximum of bytes equals any() and is thirty times faster on a CPU.
        for mask, reached in ((in_sample, result.by_group), (in_reference, result.occupied_by_group)):
            part = mask[offset::groups].view(torch.uint8).amax(dim=0)
            reached[group, columns] |= part.cpu().numpy().view(bool)


def _inside(
    u: np.ndarray, v: np.ndarray, radii_u: np.ndarray, radii_v: np.ndarray, how: _Method
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks [len(u), len(v)]: v's ball holds u; u's ball holds v. Comparisons within the rounding bound are decided exactly."""
    distances = _distances(u, v, how)
    margin = torch.from_numpy(_margin(u, v, how.dtype)[:, None]).to(distances) if how.exact else None
    masks = []
    for radii in (radii_v[None, :], radii_u[:, None]):
        radius = torch.from_numpy(radii).to(distances)
        mask = distances <= radius
        if margin is not None:
            # The error of rounding the radius to the dtype is far below the margin, at least 8 rounding units of the norms.
            close = ((distances - radius).abs_() <= margin).nonzero()
            if len(close) > mask.numel() // 64 and how.dtype == torch.float32:
                return _inside(u, v, radii_u, radii_v, how._replace(dtype=torch.float64))
            if len(close):
                i, j = close.cpu().numpy().T
                settled = _exact(u, i, v, j) <= np.broadcast_to(radii, mask.shape)[i, j]
                mask[close[:, 0], close[:, 1]] = torch.from_numpy(settled).to(mask.device)
        masks.append(mask)
    return masks[0], masks[1]


def _fits_half(u: np.ndarray, v: np.ndarray, how: _Method) -> bool:
    """Whether all half-precision distances of a block are finite.

    The 2021 evaluator missed an overflow of u.v alone: minus infinity was clamped to distance 0, and the block counted as finite.
    Here that block falls back to float32 like the others.
    """
    return all(bool(torch.isfinite(_distances(u[span], v, how)).all()) for span in _spans(len(u), how.tile))


def _published_radii(x: np.ndarray, k: int, how: _Method) -> np.ndarray:
    """Radii from half-precision blocks, each falling back to float32 as a whole."""
    radii = np.empty(len(x))
    for rows in _spans(len(x), PUBLISHED_BLOCK):
        u = x[rows]
        best = torch.empty(len(u), 0, device=how.device)
        for columns in _spans(len(x), PUBLISHED_BLOCK):
            v = x[columns]
            block_how = how if _fits_half(u, v, how) else how._replace(dtype=torch.float32)
            parts = (_distances(u[span], v, block_how).float().clamp_(min=0) for span in _spans(len(u), how.tile))
            kept = [part.topk(min(k + 1, len(v)), dim=1, largest=False).values for part in parts]
            best = torch.cat([best, torch.cat(kept)], dim=1)
            best = best.topk(min(k + 1, best.shape[1]), dim=1, largest=False).values
        radii[rows] = best[:, k].double().cpu().numpy()
    return radii
