"""Schedules that leave nothing of the data at the last step: the rescaling, finite tables, and right samples of Gaussian data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian_data import MEAN, SIGMA, normal, sample_moments, seeded, whitened

from guided_diffusion.build import build_process
from guided_diffusion.config import DiffusionConfig, RunConfig
from guided_diffusion.diffusion import samplers
from guided_diffusion.diffusion.denoiser import make_denoiser
from guided_diffusion.diffusion.process import Process, make_process, respace, space_timesteps, tables_of
from guided_diffusion.diffusion.schedules import SCHEDULES, named_betas, zero_terminal_snr


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [21, 1000, 4000])
def test_the_root_of_alpha_bar_is_shifted_and_scaled(name: str, num_steps: int) -> None:
    before = np.sqrt(np.cumprod(1 - named_betas(name, num_steps)))
    betas = zero_terminal_snr(named_betas(name, num_steps))
    alpha_bar = np.cumprod(1 - betas)
    after = np.sqrt(alpha_bar)
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    assert 0 < alpha_bar[-1] / (1 - alpha_bar[-1]) < 1e-8 and np.all(np.diff(alpha_bar) < 0)
    # An affine map: all differences between steps grow by one factor, up to the number that stands for 0.
    np.testing.assert_allclose(
        np.diff(after[:-1]), np.diff(before[:-1]) * (after[0] / (before[0] - before[-1])), rtol=1e-6
    )
    assert all(np.isfinite(table).all() for table in tables_of(betas).values())
    with pytest.raises(ValueError, match="--zero_terminal_snr True needs at least 2 steps"):
        zero_terminal_snr(np.array([0.5]))


def zero_process(schedule: str, keep: str) -> Process:
    whole = make_process(zero_terminal_snr(named_betas(schedule, 1000)))
    return respace(whole, space_timesteps(1000, keep))


def ideal_net(process: Process, predicts: str):
    """The network with the least error on data of N(MEAN, SIGMA): E[x0 | x], or the velocity that it gives."""
    values, vectors = (part.to(process.alpha_bar.dtype) for part in torch.linalg.eigh(SIGMA))
    centre = MEAN.to(process.alpha_bar.dtype)

    def net(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        i = torch.searchsorted(process.time, time)
        alpha_bar = process.at("alpha_bar", i, x)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        away = (x - alpha * centre) @ vectors
        x0 = centre + (away * alpha * values / (alpha_bar * values + sigma**2)) @ vectors.T
        eps = (away * sigma / (alpha_bar * values + sigma**2)) @ vectors.T
        return x0 if predicts == "x0" else alpha * eps - sigma * x0

    return net


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("predicts", ["v", "x0"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["ancestral", "ddim", "ddim_eta", "plms", "dpm_solver", "heun"])
def test_samples_have_the_moments_of_the_data(name: str, schedule: str, predicts: str, dtype: torch.dtype) -> None:
    random = name in ("ancestral", "ddim_eta")
    process = zero_process(schedule, "250" if random else "200").to(dtype=dtype)
    options = {"noise": seeded(1)} if random else {}
    if name == "ddim_eta":
        options["eta"] = 1.0
    sampler = samplers.ddim if name == "ddim_eta" else getattr(samplers, name)
    denoise = make_denoiser(
        ideal_net(process, predicts), process, predicts=predicts, variance="fixed_small", clip=False
    )
    steps = list(sampler(denoise, whitened(4000 if random else 50).to(dtype), process, **options))
    assert all(step.x.isfinite().all() and step.x0.isfinite().all() for step in steps)
    mean, covariance = sample_moments(steps[-1].x.double())
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.04 if random else 0.02)
    torch.testing.assert_close(covariance, SIGMA, rtol=0, atol=0.04 if random else 0.02)


def test_the_network_begins_from_noise_that_says_nothing() -> None:
    """At the last step the answer is the mean of the data, whatever the noise is."""
    process = zero_process("linear", "25").to(dtype=torch.float64)
    for predicts in ("v", "x0"):
        denoise = make_denoiser(
            ideal_net(process, predicts), process, predicts=predicts, variance="fixed_small", clip=False
        )
        x0 = denoise(normal(16, 2), torch.full((16,), len(process) - 1)).x0
        torch.testing.assert_close(x0, MEAN.expand(16, 2), rtol=0, atol=1e-4)


def test_the_flag() -> None:
    with pytest.raises(ValueError, match="--zero_terminal_snr True .* give --predict v or --predict x0"):
        RunConfig.from_flags("diffusion", {"zero_terminal_snr": True})
    for flags in ({"predict": "v"}, {"predict_xstart": True}):
        config = RunConfig.from_flags("diffusion", {"zero_terminal_snr": True, **flags})
        assert RunConfig.from_dict("diffusion", config.to_dict()) == config
        assert float(build_process(config.diffusion).alpha_bar[-1]) == pytest.approx(1e-9, rel=1e-5)
    RunConfig.from_flags("classifier", {"zero_terminal_snr": True})
    assert "zero_terminal_snr" not in DiffusionConfig().to_dict()  # as in files and receipts of older versions
