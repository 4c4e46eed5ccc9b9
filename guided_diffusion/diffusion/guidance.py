"""Guidance: Denoiser -> Denoiser. No sampler knows it is guided."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoised, Denoiser, Net, Spread
from .process import Process, Tables

# (x [B, ...], time [B]) -> gradient of a log-probability with respect to x, the shape of x. Time, as the classifier takes it.
GradLogProb = Callable[[Tensor, Tensor], Tensor]


def log_prob_gradient(net: Net, labels: Tensor) -> GradLogProb:
    """The gradient of log p(labels | x) under a classifier `net(x, time) -> logits [B, classes]`; `labels` int64 `[B]`.

    Works under `no_grad` and with frozen weights; the weights never receive a gradient. It can be part of a compiled graph.
    """

    def total(x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        log_probs = net(x, time).float().log_softmax(dim=-1)
        return log_probs.gather(-1, labels.view(-1, 1)).sum()

    def gradient(x: Tensor, time: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # can be followed in this form; outside of a compiler it is the slower one
            return torch.func.grad(total)(x, time, labels)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            # backward keeps no tensor of inference mode
            inputs = (value.clone() if value.is_inference() else value for value in (time, labels))
            return torch.autograd.grad(total(x, *inputs), x)[0]

    return gradient


def classifier(denoise: Denoiser, process: Process, grad_log_prob: GradLogProb, scale: float = 1.0) -> Denoiser:
    """Guide the score: eps - sqrt(1 - alpha_bar) * scale * gradient (Dhariwal & Nichol 2021, algorithm 2). For DDIM and other solvers."""
    check_scale(scale)

    def guided(x: Tensor, i: Tensor) -> Denoised:
        plain = denoise(x, i)
        gradient = grad_log_prob(x, process.time_at(i))
        # Where eps moves by -sqrt(1 - alpha_bar) gradient, x0 moves by (1 - alpha_bar) / sqrt(alpha_bar) gradient.
        return Denoised(torch.addcmul(plain.x0, process.at("score_to_x0", i, x), gradient, value=scale), plain.spread)

    return guided


def check_scale(scale: float) -> float:
    """`scale`, or ValueError where it is no finite number."""
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} of the guidance must be a finite number; 0 is none")
    return scale


def score_shifted_eps(tables: Tables, eps: Tensor, x: Tensor, i: Tensor, gradient: Tensor) -> Tensor:
    """eps after the score has moved by `gradient` (Song et al. 2020, arXiv 2011.13456): less by sqrt(1 - alpha_bar) gradient."""
    return torch.addcmul(eps, (1 - tables.at("alpha_bar", i, x)).sqrt(), gradient, value=-1)


def classifier_mean(denoise: Denoiser, process: Process, grad_log_prob: GradLogProb, scale: float = 1.0) -> Denoiser:
    """Guide the mean of a step: mean + variance * scale * gradient (Dhariwal & Nichol 2021, algorithm 1). For ancestral sampling.

    Carried by x0, which moves by what shifts the posterior mean so far; x0 may therefore leave [-1, 1].
    """
    check_scale(scale)

    def guided(x: Tensor, i: Tensor) -> Denoised:
        plain = denoise(x, i)
        gradient = grad_log_prob(x, process.time_at(i)) * scale
        spread = plain.both()
        shift = mean_shift(spread.variance, gradient)
        return Denoised(plain.x0 + shift / process.at("posterior_mean_x0", i, x), spread)

    return guided


def mean_shift(variance: Tensor, gradient: Tensor) -> Tensor:
    """How far a gradient moves the mean of a normal step, to first order (Sohl-Dickstein et al. 2015)."""
    return variance * gradient.float()


def classifier_free(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """From the unconditional prediction towards and past the conditional one; 0 is the former, 1 the latter (Ho & Salimans 2022).

    `unconditional` may be any weaker model (autoguidance, Karras et al. 2024). The variance is the conditional one's.
    """
    check_scale(scale)

    def guided(x: Tensor, i: Tensor) -> Denoised:
        strong, weak = conditional(x, i), unconditional(x, i)
        return Denoised(torch.lerp(weak.x0, strong.x0, scale), strong.spread)

    return guided


def interval(guided: Denoiser, plain: Denoiser, process: Process, *, sigma_min: float, sigma_max: float) -> Denoiser:
    """`guided` where sigma_min < sigma <= sigma_max, else `plain`; sigma = sqrt(1/alpha_bar - 1) (Kynkäänniemi et al. 2024).

    Both are evaluated: choosing only one would mean waiting for the device to read the step.
    """
    if not 0 <= sigma_min < sigma_max:
        raise ValueError(
            f"an interval of noise levels needs 0 <= sigma_min < sigma_max; got {sigma_min} and {sigma_max}"
        )

    def choose(x: Tensor, i: Tensor) -> Denoised:
        sigma = process.at("sqrt_recipm1_alpha_bar", i, x)
        inside = (sigma > sigma_min) & (sigma <= sigma_max)
        yes, no = guided(x, i), plain(x, i)

        def spread() -> Spread:
            return Spread(*(torch.where(inside, *pair) for pair in zip(yes.both(), no.both())))

        return Denoised(torch.where(inside, yes.x0, no.x0), spread)

    return choose
