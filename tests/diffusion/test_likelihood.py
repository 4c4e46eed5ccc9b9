"""Divergences and pixel likelihoods against torch.distributions; the bound against the entropy of known data."""

from __future__ import annotations

import math

import torch
from gaussian_data import exact_process, normal, seeded
from torch.distributions import Normal, kl_divergence

from guided_diffusion.diffusion.denoiser import Denoised, Spread
from guided_diffusion.diffusion.densities import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from guided_diffusion.diffusion.likelihood import bits_per_dim


def test_divergence() -> None:
    mean1, logvar1, mean2, logvar2 = (normal(50, seed=seed) for seed in range(4))
    expected = kl_divergence(Normal(mean1, (logvar1 / 2).exp()), Normal(mean2, (logvar2 / 2).exp()))
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), expected)


def test_cumulative_distribution() -> None:
    x = torch.linspace(-6, 6, 500, dtype=torch.float64)
    assert (approx_standard_normal_cdf(x) - Normal(0.0, 1.0).cdf(x)).abs().max() < 2e-4


def test_the_256_values_of_a_pixel_have_probability_one() -> None:
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).expand(3, -1)
    means = torch.tensor([[-1.2], [0.1], [0.9]], dtype=torch.float64).expand(3, 256)
    log_scales = torch.tensor([[-1.0], [-3.5], [-2.0]], dtype=torch.float64).expand(3, 256)
    log_probs = discretized_gaussian_log_likelihood(values, means=means, log_scales=log_scales)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-8)


def test_likelihood_gradients() -> None:
    x = torch.tensor([-1.0, -0.5, 0.3, 1.0], dtype=torch.float64)
    means, scales = (0.3 * normal(4)).requires_grad_(), (normal(4, seed=1) * 0.1 - 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, s: discretized_gaussian_log_likelihood(x, means=m, log_scales=s), (means, scales)
    )


def pixels(sigma: float) -> torch.Tensor:
    """8-bit Gaussian data `[B, D]` in [-1, 1]."""
    return (((sigma * normal(400, 48)) * 127.5 + 127.5).round().clamp(0, 255) - 127.5) / 127.5


def test_bound_lies_just_above_the_entropy() -> None:
    """With the best possible denoiser the bound of Gaussian data comes close to its entropy, and never below."""
    sigma, process = 0.3, exact_process(keep="100")

    def denoise(x: torch.Tensor, i: torch.Tensor) -> Denoised:
        alpha_bar = process.at("alpha_bar", i, x)
        marginal = alpha_bar * sigma**2 + 1 - alpha_bar
        doubt = sigma**2 * (1 - alpha_bar) / marginal
        coefficient = process.at("posterior_mean_x0", i, x)
        variance = process.at("posterior_variance", i, x) + coefficient**2 * doubt
        return Denoised(alpha_bar.sqrt() * sigma**2 / marginal * x, Spread(variance, variance.log()))

    x0 = pixels(sigma)
    bound = bits_per_dim(denoise, process, x0, noise=seeded(2))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * sigma**2) + math.log2(127.5)
    # This sample's own code length; its expectation is the entropy.
    length = (
        (0.5 * (x0 / sigma) ** 2 / math.log(2) + 0.5 * math.log2(2 * math.pi * sigma**2) + math.log2(127.5))
        .mean()
        .item()
    )
    assert abs(length - entropy) < 0.02
    # One draw of noise per step leaves the mean over 400 x 48 values uncertain by about 0.007.
    assert length - 0.025 < bound.total.mean().item() < length + 0.1
    assert bound.vb.shape == (400, 100) and bound.total.shape == (400,)
    torch.testing.assert_close(bound.total, bound.prior + bound.vb.sum(1))
    assert (bound.prior > 0).all() and bound.prior.max() < 1e-4

    worse = bits_per_dim(
        lambda x, i: Denoised(0.5 * denoise(x, i).x0, denoise(x, i).spread), process, x0[:50], noise=seeded(2)
    )
    assert worse.total.mean() > bound.total[:50].mean() + 0.5


def test_the_bound_has_the_errors_of_each_step_from_the_noisiest_on() -> None:
    process, x0, visited = exact_process(keep="5"), pixels(0.3)[:3], []

    def denoise(x: torch.Tensor, i: torch.Tensor) -> Denoised:
        assert not torch.is_grad_enabled()
        visited.append(int(i[0]))
        log_variance = process.at("fixed_large_log_variance", i, x)
        return Denoised(0.5 * x, Spread(log_variance.exp(), log_variance))

    bound, noise = bits_per_dim(denoise, process, x0, noise=seeded(2)), seeded(2)
    assert visited == [4, 3, 2, 1, 0]
    for column, step in enumerate(visited):
        eps, alpha_bar = noise(x0), float(process.alpha_bar[step])
        x = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps
        error, ratio = 0.5 * x - x0, (alpha_bar / (1 - alpha_bar)) ** 0.5
        torch.testing.assert_close(bound.x0_mse[:, column], error.square().flatten(1).mean(1))
        expected = (ratio * error).square().flatten(1).mean(1)  # the eps that 0.5 x implies is off by so much
        torch.testing.assert_close(bound.eps_mse[:, column], expected, rtol=1e-3, atol=1e-5)
