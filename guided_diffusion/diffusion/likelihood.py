"""The variational bound on the negative log-likelihood of data, computed step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .densities import discretized_gaussian_log_likelihood, mean_flat, normal_kl, squared_error
from .process import Process, Tables, add_noise, eps_from_x0, marginal, posterior


def in_bits(nats: Tensor) -> Tensor:
    """The same amount of information in bits."""
    return nats / math.log(2.0)


def bound_term(i: Tensor, divergence: Tensor, surprise: Tensor) -> Tensor:
    """One term of the bound (arXiv 2006.11239, eq. 5) in bits: the KL, at i = 0 the pixels' negative log-likelihood."""
    return in_bits(torch.where(i == 0, surprise, divergence))


def bound_between(tables: Tables, x0: Tensor, x: Tensor, i: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The bound's term at i for model steps p(x_{i-1} | x) = N(mean, e^log_variance), in bits per dimension, `[B]`."""
    target = posterior(tables, x0, x, i)
    divergence = mean_flat(normal_kl(target.mean, target.log_variance, mean, log_variance))
    scales = (0.5 * log_variance).expand_as(mean)
    surprise = -mean_flat(discretized_gaussian_log_likelihood(x0, means=mean, log_scales=scales))
    return bound_term(i, divergence, surprise)


def prior_term(tables: Tables, x0: Tensor, last_step: Tensor) -> Tensor:
    """KL(q(x_i | x0) || N(0, I)) at i = `last_step` `[B]`, in bits per dimension, `[B]`; independent of the model."""
    end = marginal(tables, x0, last_step)
    zero = torch.zeros((), dtype=x0.dtype, device=x0.device)
    return in_bits(mean_flat(normal_kl(end.mean, end.log_variance, zero, zero)))


class Bound(NamedTuple):
    """The variational bound in bits per dimension, per example. Step axes run from T-1 down to 0."""

    prior: Tensor  # [B]
    vb: Tensor  # [B, T]: each step's share
    x0_mse: Tensor  # [B, T]
    eps_mse: Tensor  # [B, T]

    @property
    def total(self) -> Tensor:
        """The whole bound, `[B]`."""
        return self.prior + self.vb.sum(dim=1)


@torch.no_grad()
def bits_per_dim(
    denoise: Denoiser, process: Process, x0: Tensor, *, noise: Callable[[Tensor], Tensor] = torch.randn_like
) -> Bound:
    """The bound of `x0` `[B, ...]` in [-1, 1], one draw of noise and one evaluation of the network for each step."""
    steps = torch.arange(len(process), device=x0.device)
    rows = []
    for step in steps.flip(0):
        i, eps = step.expand(x0.shape[0]), noise(x0)
        x = add_noise(process, x0, i, eps)
        denoised = denoise(x, i)
        mean = posterior(process, denoised.x0, x, i).mean
        vb = bound_between(process, x0, x, i, mean, denoised.log_variance)
        errors = squared_error(denoised.x0, x0), squared_error(eps_from_x0(process, x, i, denoised.x0), eps)
        rows.append((vb, *errors))
    last_step = steps[-1].expand(x0.shape[0])
    return Bound(prior_term(process, x0, last_step), *(torch.stack(column, dim=1) for column in zip(*rows)))
