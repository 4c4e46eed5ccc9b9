"""From a network's output channels to the predicted clean data x0 and the variance of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    """The prediction at (x, i): the clean data x0, and the variance of the step to i-1.

    `spread` may be a function that computes the variance, so that samplers which do not use it do not pay for it. `share` says the
    same for steps of any width: the logarithm of a step's variance is `share` times that of beta plus 1 - `share` times that
    of the posterior's variance. None where the variance belongs to the process's own steps.
    """

    x0: Tensor
    spread: Spread | Callable[[], Spread]
    share: Tensor | float | None = None

    @property
    def variance(self) -> Tensor:
        return self.both().variance

    @property
    def log_variance(self) -> Tensor:
        return self.both().log_variance

    def both(self) -> Spread:
        """Variance and log-variance; one call instead of two properties, which may compute it twice."""
        return self.spread if isinstance(self.spread, Spread) else self.spread()

    def moved(self, x0: Tensor) -> Denoised:
        """The same with another `x0`."""
        return replace(self, x0=x0)


class Denoiser(Protocol):
    """x `[B, C, ...]`, step positions i `[B]` (integer or float) -> Denoised. What samplers call and guidance wraps."""

    def __call__(self, x: Tensor, i: Tensor, /) -> Denoised: ...


@dataclass(frozen=True)
class ByLevel:
    """A denoiser that is another one at each noise level: `make(sigma)` with sigma = sqrt(1/alpha_bar - 1), a number of the host.

    So a guidance is left out, with its networks, where its scale is none. Samplers know their levels beforehand and use `at_level`;
    called as it is, it reads the level from the device, and waits for it.
    """

    process: Process
    make: Callable[[float], Denoiser]

    def __call__(self, x: Tensor, i: Tensor) -> Denoised:
        sigma = self.process.at("sqrt_recipm1_alpha_bar", i.reshape(-1)[:1], i.reshape(-1)[:1])
        return self.make(float(sigma))(x, i)


def at_level(denoise: Denoiser, sigma: float) -> Denoiser:
    """What `denoise` is at the noise level `sigma`: itself unless it is a `ByLevel`."""
    return denoise.make(sigma) if isinstance(denoise, ByLevel) else denoise


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

    `predicts` and `variance` say how it was trained. `clip` clamps x0 to [-1, 1], after `transform_x0` has changed it.
    """
    check_reading(predicts, variance)
    named = dict(cond or {})

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        prediction, raw = split_variance(net(x, process.time_at(i), **named), x, variance)
        x0 = x0_from_output(process, prediction, x, i, predicts)
        if clip:
            x0 = failures_kept(x0)
        spread = partial(step_spread, process, raw, x, i, variance)
        return Denoised(bounded(x0, clip, transform_x0), spread, variance_share(raw, variance))

    return denoise


def check_reading(predicts: str, variance: str) -> None:
    """ValueError unless `predicts` is one of `PREDICTS` and `variance` one of `VARIANCES`."""
    if predicts not in PREDICTS:
        raise ValueError(f"predicts={predicts!r} is not one of {', '.join(PREDICTS)}")
    if variance not in VARIANCES:
        raise ValueError(f"variance={variance!r} is not one of {', '.join(VARIANCES)}")


def split_variance(output: Tensor, x: Tensor, variance: Variance) -> tuple[Tensor, Tensor | None]:
    """Split a network output into the prediction and, if the variance is learned, as many channels that encode it."""
    channels, learned = x.shape[1], variance in ("learned", "learned_range")
    width = channels * (2 if learned else 1)
    if output.shape[1] != width:
        raise ValueError(
            f"the network returned {output.shape[1]} channels for an input of {channels}; with variance={variance!r} "
            f"it should return {width} (does learn_sigma match the weights?)"
        )
    return (output.narrow(1, 0, channels), output.narrow(1, channels, channels)) if learned else (output, None)


# What the network predicts -> function that computes x0 from it.
_X0_FROM: dict[Predicts, Callable[[Tables, Tensor, Tensor, Tensor], Tensor]] = {
    "eps": x0_from_eps,
    "x0": lambda tables, x, i, prediction: prediction,
    "previous_x": x0_from_previous_x,
    "v": x0_from_v,
}


def x0_from_output(tables: Tables, prediction: Tensor, x: Tensor, i: Tensor, predicts: Predicts) -> Tensor:
    """The clean data x0 implied by a network's prediction."""
    return _X0_FROM[predicts](tables, x, i, prediction)


def failures_kept(x0: Tensor) -> Tensor:
    """`x0` with nan in place of inf: clamping would turn inf into 1 and hide the failure; nan passes through."""
    return torch.where(x0.isfinite(), x0, torch.nan)


def bounded(x0: Tensor, clip: bool, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """x0 after the caller's `transform`, and clamped to [-1, 1] if `clip`."""
    if transform is not None:
        x0 = transform(x0)
    return x0.clamp(-1, 1) if clip else x0


def step_spread(tables: Tables, raw: Tensor | None, x: Tensor, i: Tensor, variance: Variance) -> Spread:
    """Variance of p(x_{i-1} | x_i), from the variance channels `raw` (None if it is fixed).

    "fixed_small": the posterior's (0 at i = 0). "fixed_large": beta (at i = 0 the posterior's of step 1). "learned": e^raw.
    "learned_range": `raw` -1 .. 1 interpolates from the log of the posterior's to log beta (arXiv 2102.09672, eq. 15).
    """
    if raw is None:
        name = {"fixed_small": "posterior", "fixed_large": "fixed_large"}[variance]
        return Spread(tables.at(f"{name}_variance", i, x), tables.at(f"{name}_log_variance", i, x))
    log_variance = raw
    share = variance_share(raw, variance)
    if share is not None:
        log_variance = share * tables.at("log_beta", i, x) + (1 - share) * tables.at("posterior_log_variance", i, x)
    return Spread(log_variance.exp(), log_variance)


def variance_share(raw: Tensor | None, variance: Variance) -> Tensor | float | None:
    """`Denoised.share` of a network with the variance channels `raw` (None if the variance is fixed)."""
    if raw is None:
        return 1.0 if variance == "fixed_large" else 0.0
    return (raw + 1) / 2 if variance == "learned_range" else None
