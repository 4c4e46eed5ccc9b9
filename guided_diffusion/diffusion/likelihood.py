"""How probable data is: divergences, the likelihood of 8-bit pixels, and the variational bound walked step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np  # noqa: F401  `from guided_diffusion.losses import *` has always brought `np` and `th`; this room is what it opens on
import torch
import torch as th  # noqa: F401  as above
from torch import Tensor

from .denoiser import Denoiser
from .process import Process, Tables, add_noise, eps_from_x0, marginal, mean_flat, posterior, squared_error
from .updates import Noise


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) elementwise, in nats. Arguments broadcast; all but one may be numbers."""
    like = next((value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, Tensor)), None)
    if like is None:
        raise ValueError("normal_kl needs at least one tensor among its four arguments")
    logvar1, logvar2 = (v if isinstance(v, Tensor) else torch.as_tensor(v).to(like) for v in (logvar1, logvar2))
    return 0.5 * (logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """P(N(0, 1) <= x), Page's approximation (1977), within 2e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability in nats of 8-bit values under N(means, e^log_scales), elementwise.

    `x` holds 0..255 mapped to [-1, 1]: a bin is 2/255 wide, and the outermost two reach to infinity (arXiv 2006.11239, eq. 13).
    """
    if not x.shape == means.shape == log_scales.shape:
        shapes = ", ".join(str(tuple(value.shape)) for value in (x, means, log_scales))
        raise ValueError(f"x, means and log_scales must have one shape; got {shapes}")
    centered, precision = x - means, torch.exp(-log_scales)
    below_upper = approx_standard_normal_cdf(precision * (centered + 1.0 / 255.0))
    below_lower = approx_standard_normal_cdf(precision * (centered - 1.0 / 255.0))
    inside = torch.where(x > 0.999, 1.0 - below_lower, below_upper - below_lower)
    return torch.log(torch.where(x < -0.999, below_upper, inside).clamp(min=1e-12))


def in_bits(nats: Tensor) -> Tensor:
    """The same amount of information in bits."""
    return nats / math.log(2.0)


def bound_term(i: Tensor, divergence: Tensor, surprise: Tensor) -> Tensor:
    """One term of the variational bound in bits, from nats `[B]`: a divergence, at i = 0 the surprise at the pixels (eq. 5)."""
    return in_bits(torch.where(i == 0, surprise, divergence))


def bound_between(tables: Tables, x0: Tensor, x: Tensor, i: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The bound's term for steps N(mean, e^log_variance) from x at i, in bits per dimension, `[B]`."""
    true = posterior(tables, x0, x, i)
    divergence = mean_flat(normal_kl(true.mean, true.log_variance, mean, log_variance))
    scales = (0.5 * log_variance).expand_as(mean)
    surprise = -mean_flat(discretized_gaussian_log_likelihood(x0, means=mean, log_scales=scales))
    return bound_term(i, divergence, surprise)


def prior_term(tables: Tables, x0: Tensor, last_step: Tensor) -> Tensor:
    """What the noisiest step `[B]` still tells of x0, in bits per dimension, `[B]`; nothing in a model can change it."""
    end = marginal(tables, x0, last_step)
    zero = torch.zeros((), dtype=x0.dtype, device=x0.device)
    return in_bits(mean_flat(normal_kl(end.mean, end.log_variance, zero, zero)))


class BoundStep(NamedTuple):
    """One step of the walk; values are `[B]`."""

    i: int
    vb: Tensor  # this step's share of the bound, bits per dimension
    x0_mse: Tensor
    eps_mse: Tensor


class Bound(NamedTuple):
    """The variational bound in bits per dimension, per example. Step axes run from T-1 down to 0."""

    total: Tensor  # [B] = prior + sum of vb
    prior: Tensor  # [B]
    vb: Tensor  # [B, T]
    x0_mse: Tensor  # [B, T]
    eps_mse: Tensor  # [B, T]


@torch.no_grad()
def bound_steps(
    denoise: Denoiser, process: Process, x0: Tensor, *, noise: Noise = torch.randn_like
) -> Iterator[BoundStep]:
    """Walk the bound of `x0` `[B, ...]` in [-1, 1] from the noisiest step to the cleanest, one draw of noise for each."""
    steps = torch.arange(len(process), device=x0.device)
    for k in reversed(range(len(process))):
        i, eps = steps[k].expand(x0.shape[0]), noise(x0)
        x = add_noise(process, x0, i, eps)
        denoised = denoise(x, i)
        mean = posterior(process, denoised.x0, x, i).mean
        yield BoundStep(
            k,
            bound_between(process, x0, x, i, mean, denoised.log_variance),
            squared_error(denoised.x0, x0),
            squared_error(eps_from_x0(process, x, i, denoised.x0), eps),
        )


@torch.no_grad()
def bits_per_dim(denoise: Denoiser, process: Process, x0: Tensor, *, noise: Noise = torch.randn_like) -> Bound:
    """The whole variational bound of `x0` `[B, ...]` and its terms; T evaluations of the network."""
    walk = list(bound_steps(denoise, process, x0, noise=noise))
    vb, x0_mse, eps_mse = (torch.stack(rows, dim=1) for rows in zip(*(step[1:] for step in walk)))
    end = torch.full((x0.shape[0],), len(process) - 1, device=x0.device)
    return bound_of(prior_term(process, x0, end), vb, x0_mse, eps_mse)


def bound_of(prior: Tensor, vb: Tensor, x0_mse: Tensor, eps_mse: Tensor) -> Bound:
    """The bound from its prior term `[B]` and step terms `[B, T]`."""
    return Bound(prior + vb.sum(dim=1), prior, vb, x0_mse, eps_mse)
