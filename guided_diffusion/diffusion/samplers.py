"""From noise to data: (denoise, x_T, process, grid) -> iterator of Step. SAMPLERS names them all, with their options.

Every sampler is a generator. It does its arithmetic without gradients, but the caller's grad mode holds wherever the caller's code runs.
A caller may change `step.x` in place: the chain goes on from what it finds there. The coefficients of all steps are Python numbers,
worked out in float64 before the first step, and step positions are made on the device once; no step waits for the device.

A grid (see `grids`) says at which N nodes the chain stops: N - 1 moves, then the result is x0 at the last node. Without one, every step of
the process is a node: `ancestral` and `ddim` start at the last, others at `grids.SIGMA_MAX` at most.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .chain import NotFinite as NotFinite
from .chain import Step as Step
from .chain import check_finite as check_finite
from .chain import last as last
from .chain import on_device
from .denoiser import Denoiser, at_level
from .grids import SIGMA_MAX as SIGMA_MAX
from .grids import Grid, alpha_bar_of, from_step
from .multistep import (
    adams,
    ancestral_euler,
    ddim,
    deis,
    dpm_solver,
    ipndm,
    plms,
    sa,
    sde_dpm_solver,
    unipc,
)
from .multistep import ddim_invert as ddim_invert
from .process import Process, tables_of
from .singlestep import dpm2, dpm_sde, dpm_solver_s, euler, heun, restart
from .updates import Noise, ancestral_update, fresh_noise


@torch.no_grad()
def ancestral(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    noise: Noise = fresh_noise,
    start: int | None = None,
) -> Iterator[Step]:
    """Draw x_{i-1} ~ p(x_{i-1} | x_i) down to i = 0 (Ho et al. 2020, algorithm 2); the last step is the mean.

    Takes every step of the process unless a grid is given. `x` is at step `start`: pure noise at the default T-1, or data noised to an
    earlier step (SDEdit). The variance of wider moves is made from `Denoised.share`; ValueError where there is none.
    """
    own = grid is None or np.array_equal(grid.positions, np.arange(len(process))[::-1])
    grid = from_step(process, start) if grid is None else grid
    from_x0, from_x, log_beta, log_posterior = _posterior(process, grid, own)
    sigma = np.exp(-grid.lam).tolist()
    for n, (position, i) in enumerate(zip(grid.positions.tolist(), on_device(grid.positions, process, x))):
        denoised = at_level(denoise, sigma[n])(x, i)
        x = torch.add(from_x0[n] * denoised.x0, x, alpha=from_x[n])
        if n < len(grid) - 1:
            fresh = noise(x, n)
            x = (
                ancestral_update(x, denoised.log_variance, fresh)
                if own
                else _with_variance(x, denoised.share, log_beta[n], log_posterior[n], fresh)
            )
        yield Step(position, x, denoised.x0)


def _posterior(process: Process, grid: Grid, own: bool) -> tuple[list[float], ...]:
    """Of each move: the weights of x0 and x in its mean, and the logarithms of its beta and of the posterior's variance."""
    if own:
        tables, steps = tables_of(process.betas), grid.positions.astype(int)
        names = ("posterior_mean_x0", "posterior_mean_x", "log_beta", "posterior_log_variance")
        return tuple(tables[name][steps].tolist() for name in names)
    alpha_bar = alpha_bar_of(process, grid)[::-1]
    tables = tables_of(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
    names = ("posterior_mean_x0", "posterior_mean_x", "log_beta", "posterior_log_variance")
    return tuple(tables[name][::-1].tolist() for name in names)


def _with_variance(
    mean: Tensor, share: Tensor | float | None, log_beta: float, log_posterior: float, noise: Tensor
) -> Tensor:
    """A sample of the normal distribution around `mean` whose log-variance lies between the two as `share` says."""
    if share is None:
        raise ValueError(
            "variance='learned' is that of the steps it was trained on, and ancestral sampling on another grid has others; "
            "take --grid respaced with all steps, or another sampler"
        )
    log_variance = share * (log_beta - log_posterior) + log_posterior
    if isinstance(log_variance, Tensor):
        return ancestral_update(mean, log_variance, noise)
    return mean + math.exp(0.5 * log_variance) * noise


@dataclass(frozen=True)
class Sampler:
    """A sampler that can be chosen by name.

    run      (denoise, x, process, grid, **options) -> steps
    options  those that a user can give, beside the grid; defaults are those of `run`
    grid     the name of the grid that it takes where none is chosen
    noise    whether it takes a source of noise
    full     whether it takes every step unless told otherwise
    """

    run: Callable[..., Iterator[Step]]
    options: tuple[str, ...] = ()
    grid: str = "quadratic"
    noise: bool = False
    full: bool = False

    def defaults(self) -> dict[str, Any]:
        """The options with their default values."""
        parameters = inspect.signature(self.run).parameters
        return {name: parameters[name].default for name in self.options}


_ORDERS = ("order", "final_order")
_CHURN = ("churn", "churn_min", "churn_max", "noise_scale")

# Default grids: on data known exactly (mixtures of Gaussians, both schedules, 10 and 20 nodes) `quadratic` leaves the least error in nearly
# all cases; `log_snr` where the wide first move of `quadratic` on the cosine schedule is too much (plms), or where the variance is nearer
# (sde_dpm_solver, sa). Heun as published.
SAMPLERS: dict[str, Sampler] = {
    "ancestral": Sampler(ancestral, grid="respaced", noise=True, full=True),
    "ddim": Sampler(ddim, ("eta",), "respaced", noise=True, full=True),
    "dpm_solver": Sampler(dpm_solver, (*_ORDERS, "exact", "solver", "form")),
    "unipc": Sampler(unipc, (*_ORDERS, "variant", "form")),
    "deis": Sampler(deis, _ORDERS),
    "adams": Sampler(adams, _ORDERS),
    "ipndm": Sampler(ipndm, _ORDERS),
    "plms": Sampler(plms, _ORDERS, "log_snr"),
    "heun": Sampler(heun, _CHURN, "karras", noise=True),
    "euler": Sampler(euler, _CHURN, noise=True),
    "dpm2": Sampler(dpm2),
    "dpm_solver_s": Sampler(dpm_solver_s, ("order",)),
    "sde_dpm_solver": Sampler(sde_dpm_solver, (*_ORDERS, "exact", "solver", "eta"), "log_snr", noise=True),
    "sa": Sampler(sa, (*_ORDERS, "corrector", "tau"), "log_snr", noise=True),
    "ancestral_euler": Sampler(ancestral_euler, ("eta",), noise=True),
    "dpm_sde": Sampler(dpm_sde, ("eta",), noise=True),
    "restart": Sampler(restart, ("restart", "noise_scale"), "karras", noise=True),
}

# Other programs' names, and "fast": the sampler, and options that the name stands for.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fast": ("unipc", {"order": 2}),
    "dpmpp_2m": ("dpm_solver", {"order": 2}),
    "dpmpp_3m": ("dpm_solver", {"order": 3}),
    "dpmpp_2s": ("dpm_solver_s", {"order": 2}),
    "dpmpp_2m_sde": ("sde_dpm_solver", {"order": 2}),
    "dpmpp_3m_sde": ("sde_dpm_solver", {"order": 3, "solver": "taylor"}),
    "dpmpp_sde": ("dpm_sde", {}),
    "uni_pc": ("unipc", {}),
    "lms": ("adams", {}),
    "euler_a": ("ancestral_euler", {}),
}


def named(name: str) -> tuple[str, dict[str, Any]]:
    """(the sampler of that name or alias, options that the name stands for); ValueError if there is none."""
    if name not in SAMPLERS and name not in ALIASES:
        raise ValueError(f"sampler is {name!r}; it must be one of {', '.join((*SAMPLERS, *ALIASES))}")
    return ALIASES.get(name, (name, {}))


def options_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the sampler of that name or alias: `given` ones (None: not given), those of the alias, and defaults.

    ValueError for an option that it does not have.
    """
    sampler, implied = named(name)
    entry, asked = SAMPLERS[sampler], {option: value for option, value in given.items() if value is not None}
    if asked.get("eta") == 0 and "eta" not in entry.options:
        del asked["eta"]  # no fresh noise is no wish; earlier versions stored it with the flags of every job
    for option in asked:
        if option not in entry.options:
            having = [other for other, kind in SAMPLERS.items() if option in kind.options]
            raise ValueError(f"--{option} is of {_listed(having) or 'no sampler'}; --sampler {name} has none")
    return {**entry.defaults(), **implied, **asked}


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
