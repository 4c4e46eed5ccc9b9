"""How probable data is: the variational bound, walked step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .densities import discretized_gaussian_log_likelihood, mean_flat, normal_kl, squared_error
from .process import Process, Tables, add_noise, eps_from_x0, marginal, posterior
from .updates import Noise


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
