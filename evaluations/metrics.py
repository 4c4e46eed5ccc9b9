"""Metrics of feature sets: Frechet distance, Inception Score, kernel distance. Float64 throughout, no SciPy.

Inputs are arrays or tensors `[images, features]`, results Python floats. The linear algebra runs on `device` ("cpu", "cuda", ...),
which must support float64. Precision, recall, density and coverage are in `neighbours`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .statistics import Statistics, from_features

_EPS = float(np.finfo(np.float64).eps)
_ROWS = 2048  # rows (images) per matrix product


def frechet_distance(
    sample: Statistics,
    reference: Statistics,
    *,
    reference_root: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Squared Frechet distance between two Gaussians: |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

    Heusel et al. 2017 (arXiv:1706.08500), equation 6. The last trace is the sum of singular values of `A1 A2^T` for any
    `A^T A = S`. With more images than features A is a Cholesky factor. With n <= d images the covariance is rank deficient, and A is
    the matrix of centred features, if `rows` holds them: that is exact, while the square root of a rank-deficient matrix has an error
    of about 2e-5. The distance then depends more on n than on the images. `reference_root`: `covariance_root` of the reference, if
    several calls share it.
    """
    if sample.dim != reference.dim:
        raise ValueError(f"cannot compare {sample.dim} features with {reference.dim}")
    shift = sample.mu - reference.mu
    root = covariance_root(reference, device) if reference_root is None else reference_root
    scale = float(np.trace(sample.sigma) + np.trace(reference.sigma))
    cross = _trace_sqrt(covariance_root(sample, device), root, scale)
    return float(shift @ shift + np.trace(sample.sigma) + np.trace(reference.sigma) - 2 * cross)


def frechet_distance_of_features(sample: Any, reference: Any, *, device: torch.device | str = "cpu") -> float:
    """Frechet distance between two feature matrices [n, d] and [m, d] of the same encoder."""
    return frechet_distance(from_features(sample), from_features(reference), device=device)


def covariance_root(stats: Statistics, device: torch.device | str) -> torch.Tensor:
    """A [r, d] with A^T A = sigma: from the centred rows if there are at most d, else by Cholesky, or eigenvectors if that fails."""
    if stats.rows is not None and len(stats.rows) <= stats.dim:
        rows = stats.rows.astype(np.float64) - stats.mu
        return torch.from_numpy(rows / np.sqrt(len(rows) - 1)).to(device)
    sigma = torch.from_numpy(np.ascontiguousarray(stats.sigma)).to(device)
    lower, info = torch.linalg.cholesky_ex(sigma)
    diagonal = lower.diagonal()
    if int(info) == 0 and float(diagonal.min()) ** 2 > stats.dim * _EPS * float(diagonal.max()) ** 2:
        return lower.T
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > stats.dim * _EPS * values.max()
    return (vectors[:, keep] * values[keep].sqrt()).T


def _trace_sqrt(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    """tr (S1 S2)^(1/2) = sum of singular values of A B^T.

    Square roots of the eigenvalues of (A B^T)(A B^T)^T are several times faster than singular values, and accurate unless many are
    tiny. So they are computed first, with a worst-case bound of their error; singular values only if that is above 1e-9 of `scale`
    (the traces). The actual error is far smaller: at 2048 features the bound was 2e-10 of the traces and the error 5e-15.
    """
    if 0 in (len(a), len(b)):
        return 0.0
    product = a @ b.T
    square = product @ product.T if len(a) <= len(b) else product.T @ product
    values = torch.linalg.eigvalsh(square).clamp(min=0)
    slack = 32 * _EPS * values.max()
    error = torch.where(values > slack, slack / (2 * values.clamp(min=1e-300).sqrt()), slack.sqrt()).sum()
    if float(error) <= 1e-9 * scale:
        return float(values.sqrt().sum())
    return float(torch.linalg.svdvals(product).sum())


class InceptionScore(NamedTuple):
    """`score` = mean of `splits`; `influence` [n] = first-order effect of each image on the score, times n (see `uncertainty`).

    `shuffled`, `spread`: mean and standard deviation of the score over random orders of the images; with one split the order has no
    effect.
    """

    score: float
    splits: tuple[float, ...]
    influence: np.ndarray
    shuffled: float
    spread: float

    @property
    def lowered_by_order(self) -> bool:
        """Whether the order of the images lowers the score by more than 5 % and by more than chance would."""
        return self.score < min(0.95 * self.shuffled, self.shuffled - 4.5 * self.spread)


def inception_score(
    pool: Any, weight: Any, *, split_size: int = 5000, device: torch.device | str = "cpu"
) -> InceptionScore:
    """Inception Score (Salimans et al. 2016) of pool_3 features [n, 2048] with the softmax weight [1008, 2048].

    exp of the mean KL divergence between p(class | image) and p(class), over consecutive splits of `split_size` images
    in the given order, a shorter last split counting as much as the others. The logits have no bias, as in 2021.
    Log-softmax in float64: no underflow, so no nan.
    """
    pool = torch.as_tensor(np.asarray(pool))
    count = len(pool)
    weight = torch.as_tensor(weight).detach().to(device=device, dtype=torch.float64)
    scores: list[float] = []
    influences: list[np.ndarray] = []
    probabilities: list[torch.Tensor] = []
    negative_entropies: list[torch.Tensor] = []
    splits = pool.split(split_size)
    for split in splits:
        rows = (part.to(device=device, dtype=torch.float64) for part in split.split(_ROWS))
        log_p = torch.cat([torch.log_softmax(part @ weight.T, dim=1) for part in rows])
        p = log_p.exp()
        log_marginal = torch.logsumexp(log_p, dim=0) - float(np.log(len(split)))
        divergence = (p * (log_p - log_marginal)).sum(dim=1)
        score = float(divergence.mean().exp())
        scores.append(score)
        # d score / d weight of image i is score * (KL_i - mean KL): the term through the marginal is zero.
        influence = score * (divergence - divergence.mean()) * (count / (len(split) * len(splits)))
        influences.append(influence.cpu().numpy())
        probabilities.append(p.float())
        negative_entropies.append((p * log_p).sum(dim=1))
    score = float(np.mean(scores))
    shuffled = np.array([score])
    if len(splits) > 1:
        shuffled = _shuffled_scores(torch.cat(probabilities), torch.cat(negative_entropies), split_size)
    return InceptionScore(
        score, tuple(scores), np.concatenate(influences), float(shuffled.mean()), float(shuffled.std())
    )


def _shuffled_scores(p: torch.Tensor, negative_entropy: torch.Tensor, split_size: int) -> np.ndarray:
    """Inception Scores of 20 to 50 random orders, from p(class | image) [n, classes] and its sum of p log p [n]."""
    splits = torch.arange(len(p)) // split_size
    sizes = splits.bincount().to(p.device)[:, None]
    random = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(max(20, min(50, 100_000 // len(p)))):
        split = splits[torch.randperm(len(p), generator=random)].to(p.device)
        marginal = (p.new_zeros(len(sizes), p.shape[1]).index_add_(0, split, p) / sizes).double()
        mean = negative_entropy.new_zeros(len(sizes)).index_add_(0, split, negative_entropy) / sizes[:, 0]
        scores.append(float((mean - torch.xlogy(marginal, marginal).sum(dim=1)).exp().mean()))
    return np.array(scores)


class KernelDistance(NamedTuple):
    """`value`: unbiased squared MMD; `influence` [n]: first-order effect of each sample, times n."""

    value: float
    influence: np.ndarray


def kernel_distance(
    sample: Any, reference: Any, *, device: torch.device | str = "cpu", tile: int = _ROWS
) -> KernelDistance:
    """KID (Binkowski et al. 2018, arXiv:1801.01401): unbiased MMD^2 with kernel (x.y / d + 1)^3 over *all* pairs.

    Usual implementations average over random subsets of 1000 images, which adds noise; this one has none. Cost: three matrix
    products of n x n, m x m and n x m; memory: one tile.
    """
    x, y = np.asarray(sample), np.asarray(reference)
    n, m = len(x), len(y)
    within_x = _kernel_sums(x, x, device, tile, skip_diagonal=True)
    within_y = _kernel_sums(y, y, device, tile, skip_diagonal=True)
    across = _kernel_sums(x, y, device, tile, skip_diagonal=False)
    mean_x, mean_y, mean_across = within_x.sum() / (n * (n - 1)), within_y.sum() / (m * (m - 1)), across.sum() / (n * m)
    influence = 2 * (within_x / (n - 1) - mean_x) - 2 * (across / m - mean_across)
    return KernelDistance(float(mean_x + mean_y - 2 * mean_across), influence)


def _kernel_sums(
    x: np.ndarray, y: np.ndarray, device: torch.device | str, tile: int, *, skip_diagonal: bool
) -> np.ndarray:
    """Row sums [len(x)] of the cubic kernel between x and y, float64."""
    sums = np.zeros(len(x))
    for i in range(0, len(x), tile):
        a = torch.from_numpy(x[i : i + tile].astype(np.float64)).to(device)
        row = torch.zeros(len(a), dtype=torch.float64, device=device)
        for j in range(0, len(y), tile):
            b = torch.from_numpy(y[j : j + tile].astype(np.float64)).to(device)
            kernel = (a @ b.T / x.shape[1] + 1) ** 3
            if skip_diagonal and i == j:
                kernel.fill_diagonal_(0)
            row += kernel.sum(dim=1)
        sums[i : i + tile] = row.cpu().numpy()
    return sums


# Metrics for --metrics, to which programs may add: name -> function of (features of the samples [N, d], of the reference [M, d],
# device=) that returns a number, or a KernelDistance, whose influence gives an error bar too.
METRICS: dict[str, Callable[..., float | KernelDistance]] = {"KID": kernel_distance}


@dataclass(frozen=True)
class Extrapolation:
    """FID at several sample counts and the straight line through it in 1/N: FID(N) = infinity + slope / N.

    `error`: one standard error of `infinity`, where it is known.
    """

    infinity: float
    slope: float
    residual: float
    counts: tuple[int, ...]
    values: tuple[float, ...]
    error: float | None = None


def fid_infinity(
    sample: Any,
    reference: Statistics,
    *,
    points: int = 8,
    seed: int = 0,
    reference_root: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Extrapolation:
    """FID at `points` sample counts, extrapolated to infinitely many (Chong & Forsyth 2020, arXiv:1911.07023).

    Each count has its own random subset, drawn without replacement. Counts are evenly spaced in 1/N, from n / 8 (but more than d if
    n / 2 is) to n. `residual` is the root mean square distance of the values from the fitted line; unless it is far below the FID, the
    extrapolation is not worth reporting.
    """
    sample = np.asarray(sample)
    count, dim = sample.shape
    smallest = max(count // 8, min(dim + 1, count // 2))
    counts = [round(1 / inverse) for inverse in np.linspace(1 / smallest, 1 / count, points)]
    rng = np.random.default_rng(seed)
    root = covariance_root(reference, device) if reference_root is None else reference_root
    values = []
    for size in counts:
        chosen = np.sort(rng.choice(count, size, replace=False))
        subset = sample[chosen] if size < count else sample
        values.append(frechet_distance(from_features(subset), reference, reference_root=root, device=device))
    design = np.stack([np.ones(points), 1 / np.array(counts)], axis=1)
    (infinity, slope), *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    residual = float(np.sqrt(np.mean((design @ [infinity, slope] - values) ** 2)))
    return Extrapolation(float(infinity), float(slope), residual, tuple(counts), tuple(values))
