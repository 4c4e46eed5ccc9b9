"""Multistep samplers: one evaluation per node, and a move is one weighted sum of x and the last predictions. The weights are `rules`.

Moves drop to lower order where the past is short and, unless told otherwise, at the end: that into the last node has `final_order`,
the one before one more. On evenly respaced steps the last move spans more than a third of all log-SNR, too far to extrapolate over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from . import grids, rules
from .chain import Step, final, on_device
from .denoiser import Denoiser, at_level
from .grids import Grid, alpha_bar_of, from_limit, from_step
from .process import Process
from .rules import Row
from .updates import Noise, adams_bashforth_weights, ddim_sigma, ddim_weights, fresh_noise

Form = Literal["data", "noise"]


@torch.no_grad()
def _run(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid,
    rows: Sequence[Row],
    *,
    form: Form = "data",
    noise: Noise = fresh_noise,
    ahead: tuple[float, float] | None = None,
) -> Iterator[Step]:
    """The chain of these rows, one per move; it ends in x0 at the last node.

    `form`: the rows weigh x0, or x - alpha x0. `ahead`: weights of the second and the first node's prediction by which x changes
    after the first move, for which the second node is looked at once before.
    """
    places, kept = on_device(grid.positions, process, x), max((len(row.terms) for row in rows), default=0)
    sigma, alpha = np.exp(-grid.lam).tolist(), grid.alpha.tolist()

    def predict(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        x0 = at_level(denoise, sigma[n])(x, places[n]).x0
        return x0, x0.to(x.dtype) if form == "data" else torch.add(x, x0, alpha=-alpha[n])

    past: list[Tensor] = []  # newest first
    for n, position in enumerate(grid.positions.tolist()):
        x0, f = predict(x, n)
        if n == len(rows):
            x = final(x0, x)
        else:
            row, past = rows[n], [f, *past][:kept]
            x = (f * row.terms[0]).add_(x, alpha=row.x)
            for weight, value in zip(row.terms[1:], past[1:]):
                x.add_(value, alpha=weight)
            if row.noise > 0:
                x = x + row.noise * noise(x, n)
            if n == 0 and ahead is not None:
                x = x + (ahead[0] * predict(x, 1)[1] + ahead[1] * f)
        yield Step(position, x, x0)


def ddim(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    eta: float = 0.0,
    noise: Noise = fresh_noise,
    start: int | None = None,
) -> Iterator[Step]:
    """Song et al. 2020 (arXiv 2010.02502), eq. 12. `eta` 0 is deterministic and draws nothing; 1 has the noise of ancestral sampling.

    Takes every step of the process unless a grid is given. `x` is at step `start`: pure noise at the default T-1.
    """
    check_eta(eta)
    grid = grid or from_step(process, start)
    here = alpha_bar_of(process, grid)
    sigma = ddim_sigma(here[:-1], here[1:], eta)
    weights = zip(*(column.tolist() for column in (*ddim_weights(here[:-1], here[1:], sigma), sigma)))
    rows = [Row(from_x, (from_x0,), fresh) for from_x0, from_x, fresh in weights]
    yield from _run(denoise, x, process, grid, rows, noise=noise)


def ddim_invert(denoise: Denoiser, x: Tensor, process: Process, grid: Grid | None = None) -> Iterator[Step]:
    """Data back to the noise that deterministic DDIM would turn into it (arXiv 2010.02502, section 4.3).

    `x` is clean and taken to be at the last node of the grid, nearly so; the last x is at its first, where `ddim` starts.
    """
    grid = grid or grids.own(process)
    alpha_bar = alpha_bar_of(process, grid)[::-1]
    # No evaluation at the first node, where the chain ends with the noise itself.
    upward = Grid(grid.positions[:0:-1], grid.lam[:0:-1])
    weights = zip(*(column.tolist() for column in ddim_weights(alpha_bar[:-1], alpha_bar[1:])))
    yield from _run(denoise, x, process, upward, [Row(from_x, (from_x0,)) for from_x0, from_x in weights])


def ancestral_euler(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    eta: float = 1.0,
    noise: Noise = fresh_noise,
) -> Iterator[Step]:
    """Euler's method to less noise than the next node has, and fresh noise up to it ("Euler a"). `eta` 0 is DDIM."""
    check_eta(eta)
    grid = grid or from_limit(process)
    s, alpha = np.exp(-grid.lam), grid.alpha
    up, down = ancestral_levels(s[:-1], s[1:], eta)
    ratio = down / s[:-1]
    columns = (alpha[1:] / alpha[:-1] * ratio, alpha[1:] * (1 - ratio), alpha[1:] * up)
    rows = [Row(from_x, (from_x0,), fresh) for from_x, from_x0, fresh in zip(*(column.tolist() for column in columns))]
    yield from _run(denoise, x, process, grid, rows, noise=noise)


def ancestral_levels(s: np.ndarray, there: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """(fresh noise, level before it is added) of an ancestral move from level s to `there`, both as sigma / alpha."""
    up = np.minimum(there, eta * there * np.sqrt(1 - (there / s) ** 2))
    return up, np.sqrt(there**2 - up**2)


def dpm_solver(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    num_steps: int | None = None,
    order: int = 2,
    final_order: int = 1,
    exact: bool = False,
    solver: str = "midpoint",
    form: Form = "data",
) -> Iterator[Step]:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, algorithm 2); with `form` "noise" DPM-Solver.

    order      1 to 3. Order 3 is that of public code, whose error falls like that of order 2; with `exact` it is of third order
    solver     order 2 as "midpoint", or as "taylor" with the exact integral of the line
    num_steps  a grid of so many nodes, even in log-SNR
    """
    grid = grid or (grids.log_snr(process, num_steps) if num_steps is not None else from_limit(process))
    check_choice("form", form, get_args(Form))
    moves = rules.data_moves(grid) if form == "data" else rules.noise_moves(grid)
    rows = _dpm_rows(grid, moves, order, final_order, exact, solver)
    yield from _run(denoise, x, process, grid, rows if form == "data" else rules.of_noise(rows, grid), form=form)


def sde_dpm_solver(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    order: int = 2,
    final_order: int = 1,
    exact: bool = False,
    solver: str = "midpoint",
    eta: float = 1.0,
    noise: Noise = fresh_noise,
) -> Iterator[Step]:
    """`dpm_solver` for the reverse diffusion ("DPM++ 2M SDE", "3M SDE"): fresh noise in every move, none with `eta` 0."""
    check_eta(eta)
    grid = grid or from_limit(process)
    rows = _dpm_rows(grid, rules.data_moves(grid, eta), order, final_order, exact, solver)
    yield from _run(denoise, x, process, grid, rows, noise=noise)


def _dpm_rows(
    grid: Grid, moves: Sequence[rules.Move], order: int, final_order: int, exact: bool, solver: str
) -> list[Row]:
    check_order(order, grid, 3, final_order)
    check_choice("solver", solver, ("midpoint", "taylor"))
    if exact and order != 3:
        raise ValueError(f"exact=True means nothing with order={order}: only order 3 has two forms; leave it out")
    rule = partial(rules.dpm_weights, taylor=solver == "taylor", third_exact=exact)
    return rules.merged(moves, _predictor(grid, moves, order, final_order, rule))


def unipc(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    order: int = 2,
    final_order: int = 1,
    variant: str = "bh2",
    form: Form = "data",
) -> Iterator[Step]:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867): each move is corrected by the prediction at its end, which the next move needs anyway.

    order    1 to 3 of the predictor; the corrected chain is of one order more
    variant  "bh1" differs in the predictor of order 2 and the corrector of order 1 only
    """
    grid = grid or from_limit(process)
    check_order(order, grid, 3, final_order)
    check_choice("variant", variant, ("bh1", "bh2"))
    check_choice("form", form, get_args(Form))
    moves, bh1 = rules.data_moves(grid) if form == "data" else rules.noise_moves(grid), variant == "bh1"

    predict = _predictor(grid, moves, order, final_order, partial(rules.unipc_predictor, bh1=bh1))

    def correct(n: int) -> np.ndarray:
        at = rules.points(n, grid.lam, rules.order_of(n, grid, order, final_order) + 1, new=True)
        return moves[n].factor * rules.unipc_corrector(at, moves[n].exponent, bh1)

    rows = rules.merged(moves, predict, correct)
    yield from _run(denoise, x, process, grid, rows if form == "data" else rules.of_noise(rows, grid), form=form)


def sa(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    order: int = 2,
    corrector: int | None = None,
    final_order: int = 1,
    tau: float = 1.0,
    noise: Noise = fresh_noise,
) -> Iterator[Step]:
    """Stochastic Adams (Xue et al. 2023, arXiv 2309.05019): exact integrals of the polynomial through the last predictions.

    order      points of the predictor, 1 to 4
    corrector  points of the corrector, the new one among them; 0 leaves it out; default: as many as `order`
    tau        noise: 0 solves the probability-flow equation, 1 the reverse diffusion
    """
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau={tau} must be a finite number, not negative; 0 adds no noise")
    grid = grid or from_limit(process)
    check_order(order, grid, 4, final_order)
    corrected = order if corrector is None else corrector
    if corrected not in range(6):
        raise ValueError(f"corrector={corrector} must be a whole number of points from 0 to 5")
    moves = rules.data_moves(grid, tau**2)

    def correct(n: int) -> np.ndarray:
        at = rules.points(n, grid.lam, min(corrected, n + 2, len(grid) - 1 - n + final_order), new=True)
        return moves[n].factor * rules.exact(at, moves[n].exponent)

    predict = _predictor(grid, moves, order, final_order, rules.exact)
    rows = rules.merged(moves, predict, correct if corrected else None)
    yield from _run(denoise, x, process, grid, rows, noise=noise)


def deis(
    denoise: Denoiser, x: Tensor, process: Process, grid: Grid | None = None, *, order: int = 2, final_order: int = 1
) -> Iterator[Step]:
    """DEIS (Zhang & Chen 2022, arXiv 2204.13902) with polynomials in log(sigma / alpha); `order` 1 to 3."""
    grid = grid or from_limit(process)
    check_order(order, grid, 3, final_order)
    moves = rules.noise_moves(grid)

    rows = rules.of_noise(rules.merged(moves, _predictor(grid, moves, order, final_order, rules.exact)), grid)
    yield from _run(denoise, x, process, grid, rows, form="noise")


def adams(
    denoise: Denoiser, x: Tensor, process: Process, grid: Grid | None = None, *, order: int = 2, final_order: int = 1
) -> Iterator[Step]:
    """Adams-Bashforth for uneven steps, polynomials in sigma / alpha ("LMS", "rho-AB"; arXiv 2204.13902); `order` 1 to 4."""
    grid = grid or from_limit(process)
    check_order(order, grid, 4, final_order)
    s = np.exp(-grid.lam)

    def mean(n: int) -> np.ndarray:
        return rules.mean_weights(rules.points(n, s, rules.order_of(n, grid, order, final_order)))

    yield from _along_sigma(denoise, x, process, grid, mean)


def ipndm(
    denoise: Denoiser, x: Tensor, process: Process, grid: Grid | None = None, *, order: int = 4, final_order: int = 1
) -> Iterator[Step]:
    """Adams-Bashforth with the weights of even steps, whatever the grid (Zhang & Chen 2022, arXiv 2204.13902); `order` 1 to 4."""
    grid = grid or from_limit(process)
    check_order(order, grid, 4, final_order)

    yield from _along_sigma(denoise, x, process, grid, _even(grid, order, final_order))


def plms(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    grid: Grid | None = None,
    *,
    order: int = 2,
    final_order: int = 1,
    start: int | None = None,
) -> Iterator[Step]:
    """`ipndm` whose first move, which has no past, looks one node ahead and averages (Liu et al. 2022, arXiv 2202.09778).

    That costs one evaluation more. `x` is at step `start`, pure noise by default.
    """
    grid = grid or (from_limit(process) if start is None else from_step(process, start))
    check_order(order, grid, 4, final_order)

    yield from _along_sigma(denoise, x, process, grid, _even(grid, order, final_order), ahead=order > 1)


def _predictor(
    grid: Grid,
    moves: Sequence[rules.Move],
    order: int,
    final_order: int,
    rule: Callable[[np.ndarray, float], np.ndarray],
) -> rules.Weights:
    """The weights of `rule(nodes, exponent)` for every move, of as many nodes as its order allows."""

    def weights(n: int) -> np.ndarray:
        at = rules.points(n, grid.lam, rules.order_of(n, grid, order, final_order))
        return moves[n].factor * rule(at, moves[n].exponent)

    return weights


def _even(grid: Grid, order: int, final_order: int) -> rules.Weights:
    """Means over a move with the weights of even steps."""
    return lambda n: np.array(adams_bashforth_weights(rules.order_of(n, grid, order, final_order)))


def _along_sigma(
    denoise: Denoiser, x: Tensor, process: Process, grid: Grid, mean: rules.Weights, ahead: bool = False
) -> Iterator[Step]:
    """x / alpha moves by the mean of eps over the move times the change of sigma / alpha."""
    s, moves = np.exp(-grid.lam), rules.noise_moves(grid)
    width = grid.alpha[1:] * np.diff(s)
    rows = rules.of_noise(rules.merged(moves, lambda n: width[n] * mean(n)), grid)
    half = (float(width[0] / 2 / grid.sigma[1]), float(-width[0] / 2 / grid.sigma[0])) if ahead and rows else None
    yield from _run(denoise, x, process, grid, rows, form="noise", ahead=half)


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie between 0 (deterministic) and 1 (as noisy as ancestral sampling)")


def check_order(order: int, grid: Grid, highest: int, final_order: int) -> None:
    """ValueError unless there are rules of this order and nodes enough for it."""
    if not hasattr(order, "__index__") or not 1 <= order <= highest:
        raise ValueError(f"order={order!r} must be a whole number from 1 to {highest}")
    if final_order < 1 or final_order != int(final_order):
        raise ValueError(f"final_order={final_order} must be a whole number, at least 1")
    if 1 < len(grid) < order:
        raise ValueError(f"order={order} needs at least {order} nodes; there are {len(grid)}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
