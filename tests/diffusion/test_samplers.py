"""Samplers against Gaussian data, whose trajectories and end points are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_data import MEAN, SIGMA, exact_process, ideal, normal, sample_moments, seeded, uniform_process, whitened
from torch import Tensor

from guided_diffusion.diffusion import grids, samplers
from guided_diffusion.diffusion.denoiser import Denoised, Spread
from guided_diffusion.diffusion.process import Process, add_noise

ALL = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "ddim_eta": lambda *a, **k: samplers.ddim(*a, eta=0.6, **k),
    "plms": samplers.plms,
    "dpm_solver": samplers.dpm_solver,
    "heun": samplers.heun,
    "heun_churn": lambda *a, **k: samplers.heun(*a, num_steps=80, churn=20, **k),
}


@pytest.mark.parametrize("name", ALL)
def test_mean_and_covariance_are_reached(name: str) -> None:
    random = name in ("ancestral", "ddim_eta", "heun_churn")
    process = exact_process(keep="250" if random else "200")
    options = {"noise": seeded(1)} if random else {}
    count = 4000 if random else 50  # without noise the map is affine: exact moments go in, exact moments come out
    x = samplers.last(ALL[name](ideal(process), whitened(count), process, **options))
    mean, covariance = sample_moments(x)
    tolerance = 0.04 if random else 0.02  # fresh noise leaves the moments of 4000 samples uncertain by about 0.011
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=tolerance)
    torch.testing.assert_close(covariance, SIGMA, rtol=0, atol=tolerance)


def exact_flow(process: Process, x: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """Where the probability flow carries x from the last step to step 0, for centred data with these variances per coordinate."""
    first, last = (process.alpha_bar[k] for k in (0, -1))
    return x * ((first * variances + 1 - first) / (last * variances + 1 - last)).sqrt()


def error_at_step_0(sampler, process: Process, **options) -> float:
    """Against the exact flow, before the last step, which only removes the noise that step 0 still has."""
    variances = torch.tensor([0.04, 0.3, 1.7], dtype=torch.float64)
    x = normal(64, 3)
    denoise = ideal(process, torch.zeros(3, dtype=torch.float64), torch.diag(variances))
    before_last = list(sampler(denoise, x, process, **options))[-2].x
    return (before_last - exact_flow(process, x, variances)).abs().max().item()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        (samplers.dpm_solver, {}, 2),
        (samplers.heun, {}, 2),
        (samplers.heun, {"rho": 3.0}, 2),
    ],
)
def test_solvers_converge_at_their_order(schedule: str, sampler, options: dict, order: int) -> None:
    """Off the integer steps: the same process, denoiser and tables, ever more solver steps."""
    process = exact_process(schedule)
    errors = [error_at_step_0(sampler, process, num_steps=count, **options) for count in (40, 80, 160)]
    rates = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert all(rate > order - 0.25 for rate in rates), (errors, rates)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(samplers.ddim, 1), (samplers.plms, 2), (samplers.dpm_solver, 2), (samplers.heun, 2)],
)
def test_solvers_on_the_steps_of_a_process_converge(sampler, order: int) -> None:
    """On integer steps, with ever finer processes."""
    errors = [error_at_step_0(sampler, uniform_process(count)) for count in (60, 120, 240)]
    assert errors[0] / errors[-1] > 4 ** (order - 0.25), errors


def test_fewer_evaluations_for_the_same_error() -> None:
    process = exact_process()
    short = exact_process(keep="20")
    assert error_at_step_0(samplers.dpm_solver, process, num_steps=20) < 0.2 * error_at_step_0(samplers.ddim, short)


def test_ddim_with_eta_1_is_ancestral_with_the_posterior_variance() -> None:
    process = exact_process(keep="30")
    x, denoise = normal(16, 2), ideal(process)
    one = samplers.last(samplers.ddim(denoise, x, process, eta=1.0, noise=seeded(3)))
    other = samplers.last(samplers.ancestral(denoise, x, process, noise=seeded(3)))
    torch.testing.assert_close(one, other)


def test_inversion_and_back() -> None:
    process = exact_process()
    x0 = MEAN + normal(32, 2) @ torch.linalg.cholesky(SIGMA).T
    errors = []
    for keep in ("250", "500", "1000"):
        process = exact_process(keep=keep)
        noise = samplers.last(samplers.ddim_invert(ideal(process), x0, process))
        errors.append((samplers.last(samplers.ddim(ideal(process), noise, process)) - x0).abs().max().item())
    assert errors[2] < 0.02 and errors[0] > 1.4 * errors[1] > 1.9 * errors[2]
    assert noise.std() > 0.8
    grid = grids.log_snr(process, 300)  # between the steps of the process
    inverse = samplers.last(samplers.ddim_invert(ideal(process), x0, process, grid))
    for run in (samplers.ddim, samplers.unipc):
        torch.testing.assert_close(samplers.last(run(ideal(process), inverse, process, grid)), x0, rtol=0, atol=0.05)


def test_plms_of_order_1_is_ddim() -> None:
    process = exact_process(keep="20")
    x = normal(4, 2)
    one, other = (
        samplers.last(s)
        for s in (samplers.plms(ideal(process), x, process, order=1), samplers.ddim(ideal(process), x, process))
    )
    torch.testing.assert_close(one, other)


def test_start_in_the_middle() -> None:
    process = exact_process(keep="50")
    for sampler in (samplers.ancestral, samplers.ddim, samplers.plms):
        steps = list(sampler(ideal(process), normal(4, 2), process, start=9))
        assert [step.i for step in steps] == list(range(9, -1, -1))
        with pytest.raises(ValueError, match=r"start=50.*0\.\.49"):
            next(sampler(ideal(process), normal(4, 2), process, start=50))


def test_little_noise_changes_little() -> None:
    """Noised to an early step and denoised again, data comes back nearly as it was."""
    process = exact_process()
    x0 = MEAN + normal(64, 2) @ torch.linalg.cholesky(SIGMA).T
    i = torch.full((64,), 5)
    x = add_noise(process, x0, i, normal(64, 2, seed=2))
    back = samplers.last(samplers.ddim(ideal(process), x, process, start=5))
    assert (back - x0).abs().max() < 0.2


@pytest.mark.parametrize("name", ["ancestral", "ddim", "plms", "dpm_solver", "heun"])
def test_the_callers_grad_mode_and_edits_count(name: str) -> None:
    process, seen, modes = exact_process(keep="6"), [], []

    def denoise(x: torch.Tensor, i: torch.Tensor) -> Denoised:
        assert not torch.is_grad_enabled()
        seen.append(x.clone())
        return ideal(process)(x, i)

    for step in ALL[name](denoise, normal(4, 2).requires_grad_(), process):
        modes.append(torch.is_grad_enabled())
        assert not step.x.requires_grad
        step.x.fill_(0.25)
    assert modes == [True] * 6 and torch.is_grad_enabled()
    assert torch.allclose(seen[-1], torch.full((4, 2), 0.25, dtype=torch.float64), rtol=1e-12)
    with torch.no_grad():
        assert [torch.is_grad_enabled() for _ in ALL[name](ideal(process), normal(4, 2), process)] == [False] * 6


def test_ddim_needs_no_variance_and_no_noise() -> None:
    process = exact_process(keep="10")

    def refuse(*_: object) -> None:
        raise AssertionError("asked for")

    def denoise(x: torch.Tensor, i: torch.Tensor) -> Denoised:
        return Denoised(ideal(process)(x, i).x0, refuse)  # type: ignore[arg-type]

    for sampler in (samplers.ddim, samplers.plms, samplers.heun, samplers.dpm_solver):
        samplers.last(sampler(denoise, normal(4, 2), process))
    samplers.last(samplers.ddim(denoise, normal(4, 2), process, noise=refuse))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="asked for"):
        samplers.last(samplers.ancestral(denoise, normal(4, 2), process))


def test_solvers_hear_positions_between_steps() -> None:
    process, heard = exact_process(), []

    def denoise(x: torch.Tensor, i: torch.Tensor) -> Denoised:
        heard.append(i)
        return ideal(process)(x, i)

    steps = list(samplers.dpm_solver(denoise, normal(4, 2), process, num_steps=7))
    values = torch.stack(heard)[:, 0]
    assert values[0] == 999 and values[-1] == 0 and (values != values.round()).any() and len(steps) == 7
    assert (process.at("log_snr", values, values).diff().diff().abs() < 1e-9).all()
    heard.clear()
    samplers.last(samplers.dpm_solver(denoise, normal(4, 2), process))
    assert all(i.dtype == torch.int64 for i in heard) and len(heard) == 1000


def test_errors() -> None:
    process = exact_process(keep="10")
    arguments = (ideal(process), normal(4, 2), process)
    for wrong, text in (
        (samplers.ddim(*arguments, eta=1.5), "eta=1.5"),
        (samplers.heun(*arguments, churn=-1), "churn=-1"),
        (samplers.heun(*arguments, num_steps=1), "steps=1"),
        (samplers.plms(*arguments, order=5), "order=5"),
        (iter(()), "no step"),
    ):
        with pytest.raises(ValueError, match=text):
            samplers.last(wrong)


def test_churn_raises_a_level_by_at_most_the_square_root_of_2_and_only_within_its_range() -> None:
    process, heard = exact_process(), []

    def denoise(x: torch.Tensor, i: torch.Tensor) -> Denoised:
        heard.append(process.at("sqrt_recipm1_alpha_bar", i, i)[0].item())
        return ideal(process)(x, i)

    samplers.last(samplers.heun(denoise, normal(4, 2), process, num_steps=6, noise=seeded(1)))
    levels, first = heard[0:1] + heard[1::2], heard[0::2]  # predictor at each level, corrector at the next
    assert first == pytest.approx(levels)
    heard.clear()
    limits = {"churn_min": levels[4] * 0.99, "churn_max": levels[2] * 1.01}
    samplers.last(samplers.heun(denoise, normal(4, 2), process, num_steps=6, churn=1e9, noise=seeded(1), **limits))
    factors = [raised / level for raised, level in zip(heard[0::2], levels)]
    assert factors == pytest.approx([1, 1, 2**0.5, 2**0.5, 2**0.5, 1], rel=1e-6)


@pytest.mark.parametrize("run", [samplers.ddim, samplers.ddim_invert])
def test_a_chain_keeps_its_number_format_whatever_the_network_answers(run: Any) -> None:
    process = uniform_process(5)

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        return Denoised((0.5 * x).bfloat16(), Spread(x, x))

    for step in run(denoise, torch.randn(2, 3, dtype=torch.float64), process):
        assert step.x.dtype == torch.float64


# --- a mixture in one dimension: the flow keeps quantiles, so that its end is known for every start ---

WEIGHTS, CENTRES, DEVIATIONS = (torch.tensor(v, dtype=torch.float64) for v in ([0.4, 0.6], [-0.6, 0.5], [0.15, 0.2]))


def parts(x: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of x `[N, 1]` to the components' centres at this noise level, and their variances."""
    return alpha_bar.sqrt() * CENTRES - x, alpha_bar * DEVIATIONS**2 + 1 - alpha_bar


def clean_mixture(x: Tensor, alpha_bar: Tensor) -> Tensor:
    away, variance = parts(x, alpha_bar)
    share = (WEIGHTS.log() - 0.5 * away**2 / variance - 0.5 * variance.log()).softmax(-1)
    score = (share * away / variance).sum(-1, keepdim=True)
    return (x + (1 - alpha_bar) * score) / alpha_bar.sqrt()


def below(x: Tensor, alpha_bar: Tensor) -> Tensor:
    away, variance = parts(x, alpha_bar)
    return (WEIGHTS * torch.special.ndtr(-away / variance.sqrt())).sum(-1, keepdim=True)


def errors_on_mixture(process: Process, names: list[str], **options: Any) -> dict[str, float]:
    x, low, high = normal(64, 1, seed=5), torch.full((64, 1), -4.0).double(), torch.full((64, 1), 4.0).double()
    quantile = below(x, process.alpha_bar[-1])
    for _ in range(60):
        middle = (low + high) / 2
        too_low = below(middle, process.alpha_bar[0]) < quantile
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    right = clean_mixture(low, process.alpha_bar[0])

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        return Denoised(clean_mixture(x, process.at("alpha_bar", i, x)), Spread(x, x))

    found = {name: samplers.last(ALL[name](denoise, x, process, **options)) for name in names}
    return {name: float((value - right).square().mean().sqrt()) for name, value in found.items()}


@pytest.mark.parametrize("count", [10, 15, 20, 25, 50, "ddim10", "ddim20", "ddim50"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_second_order_is_no_worse_than_first_on_respaced_steps(schedule: str, count: int | str) -> None:
    """With the last move as wide as even spacing makes it, and on the cosine schedule from a first step at sigma 20,293."""
    errors = errors_on_mixture(exact_process(schedule, keep=str(count)), ["ddim", "plms", "dpm_solver", "heun"])
    assert max(errors.values()) == errors["ddim"], errors


@pytest.mark.parametrize("name", ["plms", "dpm_solver", "heun"])
@pytest.mark.parametrize("keep", ["", "12", "400"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_solvers_start_at_the_largest_level_that_means_anything(name: str, keep: str, schedule: str) -> None:
    """One step at sigma 164 stands for those above it, and is told the time of the whole schedule; a linear one stays as it is."""
    process, whole, heard = exact_process(schedule, keep=keep), exact_process(schedule), []

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        heard.append((process.at("sqrt_recipm1_alpha_bar", i, i)[0].item(), process.time_at(i)[0].item(), i.dtype))
        return Denoised(x, Spread(x, x))

    steps = list(ALL[name](denoise, normal(2, 1), process))
    level, time, dtype = heard[0]
    kept = int((process.sqrt_recipm1_alpha_bar < 164).sum())
    assert steps[-1].i == 0
    if schedule == "linear":
        assert time == 999 and dtype == torch.int64 and len(steps) == len(process)
    else:
        assert level == pytest.approx(164, rel=1e-6) and len(steps) == kept + 1
        expected = np.interp(np.log(level), whole.sqrt_recipm1_alpha_bar.log().numpy(), np.arange(1000))
        assert time == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("keep", ["10", "20", "ddim25", "8,4,4"])
def test_churned_levels_are_told_the_times_of_the_whole_schedule(schedule: str, keep: str) -> None:
    process, whole, heard = exact_process(schedule, keep=keep), exact_process(schedule), []

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        level = process.at("log_snr", i, i)[0].item()
        heard.append((process.time_at(i)[0].item(), np.interp(-level, -whole.log_snr.numpy(), np.arange(1000))))
        return ideal(process)(x, i)

    samplers.last(samplers.heun(denoise, normal(2, 2), process, churn=40.0, churn_min=0.005, noise=seeded(1)))
    told, expected = zip(*heard)
    assert any(time != round(time) for time in told)
    np.testing.assert_allclose(told, expected, atol=1e-6)
