"""Samplers that look between their nodes, or that draw anew on the way: several evaluations per move, no memory of moves before.

They work on x / sqrt(alpha_bar), whose noise level is s = sigma / alpha = sqrt(1/alpha_bar - 1). The last node gives x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import grids
from .chain import Step, final, on_device
from .denoiser import Denoiser, at_level
from .grids import Grid, check_rho, from_limit
from .multistep import ancestral_levels, check_eta
from .process import Process, position_of
from .updates import Noise, fresh_noise

Restart = tuple[int, int, float, float]  # nodes, times, low, high


def _levels(
    denoise: Denoiser, process: Process, x: Tensor, s: np.ndarray, positions: np.ndarray | None = None
) -> Callable[[Tensor, int], Tensor]:
    """x0 predicted for x / alpha at the k-th of these levels; positions are worked out unless known."""
    places = on_device(position_of(process, -2 * np.log(s)) if positions is None else positions, process, x)
    scale, levels = (1 / np.sqrt(1 + s**2)).tolist(), s.tolist()
    return lambda big, k: at_level(denoise, levels[k])(big * scale[k], places[k]).x0


def heun(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    num_steps: int | None = None,
    rho: float = 7.0,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_scale: float = 1.0,
    noise: Noise = fresh_noise,
) -> Iterator[Step]:
    """Heun's method with optional churn, two evaluations per move (Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2).

    churn        raises the level of a node in [churn_min, churn_max] by a factor of 1 + churn / nodes, at most sqrt(2), with fresh noise
    noise_scale  factor of that noise
    num_steps    a grid of so many nodes, spaced by `rho` (eq. 5)
    """
    check_rho(rho)
    grid = grid or (grids.karras(process, num_steps, rho=rho) if num_steps is not None else from_limit(process))
    visits = _churned(process, grid, churn, churn_min, churn_max, noise_scale)
    yield from _moves(denoise, x, process, visits, noise, second_order=True)


def euler(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_scale: float = 1.0,
    noise: Noise = fresh_noise,
) -> Iterator[Step]:
    """Euler's method with the churn of `heun`, one evaluation per node; without churn it is `ddim`."""
    visits = _churned(process, grid or from_limit(process), churn, churn_min, churn_max, noise_scale)
    yield from _moves(denoise, x, process, visits, noise, second_order=False)


def restart(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    restart: str | Sequence[Restart] = (),
    noise_scale: float = 1.0,
    rho: float = 7.0,
    noise: Noise = fresh_noise,
) -> Iterator[Step]:
    """Heun's method that goes back up on its way (Xu et al. 2023, arXiv 2306.14878, algorithm 2).

    restart  (n, K, low, high): from the node nearest to level `low`, K times up to level `high` by fresh noise and down again on n nodes
             spaced by `rho`; as text "n,K,low,high;..."
    """
    check_rho(rho)
    grid = grid or from_limit(process)
    visits = _restarted(process, grid, parse_restart(restart), noise_scale, rho)
    yield from _moves(denoise, x, process, visits, noise, second_order=True)


class _Visits(NamedTuple):
    """The levels that a chain comes to, in order, `[V]`: where, how far fresh noise raises it there, how much noise that is."""

    s: np.ndarray
    positions: np.ndarray
    raised: np.ndarray
    raised_positions: np.ndarray
    fresh: np.ndarray


@torch.no_grad()
def _moves(
    denoise: Denoiser, x: Tensor, process: Process, visits: _Visits, noise: Noise, second_order: bool
) -> Iterator[Step]:
    s, raised, fresh = np.append(visits.s, 0.0).tolist(), visits.raised.tolist(), visits.fresh.tolist()
    scale = (1 / np.sqrt(1 + np.append(visits.s, 0.0) ** 2)).tolist()
    at_node = at_raised = _levels(denoise, process, x, visits.s, visits.positions)
    if (visits.raised != visits.s).any():  # else the same tensors, so that a compiled step is one graph
        at_raised = _levels(denoise, process, x, visits.raised, visits.raised_positions)
    x = x / scale[0]
    for n, position in enumerate(visits.positions.tolist()):
        if fresh[n] > 0:
            x = x + fresh[n] * noise(x, n)
        here, there = raised[n], s[n + 1]
        x0 = at_raised(x, n)
        slope = (x - x0) / here
        x_next = x + (there - here) * slope
        if second_order and there > 0:
            slope_next = (x_next - at_node(x_next, n + 1)) / there
            x_next = x + (there - here) * 0.5 * (slope + slope_next)
        step = Step(position, x_next * scale[n + 1], x0)
        yield step
        x = step.x / scale[n + 1]


def _churned(process: Process, grid: Grid, churn: float, low: float, high: float, noise_scale: float) -> _Visits:
    """Levels after churn: raised by a factor of at most sqrt(2), never above the first (arXiv 2206.00364, algorithm 2, line 5)."""
    if not 0 <= churn < math.inf:
        raise ValueError(f"churn={churn} must be a finite number, not negative; 0 adds no noise")
    if not (math.isfinite(noise_scale) and low <= high):
        raise ValueError(f"noise_scale={noise_scale} must be finite, and churn_min={low} at most churn_max={high}")
    s = np.exp(-grid.lam)
    factor = min(churn / len(s), math.sqrt(2) - 1)
    raised = np.minimum(np.where((s >= low) & (s <= high), s * (1 + factor), s), s[0])
    places = np.where(raised > s, position_of(process, -2 * np.log(raised)), grid.positions)
    return _Visits(s, grid.positions, raised, places, np.sqrt(np.maximum(raised**2 - s**2, 0)) * noise_scale)


def parse_restart(text: str | Sequence[Restart]) -> list[Restart]:
    """(nodes, times, low, high) of each restart, from "n,K,low,high;..."; ValueError where that is not what it says."""
    entries = [entry.split(",") for entry in text.split(";") if entry.strip()] if isinstance(text, str) else text
    try:
        parsed = [(int(n), int(times), float(low), float(high)) for n, times, low, high in entries]
    except ValueError:
        raise ValueError(f"restart={text!r} is not understood; write n,K,low,high;... as in '3,2,0.3,2'") from None
    for n, times, low, high in parsed:
        if not (n >= 2 and times >= 1 and 0 < low < high < math.inf):
            raise ValueError(
                f"restart {n},{times},{low:g},{high:g}: needs 2 nodes or more, 1 time or more, and low < high"
            )
    return parsed


# A restart may miss the ends of the grid by this part: published levels have three digits.
_NEAR = 0.05


def _restarted(process: Process, grid: Grid, restarts: Sequence[Restart], noise_scale: float, rho: float) -> _Visits:
    if not restarts or not math.isfinite(noise_scale):
        raise ValueError(
            f"restart={restarts} and noise_scale={noise_scale}: give one n,K,low,high at least, as in '3,2,0.3,2', and a finite number"
        )
    main = np.exp(-grid.lam)
    after: dict[int, list[Restart]] = {}
    for n, times, low, high in restarts:
        k = int(np.abs(main - low).argmin())
        if low < main[-1] * (1 - _NEAR) or high > main[0] * (1 + _NEAR) or high <= main[k]:
            raise ValueError(
                f"restart {n},{times},{low:g},{high:g} must lie within the grid, whose levels go from {main[0]:.5g} to {main[-1]:.3g}, "
                "with a node between"
            )
        after.setdefault(k, []).append((n, times, low, high))
    # (level, level it is raised to, fresh noise)
    visits: list[tuple[float, float, float]] = []
    for k, level in enumerate(main.tolist()):
        visits.append((level, level, 0.0))
        for n, times, _, high in after.get(k, ()):
            down = np.linspace(high ** (1 / rho), level ** (1 / rho), n)[1:] ** rho
            for _ in range(times):
                visits[-1] = (visits[-1][0], high, noise_scale * math.sqrt(high**2 - level**2))
                visits += [(between, between, 0.0) for between in down.tolist()]
    s, raised, fresh = np.array(visits).T
    return _Visits(s, position_of(process, -2 * np.log(s)), raised, position_of(process, -2 * np.log(raised)), fresh)


@torch.no_grad()
def _singly(
    denoise: Denoiser, x: Tensor, process: Process, grid: Grid, move: Callable[[Tensor, Tensor, int], Tensor]
) -> Iterator[Step]:
    """The chain whose n-th move takes (x0, x / alpha, n) to x / alpha at the next node; it ends in x0 at the last."""
    at_node, alpha = _levels(denoise, process, x, np.exp(-grid.lam), grid.positions), grid.alpha.tolist()
    x = x / alpha[0]
    for n, position in enumerate(grid.positions.tolist()):
        x0 = at_node(x, n)
        if n == len(grid) - 1:
            yield Step(position, final(x0, x), x0)
            return
        step = Step(position, move(x0, x, n) * alpha[n + 1], x0)
        yield step
        x = step.x / alpha[n + 1]


def dpm2(denoise: Denoiser, x: Tensor, process: Process, grid: Grid | None = None) -> Iterator[Step]:
    """The midpoint method, with the midpoint in log(sigma / alpha): two evaluations per move (Karras et al. 2022, section 3)."""
    grid = grid or from_limit(process)
    s = np.exp(-grid.lam)
    middle = np.sqrt(s[:-1] * s[1:])
    at_middle = _levels(denoise, process, x, middle)

    def move(x0: Tensor, x: Tensor, n: int) -> Tensor:
        between = x + float((middle[n] - s[n]) / s[n]) * (x - x0)
        slope = (between - at_middle(between, n)) / float(middle[n])
        return x + float(s[n + 1] - s[n]) * slope

    yield from _singly(denoise, x, process, grid, move)


def dpm_solver_s(
    denoise: Denoiser, x: Tensor, process: Process, grid: Grid | None = None, *, order: int = 2
) -> Iterator[Step]:
    """DPM-Solver++ 2S and 3S (Lu et al. 2022, arXiv 2211.01095): `order` evaluations per move, at even distances in log-SNR."""
    if order not in (2, 3):
        raise ValueError(f"order={order} must be 2 or 3")
    grid = grid or from_limit(process)
    h = np.diff(grid.lam)
    inner = [_levels(denoise, process, x, np.exp(-(grid.lam[:-1] + h * k / order))) for k in range(1, order)]

    def move(x0: Tensor, x: Tensor, n: int) -> Tensor:
        width, ahead = float(h[n]), x0
        for k, predict in enumerate(inner, 1):
            ahead = x0 + _slope(k, order, width) * (predict(_toward(ahead, x, width * k / order), n) - x0)
        return _toward(ahead, x, width)

    yield from _singly(denoise, x, process, grid, move)


def _toward(x0: Tensor, x: Tensor, h: float) -> Tensor:
    """x / alpha after a move of h in lam with x0 held."""
    return math.exp(-h) * x - math.expm1(-h) * x0


def _slope(k: int, order: int, h: float) -> float:
    """How far x0 is extrapolated from its k-th inner value for the next place of a move of `order` parts."""
    if order == 2:
        return 1.0
    width = h * (k + 1) / 3  # of the move from the node to the next inner place, or to the end
    line = (math.expm1(-width) / width + 1) / -math.expm1(-width)  # weight of a line that rises by 1 over it
    return line * (k + 1) / k


def dpm_sde(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    eta: float = 1.0,
    noise: Noise = fresh_noise,
) -> Iterator[Step]:
    """The midpoint method for the reverse diffusion ("DPM++ SDE"): two evaluations per move, with fresh noise at both.

    The two draws of a move overlap in time: they are increments of one Brownian motion in sigma / alpha. Taken as independent the
    method would be of first order.
    """
    check_eta(eta)
    grid = grid or from_limit(process)
    s = np.exp(-grid.lam)
    middle = np.sqrt(s[:-1] * s[1:])
    at_middle = _levels(denoise, process, x, middle)
    half_up, half_down = ancestral_levels(s[:-1], middle, eta)
    up, down = ancestral_levels(s[:-1], s[1:], eta)
    early, late = np.sqrt((s[:-1] - middle) / -np.diff(s)), np.sqrt((middle - s[1:]) / -np.diff(s))

    def move(x0: Tensor, x: Tensor, n: int) -> Tensor:
        between = torch.lerp(x0.to(x.dtype), x, float(half_down[n] / s[n]))
        first = noise(x, n) if eta > 0 else None
        if first is not None:
            between = between + float(half_up[n]) * first
        moved = torch.lerp(at_middle(between, n).to(x.dtype), x, float(down[n] / s[n]))
        if first is not None:
            moved = moved + float(up[n]) * (float(early[n]) * first + float(late[n]) * noise(x, n, draw=1))
        return moved

    yield from _singly(denoise, x, process, grid, move)
