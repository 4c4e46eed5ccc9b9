"""Grids: at which noise levels a chain stops. GRIDS names them.

Positions count the steps of the process that the grid was made from. They fall, and may lie between two steps, where
lam = log(alpha / sigma) is linear in the position. N nodes are N - 1 moves; the result is x0 at the last node. Levels in options are
sigma / alpha = exp(-lam).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .process import Process, at_nodes, position_of, space_timesteps, tables_of

# Where chains start at the latest, as sigma / alpha: beyond it x holds nothing but noise, and second order over the leap from there to the
# next step is worse than none. Linear schedules end at 157, cosine ones at 20,293.
SIGMA_MAX = 164.0


@dataclass(frozen=True, eq=False)
class Grid:
    """The nodes of a chain, from noise to data; both float64 `[N]`."""

    positions: np.ndarray  # falling
    lam: np.ndarray  # log(alpha / sigma), rising

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def alpha(self) -> np.ndarray:
        return 1 / np.sqrt(1 + np.exp(-2 * self.lam))

    @property
    def sigma(self) -> np.ndarray:
        return 1 / np.sqrt(1 + np.exp(2 * self.lam))


def own(process: Process, *, sigma_max: float | None = None) -> Grid:
    """Every step of the process. Those above `sigma_max` are left out, and one node at `sigma_max` stands for them."""
    lam = _lam(process)
    steps = np.arange(len(lam), dtype=np.float64)
    limit = -math.log(sigma_max) if sigma_max else -math.inf
    if lam[-1] < limit - _ROUNDING and limit < lam[0]:
        kept = lam > limit + _ROUNDING
        lam, steps = np.append(lam[kept], limit), np.append(steps[kept], position_of(process, np.array(2 * limit)))
    return Grid(steps[::-1].copy(), lam[::-1].copy())


def from_limit(process: Process) -> Grid:
    """Every step of the process up to SIGMA_MAX: where samplers other than `ancestral` and `ddim` start unless given a grid."""
    return own(process, sigma_max=SIGMA_MAX)


def from_step(process: Process, start: int | None) -> Grid:
    """Every step of the process from `start` on, the last by default."""
    first = len(process) - 1 if start is None else start
    if not 0 <= first < len(process):
        raise ValueError(f"start={start} is not a step of this process; it has steps 0..{len(process) - 1}")
    whole = own(process)
    return Grid(whole.positions[-first - 1 :], whole.lam[-first - 1 :])


def alpha_bar_of(process: Process, grid: Grid) -> np.ndarray:
    """alpha_bar of the nodes, at whole steps exactly that of the process."""
    table, whole = tables_of(process.betas)["alpha_bar"], grid.positions == grid.positions.round()
    return np.where(whole, table[grid.positions.astype(int)], grid.alpha**2)


def respaced(process: Process, steps: int, *, sigma_max: float | None = SIGMA_MAX, sigma_min: float = 0.0) -> Grid:
    """Whole steps, evenly from the first to the last, as --timestep_respacing "25" chooses them."""
    return _whole(process, str(check_steps(steps)), sigma_max, sigma_min)


def strided(process: Process, steps: int, *, sigma_max: float | None = SIGMA_MAX, sigma_min: float = 0.0) -> Grid:
    """Whole steps, every k-th from the least noisy on, as --timestep_respacing "ddim25" chooses them."""
    return _whole(process, f"ddim{check_steps(steps)}", sigma_max, sigma_min)


def sections(
    process: Process,
    steps: int | None = None,
    *,
    sections: str = "",
    sigma_max: float | None = SIGMA_MAX,
    sigma_min: float = 0.0,
) -> Grid:
    """Whole steps, so many from each of as many equal parts of the process; the first part is the least noisy."""
    grid = _whole(process, sections, sigma_max, sigma_min)
    check_steps(len(grid))
    return _counted(grid, steps, f"sections={sections!r}")


def log_snr(process: Process, steps: int, *, sigma_max: float | None = SIGMA_MAX, sigma_min: float = 0.0) -> Grid:
    """Even in lam (Lu et al. 2022, arXiv 2206.00927)."""
    first, last = _ends(process, sigma_max, sigma_min)
    return _at(process, np.linspace(first, last, check_steps(steps)))


def karras(
    process: Process, steps: int, *, sigma_max: float | None = SIGMA_MAX, sigma_min: float = 0.0, rho: float = 7.0
) -> Grid:
    """Even in (sigma / alpha) ** (1 / rho) (Karras et al. 2022, arXiv 2206.00364, eq. 5)."""
    check_rho(rho)
    ends = np.array(_ends(process, sigma_max, sigma_min))
    first, last = np.exp(-ends / rho)
    lam = -rho * np.log(np.linspace(first, last, check_steps(steps)))
    lam[[0, -1]] = ends  # whatever rounding says
    return _at(process, lam)


def quadratic(process: Process, steps: int, *, sigma_max: float | None = SIGMA_MAX, sigma_min: float = 0.0) -> Grid:
    """Even in the square root of the position, not rounded to steps."""
    first, last = position_of(process, 2 * np.array(_ends(process, sigma_max, sigma_min)))
    positions = np.linspace(math.sqrt(first), math.sqrt(last), check_steps(steps)) ** 2
    positions[[0, -1]] = first, last
    return _between(process, positions)


def nodes(process: Process, steps: int | None = None, *, nodes: str | Sequence[float] = "") -> Grid:
    """An explicit list: steps, as in "999,850.5,736,0", or levels sigma / alpha, as in "sigma:14.6,6.4,0.3,0".

    A sigma of 0 at the end is left out: the result is x0 at the last node in any case.
    """
    text = nodes if isinstance(nodes, str) else ",".join(f"{value!r}" for value in nodes)
    in_sigma = text.strip().startswith("sigma:")
    try:
        values = np.array([float(part) for part in text.strip().removeprefix("sigma:").split(",")])
    except ValueError:
        raise ValueError(
            f"nodes={nodes!r} is not understood; write steps as in '999,850,736,0', or levels as in 'sigma:14.6,6.4,0.3,0'"
        ) from None
    if in_sigma and values[-1] == 0:
        values = values[:-1]
    if len(values) < 2 or not (np.diff(values) < 0).all():
        raise ValueError(f"nodes={nodes!r} must be at least 2 numbers that fall, from noise to data")
    least, most = np.exp(-_lam(process)[[0, -1]]) if in_sigma else (0, len(process) - 1)
    # Published levels are rounded: the ends of a process may be missed by as much.
    slack = 1e-3 if in_sigma else 0.0
    if values[-1] < least * (1 - slack) or values[0] > most * (1 + slack):
        raise ValueError(f"nodes={nodes!r} leaves this process, which goes from {most:.6g} to {least:.6g}")
    if in_sigma:
        return _counted(_at(process, -np.log(values.clip(least, most))), steps, f"nodes={nodes!r}")
    return _counted(_between(process, values), steps, f"nodes={nodes!r}")


class GridKind(NamedTuple):
    """A grid that can be chosen by name: `make(process, steps, **options)`, and the options that it takes."""

    make: Callable[..., Grid]
    options: tuple[str, ...]


_CUT = ("sigma_max", "sigma_min")

GRIDS: dict[str, GridKind] = {
    "respaced": GridKind(respaced, _CUT),
    "strided": GridKind(strided, _CUT),
    "log_snr": GridKind(log_snr, _CUT),
    "karras": GridKind(karras, (*_CUT, "rho")),
    "quadratic": GridKind(quadratic, _CUT),
    "sections": GridKind(sections, (*_CUT, "sections")),
    "nodes": GridKind(nodes, ("nodes",)),
}


def with_levels_of(process: Process, other: Process) -> Process:
    """`other` at the noise levels of `process`: step k of both is one level, and a network trained on `other` is told its own time of it.

    So predictions of networks with different schedules can be combined. Both are taken whole, whatever steps of `other` are kept.
    """
    whole, theirs, levels = process.whole or process, other.whole or other, own(process)
    if np.array_equal(whole.betas, theirs.betas) and torch.equal(whole.time, theirs.time):
        return process
    return at_nodes(theirs, _at(theirs, levels.lam)).to(process.device, process.beta.dtype)


def check_steps(steps: int | None) -> int:
    """`steps`, or ValueError where it is no number of nodes."""
    if steps is None or steps < 2 or steps != int(steps):
        raise ValueError(f"steps={steps}: a chain needs a whole number of nodes, at least 2")
    return int(steps)


def check_rho(rho: float) -> None:
    if not 0 < rho < math.inf:
        raise ValueError(f"rho={rho} must be finite and above 0; 7 is usual")


_ROUNDING = 1e-9  # of lam: levels closer than this are one level


def _lam(process: Process) -> np.ndarray:
    """log(alpha / sigma) of every step, falling."""
    return tables_of(process.betas)["log_snr"] / 2


def _ends(process: Process, sigma_max: float | None, sigma_min: float) -> tuple[float, float]:
    """lam of the first and the last node; ValueError where nothing of the process is left between."""
    lam = _lam(process)
    highest = math.inf if sigma_max is None else sigma_max
    if not (highest > 0 and 0 <= sigma_min < highest):
        raise ValueError(f"sigma_min={sigma_min} must be 0 or more, and below sigma_max={sigma_max}; {_extent(lam)}")
    first = max(lam[-1], -math.log(highest) if highest < math.inf else -math.inf)
    last = min(lam[0], -math.log(sigma_min) if sigma_min > 0 else math.inf)
    if not first < last:
        raise ValueError(f"nothing lies between sigma_min={sigma_min} and sigma_max={sigma_max}: {_extent(lam)}")
    return float(first), float(last)


def _extent(lam: np.ndarray) -> str:
    return f"the levels of this process go from {math.exp(-lam[0]):.4g} to {math.exp(-lam[-1]):.6g}"


def _at(process: Process, lam: np.ndarray) -> Grid:
    return Grid(position_of(process, 2 * lam), lam)


def _between(process: Process, positions: np.ndarray) -> Grid:
    lam = _lam(process)
    return Grid(positions, np.interp(positions, np.arange(len(lam)), lam))


def _whole(process: Process, text: str, sigma_max: float | None, sigma_min: float) -> Grid:
    """Steps chosen by the rules of 2021 among those within the limits."""
    lam = _lam(process)
    first, last = _ends(process, sigma_max, sigma_min)
    inside = np.flatnonzero((lam >= first - _ROUNDING) & (lam <= last + _ROUNDING))
    if len(inside) < 2:
        raise ValueError(
            f"sigma_max={sigma_max}, sigma_min={sigma_min}: fewer than 2 steps lie between; {_extent(lam)}"
        )
    steps = inside[space_timesteps(len(inside), text)][::-1]
    return Grid(steps.astype(np.float64), lam[steps])


def _counted(grid: Grid, steps: int | None, what: str) -> Grid:
    if steps is not None and steps != len(grid):
        raise ValueError(f"steps={steps}, but {what} gives {len(grid)} nodes; leave steps out")
    return grid
