"""The meaning of a network's output: raw channels -> clean prediction and variance of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from .process import Process, Tables, x0_from_eps, x0_from_previous_x, x0_from_v

Predicts = Literal["eps", "x0", "previous_x", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
PREDICTS: tuple[Predicts, ...] = get_args(Predicts)
VARIANCES: tuple[Variance, ...] = get_args(Variance)


class Net(Protocol):
    """A network, or any callable: x `[B, C, ...]`, time `[B]`, named conditions -> `[B, C, ...]` or `[B, 2C, ...]`."""

    def __call__(self, x: Tensor, time: Tensor, /, **cond: Any) -> Tensor: ...


class Spread(NamedTuple):
    """Variance of the step from i to i-1, and its logarithm (finite even where the variance is 0); both broadcast to x."""

    variance: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Denoised:
    """What is believed at (x, i): the clean data, and how widely a random step to i-1 spreads.

    `spread` may be a function that computes it: only samplers that draw from it pay for it.
    """

    x0: Tensor
    spread: Spread | Callable[[], Spread]

    @property
    def variance(self) -> Tensor:
        return self.both().variance

    @property
    def log_variance(self) -> Tensor:
        return self.both().log_variance

    def both(self) -> Spread:
        """Variance and log-variance, computed once for both."""
        return self.spread if isinstance(self.spread, Spread) else self.spread()


class Denoiser(Protocol):
    """x `[B, C, ...]`, step positions i `[B]` (integer or float) -> Denoised. What samplers call and guidance wraps."""

    def __call__(self, x: Tensor, i: Tensor, /) -> Denoised: ...


def make_denoiser(
    net: Net,
    process: Process,
    cond: Mapping[str, Any] | None = None,
    *,
    predicts: Predicts = "eps",
    variance: Variance = "learned_range",
    clip: bool = True,
    transform_x0: Callable[[Tensor], Tensor] | None = None,
) -> Denoiser:
    """Read `net` as a denoiser for one batch conditioned on `cond` (keyword arguments of the network).

    `predicts` and `variance` say how it was trained. `clip` keeps x0 in [-1, 1]; `transform_x0` (say, dynamic thresholding) comes first.
    """
    check_reading(predicts, variance)
    named = dict(cond or {})

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        prediction, raw = split_variance(net(x, process.time_at(i), **named), x, variance)
        x0 = x0_from_output(process, prediction, x, i, predicts)
        if clip:  # would make an infinite value an ordinary one, of an image that looks like one
            x0 = torch.where(x0.isfinite(), x0, torch.nan)
        return Denoised(bounded(x0, clip, transform_x0), partial(step_spread, process, raw, x, i, variance))

    return denoise


def check_reading(predicts: str, variance: str) -> None:
    """ValueError unless both are known readings."""
    if predicts not in PREDICTS:
        raise ValueError(f"predicts={predicts!r} is not one of {', '.join(PREDICTS)}")
    if variance not in VARIANCES:
        raise ValueError(f"variance={variance!r} is not one of {', '.join(VARIANCES)}")


def split_variance(output: Tensor, x: Tensor, variance: Variance) -> tuple[Tensor, Tensor | None]:
    """Cut a network output into its prediction and, where the variance is learned, the equally wide channels that code it."""
    channels, learned = x.shape[1], variance in ("learned", "learned_range")
    width = channels * (2 if learned else 1)
    if output.shape[1] != width:
        raise ValueError(
            f"the network returned {output.shape[1]} channels for an input of {channels}; with variance={variance!r} "
            f"it should return {width} (does learn_sigma match the weights?)"
        )
    return (output.narrow(1, 0, channels), output.narrow(1, channels, channels)) if learned else (output, None)


# Prediction -> the clean data that it stands for.
_X0_FROM: dict[Predicts, Callable[[Tables, Tensor, Tensor, Tensor], Tensor]] = {
    "eps": x0_from_eps,
    "x0": lambda tables, x, i, prediction: prediction,
    "previous_x": x0_from_previous_x,
    "v": x0_from_v,
}


def x0_from_output(tables: Tables, prediction: Tensor, x: Tensor, i: Tensor, predicts: Predicts) -> Tensor:
    """The clean data that a network's prediction stands for."""
    return _X0_FROM[predicts](tables, x, i, prediction)


def bounded(x0: Tensor, clip: bool, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A clean prediction after the caller's own `transform`, kept in the range of images where `clip`."""
    if transform is not None:
        x0 = transform(x0)
    return x0.clamp(-1, 1) if clip else x0


def step_spread(tables: Tables, raw: Tensor | None, x: Tensor, i: Tensor, variance: Variance) -> Spread:
    """Variance of p(x_{i-1} | x_i).

    "fixed_small" is the posterior's (0 at i = 0), "fixed_large" beta; "learned" reads the network's channels as the logarithm, and
    "learned_range" puts their -1 .. 1 between the logarithms of the two (arXiv 2102.09672, eq. 15).
    """
    if raw is None:
        name = {"fixed_small": "posterior", "fixed_large": "fixed_large"}[variance]
        return Spread(tables.at(f"{name}_variance", i, x), tables.at(f"{name}_log_variance", i, x))
    log_variance = raw
    if variance == "learned_range":
        share = (raw + 1) / 2
        log_variance = share * tables.at("log_beta", i, x) + (1 - share) * tables.at("posterior_log_variance", i, x)
    return Spread(log_variance.exp(), log_variance)
