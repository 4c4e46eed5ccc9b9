from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluations import statistics
from evaluations.statistics import BLOCK, Moments

ROWS = np.random.default_rng(0).gamma(2.0, size=(4 * BLOCK + 300, 6)).astype(np.float32)
WHOLE = statistics.from_features(ROWS)


def same_bits(a: statistics.Statistics, b: statistics.Statistics) -> bool:
    return a.mu.tobytes() == b.mu.tobytes() and a.sigma.tobytes() == b.sigma.tobytes() and a.count == b.count


def test_equals_numpy() -> None:
    rows = ROWS.astype(np.float64)
    np.testing.assert_allclose(WHOLE.mu, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(WHOLE.sigma, np.cov(rows, rowvar=False), rtol=1e-12, atol=1e-15)
    assert WHOLE.count == len(ROWS)


def test_large_offsets_cost_no_digits() -> None:
    rows = np.random.default_rng(1).standard_normal((3000, 3)) + 1e7
    # A mean near 1e7 is rounded at 1e-9; sums of squares would be rounded at 1e-2 * n.
    np.testing.assert_allclose(statistics.from_features(rows).sigma, np.cov(rows - 1e7, rowvar=False), atol=1e-8)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000, BLOCK, 1500])
def test_batch_size_changes_no_bit(batch: int) -> None:
    moments = Moments(6)
    for start in range(0, len(ROWS), batch):
        moments.add(ROWS[start : start + batch])
    assert same_bits(moments.statistics(), WHOLE)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, len(ROWS) - 1), max_size=12, unique=True))
def test_batches_of_any_sizes_change_no_bit(cuts: list[int]) -> None:
    moments = Moments(6)
    for part in np.split(ROWS, sorted(cuts)):
        moments.add(part)
    assert moments.count == len(ROWS) and same_bits(moments.statistics(), WHOLE)


def test_the_callers_buffer_may_be_reused() -> None:
    moments, buffer = Moments(6), np.empty((100, 6), np.float32)
    for i in range(0, 2000, 100):
        buffer[:] = ROWS[i : i + 100]
        moments.add(buffer)
    assert same_bits(moments.statistics(), statistics.from_features(ROWS[:2000]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[n, 6\], got \[2, 5\]"):
        Moments(6).add(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        statistics.from_features(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="must be a matrix"):
        statistics.from_features(np.zeros((2, 3, 4)))


def test_statistics_from_outside_are_looked_at() -> None:
    assert statistics.validated(np.zeros(2, np.float32), np.eye(2)).mu.dtype == np.float64
    with pytest.raises(ValueError, match="not symmetric"):
        statistics.validated(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="not finite"):
        statistics.validated(np.zeros(2), np.full((2, 2), np.nan))
    for no_covariance in (-np.eye(2), np.array([[1.0, 2.0], [2.0, 1.0]]), np.diag([1.0, -0.1])):
        with pytest.raises(ValueError, match="negative eigenvalues"):
            statistics.validated(np.zeros(2), no_covariance)
    few = statistics.from_features(np.random.default_rng(0).standard_normal((20, 60)))  # rank 19 of 60
    statistics.validated(few.mu.astype(np.float32), few.sigma.astype(np.float32))
    statistics.validated(np.zeros(2), np.zeros((2, 2)))
