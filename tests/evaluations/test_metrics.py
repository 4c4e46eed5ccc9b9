from __future__ import annotations

import numpy as np
import pytest
from inception_files import GOLDEN, features_of

from evaluations import metrics, statistics
from evaluations.selftest import synthetic_features as features

FID_CASES = [name for name, case in GOLDEN["fid"].items() if "ref" in case]
EXACT = {"fid_d64_rank_deficient": 8.08618885264578, "fid_d2048_rank_deficient": 326.181855372992}


def fid(sample: np.ndarray, reference: np.ndarray) -> float:
    return metrics.frechet_distance_of_features(sample, reference)


@pytest.mark.parametrize("name", FID_CASES)
def test_fid_equals_the_original(name: str) -> None:
    case = GOLDEN["fid"][name]
    value = fid(features_of(case, "sample"), features_of(case, "ref"))
    if name in EXACT:
        assert value == pytest.approx(EXACT[name], rel=1e-9)
        assert value == pytest.approx(case["fid"], rel=5e-5)
    else:
        assert value == pytest.approx(case["fid"], rel=1e-6, abs=1e-10)


def test_fid_dead_channels_and_constants() -> None:
    reference, sample = features(seed=1, n=500, d=16), features(seed=2, n=400, d=16)
    reference[:, 3] = 0
    sample[:, [3, 5]] = 0
    assert fid(sample, reference) == pytest.approx(GOLDEN["fid"]["fid_dead_channels"]["fid"], rel=1e-6)
    assert fid(np.full((40, 8), 0.75), np.full((50, 8), 0.5)) == GOLDEN["fid"]["fid_constant_features"]["fid"]


def by_eigenvalues(a: statistics.Statistics, b: statistics.Statistics) -> float:
    """The Frechet distance as its formula reads, with the eigenvalues of the product S1 S2."""
    cross = np.sqrt(np.linalg.eigvals(a.sigma @ b.sigma).astype(np.complex128)).real.sum()
    return float(np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)


def test_fid_agrees_with_the_eigenvalues_of_the_product() -> None:
    a, b = (
        statistics.from_features(features(seed=3, n=900, d=48)),
        statistics.from_features(features(seed=4, n=800, d=48)),
    )
    assert metrics.frechet_distance(a, b) == pytest.approx(by_eigenvalues(a, b), rel=1e-10)


@pytest.mark.parametrize("n,m", [(30, 200), (200, 30), (30, 25)])
def test_few_images_from_features_equal_few_images_from_statistics(n: int, m: int) -> None:
    x, y = features(seed=5, n=n, d=64), features(seed=6, n=m, d=64, shift=0.35)
    bare = [statistics.Statistics(s.mu, s.sigma) for s in map(statistics.from_features, (x, y))]
    assert metrics.frechet_distance(*bare) == pytest.approx(fid(x, y), rel=1e-7)


def test_fid_of_gaussians_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    first, second = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 3, 12)
    shift = rng.standard_normal(12)
    a = statistics.Statistics(shift, rotation @ np.diag(first) @ rotation.T)
    b = statistics.Statistics(np.zeros(12), rotation @ np.diag(second) @ rotation.T)
    expected = shift @ shift + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_fid_is_zero_symmetric_and_blind_to_order() -> None:
    x, y = features(seed=1, n=500, d=16), features(seed=2, n=400, d=16)
    assert abs(fid(x, x)) < 1e-10
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-12)
    shuffled = np.random.default_rng(0).permutation(x)
    assert fid(shuffled, y) == pytest.approx(fid(x, y), rel=1e-12)


def test_features_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot compare 16 features with 8"):
        fid(features(seed=1, n=20, d=16), features(seed=2, n=20, d=8))


@pytest.mark.parametrize("name", list(GOLDEN["inception_score"]))
def test_inception_score_equals_the_original(name: str) -> None:
    case = GOLDEN["inception_score"][name]
    weight = (np.random.RandomState(5).standard_normal((2048, 1008)) * 0.05).astype(np.float32).T.copy()
    pool = features_of(case, "features")
    result = metrics.inception_score(pool, weight, split_size=case.get("split_size", 5000))
    assert result.score == pytest.approx(case["float64"], rel=1e-9)
    if "float64_per_split" in case:
        assert result.splits == pytest.approx(case["float64_per_split"], rel=1e-9)
        assert result.score == pytest.approx(case["original_math_numpy_fp32_softmax"], rel=1e-5)


def test_inception_score_bounds() -> None:
    same = metrics.inception_score(np.ones((20, 4)), np.ones((10, 4)))
    assert same.score == pytest.approx(1.0, abs=1e-12)
    certain = metrics.inception_score(np.eye(10) * 1e4, np.eye(10))
    assert certain.score == pytest.approx(10.0, rel=1e-12)
    pool = np.random.default_rng(0).standard_normal((50, 4))
    assert 1 <= metrics.inception_score(pool, np.random.default_rng(1).standard_normal((10, 4))).score <= 10


def predictions(labels: np.ndarray, seed: int) -> np.ndarray:
    """Features [n, classes] of images that a network mostly, but not always, takes for what they are."""
    noise = np.random.default_rng(seed).standard_normal((len(labels), 10))
    return 5 * np.eye(10)[labels] + 2.5 * noise


ORDERS = {
    "sorted": (np.sort, True),
    "sorted downwards": (lambda drawn: np.sort(drawn)[::-1], True),
    "classes in another order": (lambda drawn: np.random.default_rng(1).permutation(10)[np.sort(drawn)], True),
    "in blocks": (lambda drawn: np.repeat(drawn[::25], 25)[: len(drawn)], True),
    "half sorted": (lambda drawn: np.concatenate([np.sort(drawn[:300]), drawn[300:]]), True),
    "shuffled": (lambda drawn: drawn, False),
    "in turn": (lambda drawn: np.arange(len(drawn)) % 10, False),
    "one class": (lambda drawn: drawn * 0, False),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [600, 637])
def test_an_order_that_lowers_the_inception_score_shows(order: str, count: int) -> None:
    arrange, shows = ORDERS[order]
    for seed in range(3):
        labels = arrange(np.random.default_rng(seed).integers(0, 10, count))
        found = metrics.inception_score(predictions(labels, seed), np.eye(10), split_size=100)
        assert found.lowered_by_order == shows
        whole = metrics.inception_score(predictions(labels, seed), np.eye(10), split_size=count)
        assert not whole.lowered_by_order and whole.shuffled == whole.score  # one split: no order in it


def test_chance_does_not_look_like_an_order() -> None:
    """Few images, small and uneven splits, images that come twice or are all alike."""
    rng = np.random.default_rng(0)
    for count, split in ((9, 4), (20, 8), (60, 25), (64, 16), (200, 50)):
        for seed in range(6):
            drawn = predictions(rng.integers(0, 10, count), seed)
            for rows in (drawn, np.tile(drawn[: count // 2], (2, 1)), np.tile(drawn[:1], (count, 1))):
                assert not metrics.inception_score(rows, np.eye(10), split_size=split).lowered_by_order


def test_the_score_of_random_orders_is_that_of_shuffled_files() -> None:
    labels = np.sort(np.random.default_rng(0).integers(0, 10, 200))
    rows = predictions(labels, 0)
    found = metrics.inception_score(rows, np.eye(10), split_size=60)
    orders = [np.random.default_rng(seed).permutation(200) for seed in range(50)]
    shuffled = [metrics.inception_score(rows[order], np.eye(10), split_size=60).score for order in orders]
    assert found.shuffled == pytest.approx(np.mean(shuffled), abs=4 * found.spread / 7)
    assert found.spread == pytest.approx(np.std(shuffled), rel=0.5)


def test_exact_kernel_distance() -> None:
    case = GOLDEN["precision_recall"]["pr_d2048_inception_like"]
    value = metrics.kernel_distance(features_of(case, "sample"), features_of(case, "ref")).value
    assert value == pytest.approx(0.009080192090928918, rel=1e-9)


def test_kernel_distance_by_hand_and_in_tiles() -> None:
    x, y = features(seed=1, n=23, d=5).astype(np.float64), features(seed=2, n=17, d=5).astype(np.float64)
    kernel = lambda a, b: (a @ b.T / 5 + 1) ** 3  # noqa: E731
    xx, yy = kernel(x, x), kernel(y, y)
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    expected = xx.sum() / (23 * 22) + yy.sum() / (17 * 16) - 2 * kernel(x, y).mean()
    for tile in (3, 8, 100):
        assert metrics.kernel_distance(x, y, tile=tile).value == pytest.approx(expected, rel=1e-11)


def test_extrapolation_meets_the_truth() -> None:
    """Two sets from one Gaussian: the FID of n samples falls like 1/n towards about zero."""
    rng = np.random.default_rng(0)
    reference = statistics.Statistics(np.zeros(8), np.eye(8))
    line = metrics.fid_infinity(rng.standard_normal((6000, 8)), reference)
    assert line.counts[-1] == 6000 and len(line.counts) == len(line.values) == 8
    assert line.slope > 0 and abs(line.infinity) < line.values[0] / 4 and line.residual < line.values[0] / 4
    again = metrics.fid_infinity(rng.standard_normal((400, 8)), reference, points=3)
    assert again.counts == (50, 89, 400)


@pytest.mark.gpu
def test_gpu_gives_the_same() -> None:
    x, y = features(seed=1, n=500, d=16), features(seed=2, n=400, d=16)
    assert metrics.frechet_distance_of_features(x, y, device="cuda") == pytest.approx(fid(x, y), rel=1e-10)
