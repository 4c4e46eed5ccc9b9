"""Standard errors of scores: how much a score would vary if other samples were drawn; and of differences between two sets.

Most metrics are smooth functions of averages over images. To first order such a metric varies like the mean of one number per
image, its *influence*; the standard error is then that of a mean (the infinitesimal jackknife, Efron 1982). It needs no
resampling, and the influences of two sets give the standard error of their difference, which a comparison needs.

Exceptions: recall and coverage (`group_jackknife_se`), and FID with no more images than features or a singular covariance
(`_leave_groups_out`). There twenty groups are left out in turn (the delete-a-group jackknife), and their pseudo-values are
used as influences.

The reference is held fixed: these are errors of "the score of this model against this reference". They do not include bias: FID at
few samples is too high by far more than its standard error (see `metrics.fid_infinity`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .metrics import Extrapolation, covariance_root
from .statistics import Statistics

GROUPS = 20


class Uncertainty(NamedTuple):
    """One standard error, how it was found, and the influences behind it (one per image or per group)."""

    error: float
    method: str
    influence: np.ndarray


def mean_se(influence: np.ndarray, method: str = "infinitesimal jackknife over images") -> Uncertainty:
    """Standard error of a mean of `influence` [n]: root of sum of squares / (n (n - 1)), after centring."""
    influence = np.asarray(influence, dtype=np.float64)
    count = len(influence)
    centred = influence - influence.mean()
    # Divide by a power of two first, because squares of KID's influences may overflow.
    scale = np.ldexp(1.0, np.frexp(np.abs(centred).max(initial=0.0))[1])
    error = float(scale * np.sqrt(((centred / scale) ** 2).sum() / (count * max(count - 1, 1))))
    return Uncertainty(error, method, centred)


def within_classes(whole: Uncertainty, labels: np.ndarray) -> Uncertainty:
    """The standard error of a set with as many images of each class by design, from that of images drawn at random.

    Other samples would have the same number of each class, so the spread between classes is no error: influences are centred
    within each class (stratified sampling). Unchanged unless `labels` [n], one for each influence, are balanced.
    """
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    count, classes = len(labels), len(counts)
    if len(whole.influence) != count or classes < 2 or counts.min() < max(2, counts.max() - 1):
        return whole
    centred = whole.influence - (np.bincount(index, whole.influence) / counts)[index]
    return mean_se(centred * np.sqrt((count - 1) / (count - classes)), f"{whole.method}, within balanced classes")


def group_jackknife_se(by_group: np.ndarray) -> Uncertainty:
    """Standard error of recall or coverage over the samples.

    `by_group` [g, m] bool: the references that the samples of each group reach (`Neighbours.by_group`,
    `.occupied_by_group`); group i holds the samples i, i + g, i + 2g, ... Each group is left out in turn; for recall the balls of
    the other samples keep their radii. Both scores depend on single samples at the edge of the distribution, not on averages, so the
    estimate is rough: 0.8 to 1.6 times the true standard deviation over repeated sample sets. For recall, the binomial error over
    references, which ignores sampling variance, is 0.35 to 1.1 times the true one.
    """
    parts = len(by_group)
    others = by_group.sum(axis=0) - by_group  # by how many of the other groups each reference is reached
    left_out = (others > 0).mean(axis=1)
    return mean_se((parts - 1) * (left_out.mean() - left_out), f"jackknife over {parts} groups of samples")


def extrapolation_se(infinity: Extrapolation, distance: Uncertainty) -> float:
    """Standard error of `metrics.fid_infinity`, from that of the distance at all n samples (same influences).

    The intercept is a weighted sum of the distances of subsets, with weights w that add up to 1. All subsets share the sampling error
    of the n samples; drawing n_i of these adds a variance of error^2 (n / n_i - 1).
    """
    inverse = 1 / np.array(infinity.counts, dtype=np.float64)
    weights = np.linalg.pinv(np.stack([np.ones_like(inverse), inverse], axis=1))[0]
    extra = inverse / inverse.min() - 1
    return float(distance.error * np.sqrt(1 + (weights**2 * extra).sum()))


def frechet_se(
    sample: Statistics,
    reference: Statistics,
    *,
    reference_root: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Uncertainty:
    """Standard error of FID or sFID over the sample's images. `sample.rows` must hold their features.

    `reference_root`: `metrics.covariance_root` of the reference, if it has been computed already.
    """
    features = sample.rows
    assert features is not None
    if len(features) > sample.dim:
        lower, info = torch.linalg.cholesky_ex(torch.from_numpy(np.ascontiguousarray(sample.sigma)).to(device))
        if int(info) == 0:
            return mean_se(_frechet_influence(features, sample, reference, lower))
    root = covariance_root(reference, device) if reference_root is None else reference_root
    return _leave_groups_out(features, sample, reference, root)


def _frechet_influence(
    features: np.ndarray, sample: Statistics, reference: Statistics, lower: torch.Tensor
) -> np.ndarray:
    """Influence [n] of each image: 2 (m1 - m2).(x - m1) + (x - m1)^T (I - T)(x - m1), up to a constant.

    T = L^-T (L^T S2 L)^(1/2) L^-1 with S1 = L L^T is the optimal transport map between the Gaussians, and I - T the
    derivative of the distance with respect to S1 (Gelbrich 1990; Takatsu 2011).
    """
    device = lower.device
    other = torch.from_numpy(np.ascontiguousarray(reference.sigma)).to(device)
    values, vectors = torch.linalg.eigh(lower.T @ other @ lower)
    weights = values.clamp(min=0).sqrt()
    mu = torch.from_numpy(sample.mu).to(device)
    shift = 2 * (mu - torch.from_numpy(reference.mu).to(device))
    parts = []
    for start in range(0, len(features), 4096):
        rows = torch.from_numpy(features[start : start + 4096].astype(np.float64)).to(device) - mu
        white = torch.linalg.solve_triangular(lower, rows.T, upper=False).T @ vectors
        parts.append((rows @ shift + rows.square().sum(dim=1) - white.square() @ weights).cpu().numpy())
    return np.concatenate(parts)


def _leave_groups_out(
    features: np.ndarray, sample: Statistics, reference: Statistics, reference_root: torch.Tensor
) -> Uncertainty:
    """Delete-a-group jackknife, with the exact (singular value) form of the distance for the remaining images.

    A group is a run of consecutive images (unlike the interleaved groups of `group_jackknife_se`).
    """
    count, device = len(features), reference_root.device
    parts = min(GROUPS, count // 2)
    rows = torch.from_numpy(features.astype(np.float64) - sample.mu).to(device)
    across = rows @ reference_root.T
    shift = torch.from_numpy(sample.mu - reference.mu).to(device)
    values = []
    # All groups have the same size, and a few last images are in none: so the bias of the distance, about 1/n, is the same for all.
    size = count // parts
    for group in range(parts):
        keep = torch.ones(count, dtype=torch.bool, device=device)
        keep[group * size : (group + 1) * size] = False
        # The distance without tr S2, which is constant: |m1 - m2|^2 + tr S1 - 2 tr (S1 S2)^(1/2).
        kept, product = rows[keep], across[keep]
        mean = kept.mean(dim=0)
        mean_difference = shift + mean
        trace = (kept - mean).square().sum() / (len(kept) - 1)
        cross = torch.linalg.svdvals(product - product.mean(dim=0)).sum() / np.sqrt(len(kept) - 1)
        values.append(float(mean_difference @ mean_difference + trace - 2 * cross))
    left_out = np.array(values)
    scale = (count - size) / size * np.sqrt(parts * size / count)
    return mean_se(scale * (left_out.mean() - left_out), f"jackknife over {parts} groups of images")


def paired_difference_se(first: Uncertainty, second: Uncertainty) -> tuple[float, bool]:
    """Standard error of the difference of two sets' scores against one reference, and whether images were paired.

    Sets of equal size are paired by position, on the assumption that image i (or group i) of both used the same seed and label: their
    common variation then cancels. Only the size is checked; for unrelated sets pairing gives the same error on average.
    """
    a, b = first.influence, second.influence
    if len(a) == len(b):
        return mean_se(a - b).error, True
    return float(np.hypot(first.error, second.error)), False
