from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inception_files import GOLDEN, features_of

from evaluations.neighbours import neighbours, squared_radii
from evaluations.selftest import synthetic_features as features

CASES = {name: case for name, case in GOLDEN["precision_recall"].items() if "ref" in case}


def brute(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """All distances in float64 from differences."""
    square = lambda a, b: ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)  # noqa: E731
    radius = lambda a: np.sort(square(a, a), axis=1)[:, k]  # noqa: E731
    across = square(x, y)
    in_reference, in_sample = across <= radius(y)[None], across <= radius(x)[:, None]
    density = in_reference.sum() / (k * len(x))
    return in_reference.any(1).mean(), in_sample.any(0).mean(), density, in_reference.any(0).mean()


def all_four(x: np.ndarray, y: np.ndarray, **options: object) -> tuple[float, float, float, float]:
    found = neighbours(x, y, **options)
    return found.precision, found.recall, found.density, found.coverage


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_recorded_values(name: str) -> None:
    case = CASES[name]
    x, y = features_of(case, "sample"), features_of(case, "ref")
    found = neighbours(x, y)
    for recorded in (case["fp32_numpy"], case["fp64_numpy"]):
        assert (found.precision, found.recall) == (recorded["precision"], recorded["recall"])
    radii = squared_radii(y)
    np.testing.assert_allclose(radii[:4], case["fp64_numpy"]["radii_ref_head"], rtol=1e-6)
    np.testing.assert_allclose(squared_radii(x)[:4], case["fp64_numpy"]["radii_sample_head"], rtol=1e-6)
    assert radii.mean() == pytest.approx(case["fp64_numpy"]["radii_ref_mean"], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_float16_is_near_the_original(name: str) -> None:
    case = CASES[name]
    x, y = features_of(case, "sample"), features_of(case, "ref")
    found = neighbours(x, y, dtype=torch.float16)
    original = case["original_tf_cpu"]
    if name.endswith("big_norm_fp32_branch"):  # every block overflows, so the original itself used float32
        assert (found.precision, found.recall) == (original["precision"], original["recall"])
    else:
        assert found.precision == pytest.approx(original["precision"], abs=0.003)
        assert found.recall == pytest.approx(original["recall"], abs=0.003)
        emulated = case["fp16_emulated"]
        assert found.precision == pytest.approx(emulated["precision"], abs=1e-3)
        assert found.recall == pytest.approx(emulated["recall"], abs=1e-3)


def test_one_overflowing_block_does_not_make_everything_near() -> None:
    """In 2021 `u.v` beyond the range of float16 made every distance of the block 0, and both numbers 1."""
    rng = np.random.default_rng(0)
    x, y = (180 * np.ones((60, 2)) + rng.standard_normal((60, 2)) + shift for shift in (0, [6, -6]))
    x, y = x.astype(np.float32), y.astype(np.float32)
    assert all_four(x, y, dtype=torch.float16)[:2] == pytest.approx(all_four(x, y)[:2], abs=0.1)
    assert all_four(x, y, dtype=torch.float16)[0] < 0.5


@pytest.mark.parametrize(
    "k,expected", [(3, (0.906, 0.7735, 1.2186666667, 0.903)), (5, (0.952, 0.8555, 1.2124, 0.9815))]
)
def test_density_and_coverage_equal_the_reference_package(k: int, expected: tuple[float, ...]) -> None:
    case = CASES["pr_d2048_inception_like"]
    assert all_four(features_of(case, "sample"), features_of(case, "ref"), k=k) == pytest.approx(expected, abs=1e-9)


def test_repeated_points_stay_inside() -> None:
    points = np.repeat(features(seed=31, n=100, d=8), 5, axis=0)
    assert all_four(points, points)[:2] == (1.0, 1.0)
    assert squared_radii(points).max() == 0
    many = np.repeat(features(seed=31, n=3, d=8), 40, axis=0)
    assert squared_radii(many).max() == 0 and all_four(many, many)[:2] == (1.0, 1.0)


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_exact_arithmetic_even_far_from_the_origin(offset: float, dtype: torch.dtype) -> None:
    """At offset 10,000 a float32 product has no digit of the distances left."""
    x = features(seed=1, n=90, d=6) + np.float32(offset)
    y = features(seed=2, n=110, d=6, spread=0.9) + np.float32(offset)
    assert all_four(x, y, dtype=dtype) == pytest.approx(brute(x, y, 3), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 30), st.integers(5, 30), st.integers(1, 4), st.integers(1, 9))
def test_on_a_grid_where_ties_abound(seed: int, n: int, m: int, k: int, tile: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(0, 3, size=(count, 3)).astype(np.float32) for count in (n, m))
    assert all_four(x, y, k=k, tile=tile) == pytest.approx(brute(x, y, k), abs=1e-12)
    turned = neighbours(y, x, k=k, tile=tile)
    assert (turned.recall, turned.precision) == all_four(x, y, k=k)[:2]


def test_blind_to_order_and_tile() -> None:
    x, y = features(seed=1, n=130, d=16), features(seed=2, n=170, d=16)
    rng = np.random.default_rng(0)
    expected = all_four(x, y)
    assert all_four(rng.permutation(x), rng.permutation(y)) == expected
    assert all_four(x, y, tile=17) == expected
    assert all_four(x, y, reference_radii=squared_radii(y)) == expected


SCALES = [1e-37, 1e-22, 1e-20, 1.0, 1e18, 1e19, 1e30, 3e37]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_of_features_gives_the_exact_numbers(scale: float, dtype: torch.dtype) -> None:
    """Squares overflow float32 from 2e19 on, and vanish in it below 1e-19."""
    rng = np.random.default_rng(3)
    x, y = (np.float32(scale) * rng.standard_normal((n, 6), dtype=np.float32) for n in (90, 120))
    assert all_four(x, y, dtype=dtype) == pytest.approx(brute(x, y, 3), rel=1e-12)
    if scale >= 1e19:  # half precision cannot hold them either: no block of it passes for a number
        assert all_four(x, y, dtype=torch.float16)[:2] == brute(x, y, 3)[:2]


def test_one_huge_point_among_tiny_ones() -> None:
    rng = np.random.default_rng(4)
    x, y = ((1e-25 * rng.standard_normal((n, 6))).astype(np.float32) for n in (60, 80))
    x[7] = 1e25
    assert all_four(x, y) == pytest.approx(brute(x, y, 3), rel=1e-12)


def test_errors_name_the_numbers() -> None:
    x, y = features(seed=1, n=3, d=4), features(seed=2, n=9, d=4)
    with pytest.raises(ValueError, match="at least 4 images in each set, got 3"):
        neighbours(x, y)
    with pytest.raises(ValueError, match="cannot compare 4 features with 5"):
        neighbours(y, features(seed=2, n=9, d=5))


@pytest.mark.gpu
def test_gpu_gives_the_same_points() -> None:
    x, y = features(seed=1, n=500, d=64), features(seed=2, n=400, d=64)
    on_cpu, on_gpu = neighbours(x, y), neighbours(x, y, device="cuda")
    assert all(np.array_equal(a, b) for a, b in zip(on_cpu, on_gpu))
