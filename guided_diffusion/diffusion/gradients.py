"""Guidance by gradients: of a classifier of noised images, or of one of clean images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .combining import Scale, by_level
from .denoiser import Denoised, Denoiser, Net
from .process import Process, Tables

# (x [B, ...], time [B]) -> gradient of a log-probability with respect to x, the shape of x. Time, as the classifier takes it.
GradLogProb = Callable[[Tensor, Tensor], Tensor]
# x0 predicted [B, ...] -> a gradient with respect to it, of the same shape.
GradOfClean = Callable[[Tensor], Tensor]


def log_prob_gradient(net: Net, labels: Tensor, entropy: bool = False, cap: float = 20.0) -> GradLogProb:
    """The gradient of log p(labels | x) under a classifier `net(x, time) -> logits [B, classes]`; `labels` int64 `[B]`.

    With `entropy`, that of an example is multiplied by log(classes) / entropy of p, at most `cap`: 1 where p is uniform, more where the
    classifier is sure and its gradient therefore small (Li et al. 2022, arXiv 2206.11474).
    Works under `no_grad` and with frozen weights; the weights never receive a gradient. It can be part of a compiled graph.
    """
    if not cap >= 1:
        raise ValueError(f"cap={cap} of the entropy scale must be at least 1, which is no scale")

    def total(x: Tensor, time: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = net(x, time).float().log_softmax(dim=-1)
        return log_probs.gather(-1, labels.view(-1, 1)).sum(), log_probs

    def gradient(x: Tensor, time: Tensor) -> Tensor:
        found, log_probs = _gradient_of(total, x, time, labels)
        if not entropy:
            return found
        most, amount = math.log(log_probs.shape[-1]), -(log_probs.exp() * log_probs).sum(dim=-1)
        factor = most / amount.clamp(min=most / cap)
        return found * factor.to(found.dtype).view(-1, *(1,) * (found.ndim - 1))

    return gradient


def clean_gradient(
    net: Callable[[Tensor], Tensor], labels: Tensor, tau1: float = 1.0, tau2: float = 0.5
) -> GradOfClean:
    """The gradient of tau1 f_label - logsumexp(tau2 f), f = `net(x0)` `[B, classes]`: any classifier of clean images in [-1, 1].

    Ma et al. 2023, arXiv 2310.11311, who use a ResNet-101 with softplus (beta 3) for ReLU.
    """

    def total(x0: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(x0).float()
        chosen = logits.gather(-1, labels.view(-1, 1)).squeeze(-1)
        return (tau1 * chosen - (tau2 * logits).logsumexp(dim=-1)).sum(), logits

    return lambda x0: _gradient_of(total, x0, labels)[0]


def _gradient_of(total: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`total(x, *inputs)` is (a number, more): the number's gradient with respect to x, and the rest, both detached."""
    if torch.compiler.is_compiling():  # can be followed in this form; outside of a compiler it is the slower one
        return torch.func.grad(total, has_aux=True)(x, *inputs)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        # backward keeps no tensor of inference mode
        value, more = total(x, *(given.clone() if given.is_inference() else given for given in inputs))
        return torch.autograd.grad(value, x)[0], more.detach()


def classifier(denoise: Denoiser, process: Process, grad_log_prob: GradLogProb, scale: Scale = 1.0) -> Denoiser:
    """Guide the score: eps - sqrt(1 - alpha_bar) * scale * gradient (Dhariwal & Nichol 2021, algorithm 2). For DDIM and other solvers.

    The classifier is not called where the scale is 0.
    """
    return _by_score(denoise, process, lambda x, i, x0: grad_log_prob(x, process.time_at(i)), scale)


def score_shifted_eps(tables: Tables, eps: Tensor, x: Tensor, i: Tensor, gradient: Tensor) -> Tensor:
    """eps after the score has moved by `gradient` (Song et al. 2020, arXiv 2011.13456): less by sqrt(1 - alpha_bar) gradient."""
    return torch.addcmul(eps, (1 - tables.at("alpha_bar", i, x)).sqrt(), gradient, value=-1)


def classifier_mean(denoise: Denoiser, process: Process, grad_log_prob: GradLogProb, scale: Scale = 1.0) -> Denoiser:
    """Guide the mean of a step: mean + variance * scale * gradient (Dhariwal & Nichol 2021, algorithm 1). For ancestral sampling.

    Carried by x0, which moves by what shifts the posterior mean so far; x0 may therefore leave [-1, 1].
    """
    return _by_mean(denoise, process, lambda x, i, x0: grad_log_prob(x, process.time_at(i)), scale)


def mean_shift(variance: Tensor, gradient: Tensor) -> Tensor:
    """How far a gradient moves the mean of a normal step, to first order (Sohl-Dickstein et al. 2015)."""
    return variance * gradient.float()


# (x, i, x0 predicted) -> a gradient of the shape of x.
_Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


def _by_score(denoise: Denoiser, process: Process, gradient_at: _Gradient, scale: Scale) -> Denoiser:
    def make(scale: Any, denoise: Denoiser) -> Denoiser:
        def guided(x: Tensor, i: Tensor) -> Denoised:
            plain = denoise(x, i)
            # Where eps moves by -sqrt(1 - alpha_bar) gradient, x0 moves by (1 - alpha_bar) / sqrt(alpha_bar) gradient.
            share = process.at("score_to_x0", i, x) * scale
            return plain.moved(torch.addcmul(plain.x0, share, gradient_at(x, i, plain.x0)))

        return guided

    return by_level(make, scale, 0.0, process, denoise)


def _by_mean(
    denoise: Denoiser,
    process: Process,
    gradient_at: _Gradient,
    scale: Scale,
    more: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Denoiser:
    """`more(i, x)` is added to the variance by which the mean is shifted."""

    def make(scale: Any, denoise: Denoiser) -> Denoiser:
        def guided(x: Tensor, i: Tensor) -> Denoised:
            plain = denoise(x, i)
            gradient = gradient_at(x, i, plain.x0) * scale
            spread = plain.both()
            variance = spread.variance if more is None else spread.variance + more(i, x)
            x0 = plain.x0 + mean_shift(variance, gradient) / process.at("posterior_mean_x0", i, x)
            return replace(plain, x0=x0, spread=spread)

        return guided

    return by_level(make, scale, 0.0, process, denoise)


def classifier_x0(denoise: Denoiser, process: Process, gradient: GradOfClean, scale: Scale = 1.0) -> Denoiser:
    """Guide the score by a classifier of clean images: `gradient` (see `clean_gradient`) is used as if it were with respect to x."""
    return _by_score(denoise, process, lambda x, i, x0: gradient(x0), scale)


def classifier_x0_mean(
    denoise: Denoiser, process: Process, gradient: GradOfClean, scale: Scale = 1.0, *, gamma: float = 0.3
) -> Denoiser:
    """`classifier_x0` for ancestral sampling: mean + (variance + gamma * largest variance * sin(pi i / T)) * scale * gradient.

    The largest variance is that of the posterior in the noisiest step of `process`, which has T steps.
    """

    def more(i: Tensor, x: Tensor) -> Tensor:
        wave = (i * (math.pi / len(process))).sin().to(x.dtype)
        return gamma * process.posterior_variance.amax() * wave.view(-1, *(1,) * (x.ndim - 1))

    return _by_mean(denoise, process, lambda x, i, x0: gradient(x0), scale, more)
