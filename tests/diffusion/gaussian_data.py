"""Gaussian data, for which the ideal denoiser is known in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.diffusion.denoiser import Denoised, Denoiser, Spread
from guided_diffusion.diffusion.process import Process, make_process, respace, space_timesteps
from guided_diffusion.diffusion.schedules import named_betas

SIGMA = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
MEAN = torch.tensor([0.7, -0.2], dtype=torch.float64)


def exact_process(schedule: str = "linear", keep: str = "", num_steps: int = 1000) -> Process:
    """A process whose tables are float64, so that only the method's own error is seen."""
    process = respace(make_process(named_betas(schedule, num_steps)), space_timesteps(num_steps, keep))
    return process.to(dtype=torch.float64)


def ideal(process: Process, mean: Tensor = MEAN, sigma: Tensor = SIGMA) -> Denoiser:
    """E[x0 | x] for x0 ~ N(mean, sigma), x `[B, D]`, with the variance of the posterior step."""
    values, vectors = torch.linalg.eigh(sigma)

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        alpha_bar = process.at("alpha_bar", i, x)
        gain = alpha_bar.sqrt() * values / (alpha_bar * values + 1 - alpha_bar)
        x0 = mean + ((x - alpha_bar.sqrt() * mean) @ vectors * gain) @ vectors.T
        spread = Spread(process.at("posterior_variance", i, x), process.at("posterior_log_variance", i, x))
        return Denoised(x0, spread)

    return denoise


def uniform_process(num_steps: int) -> Process:
    """Equal steps of log-SNR between fixed ends: the grid on which a multistep method shows its order."""
    alpha_bar = torch.linspace(8, -9, num_steps, dtype=torch.float64).sigmoid().numpy()
    return make_process(1 - alpha_bar / np.append(1.0, alpha_bar[:-1])).to(dtype=torch.float64)


def whitened(count: int) -> Tensor:
    """Normal numbers `[count, 2]` whose mean and covariance are exactly 0 and 1."""
    x = normal(count, 2)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int):
    """A `noise=` function with a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x, step=0, draw=0: torch.randn(x.shape, dtype=x.dtype, generator=generator)
