"""How fast samplers come closer with more nodes, and how much variance they leave: recorded tables, and orders proved on polynomials."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from golden_mixtures import FIGURES, Mixture, method_of, process_of, x_T
from torch import Tensor

from guided_diffusion.diffusion import grids, samplers
from guided_diffusion.diffusion.denoiser import Denoised, Denoiser
from guided_diffusion.diffusion.grids import Grid

PROCESS = process_of("linear")
LAM = grids.own(PROCESS).lam[::-1]
MIXTURE = Mixture("mix2")
LOG_WEIGHTS, MEANS, DEVIATIONS = (t.numpy() for t in (MIXTURE.log_weights, MIXTURE.means, MIXTURE.deviations))
STEPS = np.arange(len(LAM), dtype=np.float64)


def lam_at(i: Tensor) -> float:
    return float(np.interp(i[0].item(), STEPS, LAM))


def mixture_at(x: np.ndarray, lam: float) -> np.ndarray:
    alpha2 = 1 / (1 + math.exp(-2 * lam))
    away = math.sqrt(alpha2) * MEANS - x[:, None]
    variance = alpha2 * DEVIATIONS**2 + 1 - alpha2
    log = LOG_WEIGHTS - (away**2).sum(-1) / 2 / variance - np.log(variance)
    share = np.exp(log - log.max(1, keepdims=True))
    score = ((share / share.sum(1, keepdims=True))[..., None] * away / variance[:, None]).sum(1)
    return (x + (1 - alpha2) * score) / math.sqrt(alpha2)


def on_mixture(x: Tensor, i: Tensor) -> Denoised:
    return Denoised(torch.from_numpy(mixture_at(x.numpy(), lam_at(i))), lambda: pytest.fail("asked for the variance"))


@lru_cache(maxsize=1)
def exact_end() -> np.ndarray:
    """x0 at the last node of the exact solution: Runge-Kutta of order four in lam on x / alpha."""
    first, last, moves = LAM[-1], LAM[0], 1500

    def slope(big: np.ndarray, lam: float) -> np.ndarray:
        return mixture_at(big / math.sqrt(1 + math.exp(-2 * lam)), lam) - big

    big = x_T([2], count=8).numpy() * math.sqrt(1 + math.exp(-2 * first))
    h = (last - first) / moves
    for lam in first + h * np.arange(moves):
        k1 = slope(big, lam)
        k2 = slope(big + h / 2 * k1, lam + h / 2)
        k3 = slope(big + h / 2 * k2, lam + h / 2)
        big = big + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(big + h * k3, lam + h))
    return mixture_at(big / math.sqrt(1 + math.exp(-2 * last)), last)


def run(method: str, denoise: Denoiser, x: Tensor, grid: Grid, **more: Any) -> Tensor:
    found = method_of(method)
    assert found
    sampler, options = found
    return samplers.last(samplers.SAMPLERS[sampler].run(denoise, x, PROCESS, grid, **{**options, **more}))


SLOPES = {
    "euler": 1, "deis_log1": 1, "heun": 2, "dpm2": 2, "dpmpp_2m": 2, "dpmpp_2m_taylor": 2, "dpm_2m": 2, "dpmpp_2s": 2, "unipc1_bh2": 2,
    "deis_log2": 2, "ab2_sigma": 2, "dpmpp_3m": 2, "dpm_3m": 2, "ipndm2": 2, "ipndm3": 2, "ipndm4": 2, "dpmpp_3s": 3, "unip3": 3,
    "unipc2_bh2": 3, "deis_log3": 3, "ab3_sigma": 3, "ab4_sigma": 4, "unipc3_bh2": 4,
}  # fmt: skip


@pytest.mark.parametrize("method", SLOPES)
def test_errors_fall_as_recorded(method: str) -> None:
    recorded = dict(
        zip(FIGURES["convergence"]["nodes"], FIGURES["convergence"]["errors"][f"linear/lam_uniform/{method}"])
    )
    errors = {}
    for count in (32, 128, 512):
        x = run(method, on_mixture, x_T([2], count=8), grids.log_snr(PROCESS, count, sigma_max=None)).numpy()
        errors[count] = float(np.sqrt(((x - exact_end()) ** 2).mean()))
        assert errors[count] == pytest.approx(recorded[count], rel=2e-3, abs=2e-9)
    assert math.log(errors[128] / errors[512], 4) == pytest.approx(
        SLOPES[method], abs=0.4 if SLOPES[method] == 4 else 0.2
    )


MOMENTS = [
    name
    for name in FIGURES["moments"]["relative_variance_error"]
    if (method_of(name.split("/")[2]) or "ancestral" in name or name.endswith("ddim"))
    and "c2" not in name
    and "c4" not in name
]


@pytest.mark.parametrize("name", MOMENTS)
def test_variance_left_as_recorded(name: str) -> None:
    """On one Gaussian the chain is linear: the answers to a unit in x_T and in each draw give its moments exactly."""
    _, kind, method = name.split("/")
    count, recorded = 20, FIGURES["moments"]["relative_variance_error"][name][1]
    grid = {"lam_uniform": grids.log_snr, "respaced": grids.respaced}[kind](PROCESS, count, sigma_max=None)
    alpha, sigma = grid.alpha[0], grid.sigma[0]
    mean, variance = 0.3, 0.04
    rows = 2 + 2 * count  # nothing; a unit in x_T; a unit in each draw
    x = torch.zeros(rows, 1, dtype=torch.float64)
    x[1] = 1

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        a2 = 1 / (1 + math.exp(-2 * lam_at(i)))
        gain = math.sqrt(a2) * variance / (a2 * variance + 1 - a2)
        return Denoised(
            mean + gain * (x - math.sqrt(a2) * mean), lambda: pytest.fail("asked for"), float("large" in method)
        )

    def noise(like: Tensor, step: int, draw: int = 0) -> Tensor:
        return torch.eye(rows, dtype=like.dtype)[2 + 2 * step + draw][:, None]

    if "ancestral" in method or method == "ddim":
        sampler = samplers.ancestral if "ancestral" in method else samplers.ddim
        options = {"eta": 0.0} if method == "ddim" else {}
        end = samplers.last(sampler(denoise, x, PROCESS, grid, noise=noise, **options))  # type: ignore[operator]
    else:
        found = method_of(method)
        end = run(method, denoise, x, grid, **({"noise": noise} if found and samplers.SAMPLERS[found[0]].noise else {}))
    answers = (end - end[0])[1:, 0]
    left = answers[0] ** 2 * (alpha**2 * variance + sigma**2) + answers[1:].square().sum()
    # The best estimate of x0 at the last node varies less than the data by what the noise still hides.
    right = variance / (1 + math.exp(-2 * grid.lam[-1]) / variance)
    assert float(left / right - 1) == pytest.approx(recorded, abs=6e-4 * max(1, abs(recorded)))
    assert float(end[0, 0] + answers[0] * alpha * mean) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(
    ("method", "axis", "degree", "form"),
    [
        ("unip3", "lam", 2, "x0"),
        ("dpmpp_2m_taylor", "lam", 1, "x0"),
        ("unipc3_bh2", "lam", 2, "x0"),
        ("deis_log3", "lam", 2, "eps"),
        ("ab3_sigma", "s", 2, "eps"),
        ("ab4_sigma", "s", 3, "eps"),
        ("sa_p3c4_tau0", "lam", 2, "x0"),
    ],
)
def test_exact_on_polynomials(method: str, axis: str, degree: int, form: str) -> None:
    """Where the prediction is a polynomial of the rule's own variable, however uneven the grid; from a start that is exact too."""
    lam = np.array([-1.0, -0.7, -0.55, -0.2, -0.05, 0.3, 0.4])
    grid = Grid(np.interp(-lam, -LAM, np.arange(1000.0)), lam)
    polynomial = np.polynomial.Polynomial([0.3, -0.4, 0.2, 0.15][: degree + 1])

    def f(u: float) -> float:
        return float(polynomial(u if axis == "lam" else math.exp(-u)))

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        u = lam_at(i)
        alpha, sigma = 1 / math.sqrt(1 + math.exp(-2 * u)), 1 / math.sqrt(1 + math.exp(2 * u))
        x0 = torch.full_like(x, f(u)) if form == "x0" else (x - sigma * f(u)) / alpha
        return Denoised(x0, lambda: pytest.fail("asked for"))

    found = method_of(method)
    assert found
    entry, options = samplers.SAMPLERS[found[0]], {**found[1], "final_order": 9}
    xs = [step.x for step in entry.run(denoise, torch.ones(1, 1, dtype=torch.float64), PROCESS, grid, **options)]
    # From node 3 on the past is long enough; the step before the last leads to the last node.
    n, last = len(lam) - 2, len(lam) - 1
    before, after = xs[n - 1].item(), xs[n].item()
    at, weights = np.polynomial.legendre.leggauss(30)
    width = lam[last] - lam[n]
    us = lam[n] + width * (at + 1) / 2
    kernel = np.exp(us - lam[last]) if form == "x0" else -np.exp(-us)
    integral = float(weights @ (kernel * [f(u) for u in us]) * width / 2)
    a, b = grid.alpha, grid.sigma
    expected = (
        b[last] / b[n] * before + a[last] * integral if form == "x0" else a[last] / a[n] * before + a[last] * integral
    )
    assert after == pytest.approx(expected, abs=1e-11)
