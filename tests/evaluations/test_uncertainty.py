"""Error bars against the truth: the spread of the number itself over many independent sets."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from evaluations import metrics, neighbours, statistics, uncertainty

RNG = np.random.default_rng(0)
REFERENCE = RNG.standard_normal((1500, 6)) * np.linspace(0.5, 1.5, 6)
REFERENCE_STATISTICS = statistics.from_features(REFERENCE)


def draw(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(4.0, 0.3, size=(count, 6)) - 1.0


def frechet(seed: int) -> tuple[float, float]:
    stats = statistics.from_features(draw(400, seed))
    value = metrics.frechet_distance(stats, REFERENCE_STATISTICS)
    return value, uncertainty.frechet_se(stats, REFERENCE_STATISTICS).error


def inception_score(seed: int) -> tuple[float, float]:
    weight = np.random.default_rng(5).standard_normal((10, 6)) * 2
    found = metrics.inception_score(draw(500, seed), weight, split_size=250)
    return found.score, uncertainty.mean_se(found.influence).error


def kernel_distance(seed: int) -> tuple[float, float]:
    found = metrics.kernel_distance(draw(300, seed), REFERENCE[:300])
    return found.value, uncertainty.mean_se(found.influence).error


def precision(seed: int) -> tuple[float, float]:
    found = neighbours.neighbours(draw(300, seed), REFERENCE[:500])
    return found.precision, uncertainty.mean_se(found.inside_reference).error


def fid_infinity(seed: int) -> tuple[float, float]:
    x = draw(400, seed)
    line = metrics.fid_infinity(x, REFERENCE_STATISTICS, points=5, seed=seed)
    distance = uncertainty.frechet_se(statistics.from_features(x), REFERENCE_STATISTICS)
    return line.infinity, uncertainty.extrapolation_se(line, distance)


@pytest.mark.parametrize(
    ("score", "sets", "within"),
    [
        (frechet, 100, 0.2),
        (inception_score, 100, 0.2),
        (kernel_distance, 100, 0.25),
        (precision, 80, 0.25),
        (fid_infinity, 60, 0.25),
    ],
)
def test_the_error_is_the_spread_over_sets(score, sets: int, within: float) -> None:
    values, errors = zip(*map(score, range(sets)))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=within)


def test_influence_is_the_derivative() -> None:
    """Against the distance itself with one image counted a little more."""
    x = draw(300, 1)
    stats = statistics.from_features(x)
    found = uncertainty.frechet_se(stats, REFERENCE_STATISTICS)
    value = metrics.frechet_distance(stats, REFERENCE_STATISTICS)
    for image in (0, 17):
        weight = np.full(300, 1 / 300) * (1 - 1e-6)
        weight[image] += 1e-6
        mu = weight @ x
        sigma = (x - mu).T @ (weight[:, None] * (x - mu)) * 300 / 299
        moved = metrics.frechet_distance(statistics.Statistics(mu, sigma), REFERENCE_STATISTICS)
        assert (moved - value) / 1e-6 == pytest.approx(found.influence[image], rel=0.02, abs=0.02)


def test_few_images_take_the_group_jackknife() -> None:
    rng = np.random.default_rng(3)
    reference = statistics.from_features(rng.standard_normal((400, 60)))
    values, errors = [], []
    for _ in range(40):
        x = rng.standard_normal((50, 60)) * 1.2
        stats = statistics.from_features(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values.append(metrics.frechet_distance(stats, reference))
        found = uncertainty.frechet_se(stats, reference)
        errors.append(found.error)
    assert "20 groups" in found.method and len(found.influence) == 20
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.35)


def test_recall_and_coverage_errors_are_near_the_spread_over_sets() -> None:
    """Not sharp, but they must not promise far more than is known, whatever the sizes of both sets."""
    for samples, references in ((300, 300), (200, 800)):
        y = REFERENCE[:references]
        radii = neighbours.squared_radii(y)
        found = [neighbours.neighbours(draw(samples, seed), y, reference_radii=radii) for seed in range(40)]
        errors = [uncertainty.group_jackknife_se(one.by_group).error for one in found]
        spread = np.std([one.recall for one in found], ddof=1)
        assert 0.75 * spread < np.mean(errors) < 1.8 * spread
        errors = [uncertainty.group_jackknife_se(one.occupied_by_group).error for one in found]
        spread = np.std([one.coverage for one in found], ddof=1)
        assert 0.75 * spread < np.mean(errors) < 1.8 * spread


def test_proportion_is_binomial() -> None:
    hits = np.arange(100) < 30
    assert uncertainty.mean_se(hits).error == pytest.approx(np.sqrt(0.3 * 0.7 / 99), rel=1e-12)


def test_matched_sets_cancel_what_they_share() -> None:
    x = draw(400, 1)
    stats = statistics.from_features(x)
    near = x + 0.01 * np.random.default_rng(2).standard_normal(x.shape)
    near_stats = statistics.from_features(near)
    a = uncertainty.frechet_se(stats, REFERENCE_STATISTICS)
    b = uncertainty.frechet_se(near_stats, REFERENCE_STATISTICS)
    error, paired = uncertainty.paired_difference_se(a, b)
    assert paired and error < 0.1 * a.error
    other = draw(399, 9)
    c = uncertainty.frechet_se(statistics.from_features(other), REFERENCE_STATISTICS)
    error, paired = uncertainty.paired_difference_se(a, c)
    assert not paired and error == pytest.approx(np.hypot(a.error, c.error))


def test_balanced_classes_are_no_error() -> None:
    """Sets with as many images of each class vary less than sets drawn at random: measured over many sets."""
    rng = np.random.RandomState(0)
    centres = 4 * rng.randn(5, 3)
    reference = statistics.from_features((centres[np.arange(3000) % 5] + rng.randn(3000, 3)).astype(np.float32))
    labels = np.repeat(np.arange(5), 40)
    values, predicted, at_random = [], [], []
    for _ in range(60):
        sample = statistics.from_features((centres[labels] + 0.3 + 1.1 * rng.randn(200, 3)).astype(np.float32))
        values.append(metrics.frechet_distance(sample, reference))
        whole = uncertainty.frechet_se(sample, reference)
        predicted.append(uncertainty.within_classes(whole, labels).error)
        at_random.append(whole.error)
    assert np.mean(predicted) == pytest.approx(np.std(values), rel=0.3)
    assert np.mean(at_random) > 2 * np.std(values)
    # Drawn labels, one class and influences of groups are left as they are.
    assert uncertainty.within_classes(whole, rng.randint(0, 5, 200)) is whole
    assert uncertainty.within_classes(whole, np.zeros(200, int)) is whole
    assert uncertainty.within_classes(uncertainty.mean_se(np.arange(20.0)), labels).influence.shape == (20,)
