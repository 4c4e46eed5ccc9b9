"""From noise to data: (denoise, x_T, process) -> iterator of Step.

Every sampler is a generator. It does its arithmetic without gradients, but the caller's grad mode holds wherever the caller's code runs.
A caller may change `step.x` in place: the chain goes on from what it finds there. The coefficients of all steps are Python numbers,
worked out in float64 before the first step, and step positions are made on the device once; no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .denoiser import Denoiser
from .process import Process, tables_of
from .updates import (
    Noise,
    adams_bashforth,
    ancestral_update,
    check_order,
    ddim_sigma,
    ddim_update,
    ddim_weights,
    eps_between,
    fresh_noise,
)

# Where solvers start at the latest, as sigma / alpha: beyond it x holds nothing but noise, and second order over the leap from there to the
# next step is worse than none. Linear schedules end at 157, cosine ones at 20,293. `ancestral` and `ddim` take every step.
SIGMA_MAX = 164.0


class Step(NamedTuple):
    """One finished step: the position it left, x `[B, ...]` after it, and the clean prediction `[B, ...]` it was made from."""

    i: float
    x: Tensor
    x0: Tensor


_NOT_FINITE = "its values are not finite (NaN or infinite)"


class NotFinite(ValueError):
    """A chain's values are not finite. `row` is the place in the batch; where a step is known, the message names it."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def check_finite(x: Tensor) -> None:
    """NotFinite naming the first row of `x` `[B, ...]` that holds NaN or infinity. Waits for the device."""
    finite = _finite_rows(x)
    if not finite.all():
        raise NotFinite(int(finite.long().argmin()), _NOT_FINITE)


def last(steps: Iterable[Step]) -> Tensor:
    """Run a sampler to its end; the final x. NotFinite naming the row and the step where values stop being finite.

    On the CPU at that step. Elsewhere at the end, for to look at each step would be to wait for the device as often.
    """
    x = finite = None
    count: Any = 0
    made: list[float] = []
    for step in steps:
        x = step.x
        rows = _finite_rows(x)
        finite = rows if finite is None else finite & rows
        count = count + finite  # a row's number of steps before the first that was not finite
        made.append(step.i)
        if x.device.type == "cpu" and not finite.all():
            break
    if x is None or finite is None:
        raise ValueError("the sampler made no step")
    if x.device.type != "meta" and not finite.all():
        row = int(finite.long().argmin())
        first = int(count[row])
        raise NotFinite(
            row, f"{_NOT_FINITE} from step {first + 1} of the sampler on (timestep {made[first]:g} of its process)"
        )
    return x


def _finite_rows(x: Tensor) -> Tensor:
    return x.isfinite().reshape(len(x), -1).all(dim=1)


@torch.no_grad()
def ancestral(
    denoise: Denoiser, x: Tensor, process: Process, *, noise: Noise = fresh_noise, start: int | None = None
) -> Iterator[Step]:
    """Draw x_{i-1} ~ p(x_{i-1} | x_i) down to i = 0 (Ho et al. 2020, algorithm 2); the last step is the mean.

    `x` is at step `start`: pure noise at the default T-1, or data noised to an earlier step (SDEdit).
    """
    tables, steps = tables_of(process.betas), _steps(process, start)
    from_x0, from_x = tables["posterior_mean_x0"].tolist(), tables["posterior_mean_x"].tolist()
    for n, (k, i) in enumerate(zip(steps, _positions(steps, process, x))):
        denoised = denoise(x, i)
        x = torch.add(from_x0[k] * denoised.x0, x, alpha=from_x[k])
        if k > 0:
            x = ancestral_update(x, denoised.log_variance, noise(x, n))
        yield Step(k, x, denoised.x0)


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    *,
    eta: float = 0.0,
    noise: Noise = fresh_noise,
    start: int | None = None,
) -> Iterator[Step]:
    """Song et al. 2020 (arXiv 2010.02502), eq. 12. `eta` 0 is deterministic and draws nothing; 1 has the noise of ancestral sampling."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie between 0 (deterministic) and 1 (as noisy as ancestral sampling)")
    tables, steps = tables_of(process.betas), _steps(process, start)
    sigmas = ddim_sigma(tables["alpha_bar"], tables["alpha_bar_prev"], eta)
    weights = ddim_weights(tables["alpha_bar"], tables["alpha_bar_prev"], sigmas)
    from_x0, from_x, sigma = (column.tolist() for column in (*weights, sigmas))
    for n, (k, i) in enumerate(zip(steps, _positions(steps, process, x))):
        x0 = denoise(x, i).x0
        x = torch.add(x0 * from_x0[k], x, alpha=from_x[k])
        if sigma[k] > 0:
            x = x + sigma[k] * noise(x, n)
        yield Step(k, x, x0)


@torch.no_grad()
def ddim_invert(denoise: Denoiser, x: Tensor, process: Process) -> Iterator[Step]:
    """Data back to the noise that deterministic DDIM would turn into it (arXiv 2010.02502, section 4.3).

    `x` is clean and taken to be at step 0, nearly so; the last x is at step T-1, where `ddim` starts.
    """
    alpha_bar, steps = tables_of(process.betas)["alpha_bar"], range(len(process) - 1)
    from_x0, from_x = (column.tolist() for column in ddim_weights(alpha_bar[:-1], alpha_bar[1:]))
    for k, i in zip(steps, _positions(steps, process, x)):
        x0 = denoise(x, i).x0
        x = torch.add(x0 * from_x0[k], x, alpha=from_x[k])
        yield Step(k, x, x0)


@torch.no_grad()
def plms(denoise: Denoiser, x: Tensor, process: Process, *, order: int = 2, start: int | None = None) -> Iterator[Step]:
    """DDIM whose eps is extrapolated from the steps before (Liu et al. 2022, arXiv 2202.09778).

    The first step has no past: it looks one step ahead and averages, which costs one evaluation more. From pure noise (no `start`)
    it starts at SIGMA_MAX at most.
    """
    check_order(order)
    if start is None:
        nodes, log_snr = _grid(process, None)
    else:
        nodes, log_snr = list(_steps(process, start)), tables_of(process.betas)["log_snr"][start::-1]
    alpha_bar = _sigmoid(log_snr).tolist()
    positions, past = _positions(nodes, process, x), []  # type: ignore[var-annotated]
    for n, here in enumerate(alpha_bar):
        x0 = denoise(x, positions[n]).x0
        past = [*past, eps_between(x, x0, here)][-order:]
        if n == len(nodes) - 1:
            x = x0.clone()
        else:
            eps, there = adams_bashforth(past), alpha_bar[n + 1]
            if n == 0 and order > 1:
                ahead = ddim_update(x0, past[-1], there)
                eps = (eps + eps_between(ahead, denoise(ahead, positions[n + 1]).x0, there)) / 2
            x = ddim_update((x - math.sqrt(1 - here) * eps) / math.sqrt(here), eps, there)
        yield Step(nodes[n], x, x0)


@torch.no_grad()
def dpm_solver(denoise: Denoiser, x: Tensor, process: Process, *, num_steps: int | None = None) -> Iterator[Step]:
    """DPM-Solver++(2M), second order and one evaluation per step (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Steps are spaced evenly in log-SNR, between the process's own steps where need be; None uses exactly its own. The last gives x0, and
    the move before it is of first order: it may span a third of all log-SNR, too far to extrapolate over. Starts at SIGMA_MAX at most.
    """
    positions, log_snr = _grid(process, num_steps, lambda table, n: np.linspace(table[-1], table[0], n))
    alpha, sigma = np.sqrt(_sigmoid(log_snr)).tolist(), np.sqrt(_sigmoid(-log_snr)).tolist()
    width = (np.diff(log_snr) / 2).tolist()  # the paper's h: steps of half the log-SNR
    x0_before = None
    for n, i in enumerate(_positions(positions, process, x)):
        x0 = denoise(x, i).x0
        if n == len(positions) - 1:
            x = x0.clone()
        else:
            ahead = x0
            if x0_before is not None and n < len(positions) - 2:
                ahead = x0 + (0.5 * width[n] / width[n - 1]) * (x0 - x0_before)
            x = sigma[n + 1] / sigma[n] * x - alpha[n + 1] * math.expm1(-width[n]) * ahead
        x0_before = x0
        yield Step(positions[n], x, x0)


@torch.no_grad()
def heun(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    *,
    num_steps: int | None = None,
    rho: float = 7.0,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_scale: float = 1.0,
    noise: Noise = fresh_noise,
) -> Iterator[Step]:
    """Heun's method with optional churn, two evaluations per step (Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2).

    Works on x / sqrt(alpha_bar), whose noise level is sigma = sqrt(1/alpha_bar - 1). `num_steps` levels are spaced by `rho` (eq. 5);
    None uses the process's own, from SIGMA_MAX down. Noise is added only at levels in [churn_min, churn_max]. The last step gives x0.
    """

    def spaced(table: np.ndarray, n: int) -> np.ndarray:
        ends = np.exp(-table[[-1, 0]] / 2) ** (1 / rho)
        return -2 * rho * np.log(np.linspace(ends[0], ends[1], n))

    if not (0 < rho < math.inf and math.isfinite(noise_scale) and churn_min <= churn_max):
        raise ValueError(
            f"rho={rho} must be finite and above 0, noise_scale={noise_scale} finite, churn_min={churn_min} at most churn_max={churn_max}"
        )
    positions, log_snr = _grid(process, num_steps, spaced)
    sigma = np.append(np.exp(-log_snr / 2), 0.0)
    raised = _churned(sigma[:-1], churn, churn_min, churn_max)
    scale, scale_raised = (1 / np.sqrt(1 + sigma**2)).tolist(), (1 / np.sqrt(1 + raised**2)).tolist()
    fresh = (np.sqrt(np.maximum(raised**2 - sigma[:-1] ** 2, 0)) * noise_scale).tolist()
    at_raised = at_level = _positions(positions, process, x)  # the same tensors, so that a compiled step is one graph
    if (raised > sigma[:-1]).any():
        churned = np.where(raised > sigma[:-1], position_of(process, -2 * np.log(raised)), positions)
        at_raised = _positions(churned.tolist(), process, x)
    x = x / scale[0]
    for n in range(len(positions)):
        if fresh[n] > 0:
            x = x + fresh[n] * noise(x, n)
        here, there = float(raised[n]), float(sigma[n + 1])
        x0 = denoise(x * scale_raised[n], at_raised[n]).x0
        slope = (x - x0) / here
        x_next = x + (there - here) * slope
        if there > 0:
            slope_next = (x_next - denoise(x_next * scale[n + 1], at_level[n + 1]).x0) / there
            x_next = x + (there - here) * 0.5 * (slope + slope_next)
        step = Step(positions[n], x_next * scale[n + 1], x0)
        yield step
        x = step.x / scale[n + 1]


def _churned(sigma: np.ndarray, churn: float, low: float, high: float) -> np.ndarray:
    """Noise levels after churn: raised by a factor of at most sqrt(2), never above the first (arXiv 2206.00364, algorithm 2, line 5)."""
    if not 0 <= churn < math.inf:
        raise ValueError(f"churn={churn} must be a finite number, not negative; 0 adds no noise")
    factor = min(churn / len(sigma), math.sqrt(2) - 1)
    return np.minimum(np.where((sigma >= low) & (sigma <= high), sigma * (1 + factor), sigma), sigma[0])


def position_of(process: Process, log_snr: np.ndarray) -> np.ndarray:
    """The (fractional) step positions with these values of log alpha_bar / (1 - alpha_bar); outside the process, its ends."""
    table = tables_of(process.betas)["log_snr"]
    return np.interp(-log_snr, -table, np.arange(len(table), dtype=np.float64))


def _grid(
    process: Process, num_steps: int | None, spaced: Callable[[np.ndarray, int], np.ndarray] | None = None
) -> tuple[list[float], np.ndarray]:
    """Positions from T-1, or SIGMA_MAX, down to 0, with their log-SNR: every step, or `num_steps` values from `spaced(table, n)`."""
    table = tables_of(process.betas)["log_snr"]
    lowest = -2 * math.log(SIGMA_MAX)
    if table[-1] < lowest < table[0]:  # the noisiest step below becomes one at the limit, others there are left out
        table = np.append(table[table > lowest], lowest)
    first = position_of(process, table[-1:]).tolist() if table[-1] == lowest else [len(process) - 1]
    if num_steps is None or spaced is None:
        return [*first, *range(len(table) - 2, -1, -1)], table[::-1].copy()
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}: a solver needs at least 2 steps")
    log_snr = spaced(table, num_steps)
    # The ends are those of the table, whatever rounding says.
    return [*first, *position_of(process, log_snr[1:-1]).tolist(), 0], log_snr


def _steps(process: Process, start: int | None) -> range:
    first = len(process) - 1 if start is None else start
    if not 0 <= first < len(process):
        raise ValueError(f"start={start} is not a step of this process; it has steps 0..{len(process) - 1}")
    return range(first, -1, -1)


def _positions(steps: Iterable[float], process: Process, x: Tensor) -> list[Tensor]:
    """Step positions on x's device, one `[B]` view for each: the only copy a sampler makes, before its first step."""
    values = list(steps)
    whole = all(isinstance(value, int) for value in values)
    rows = torch.tensor(values, dtype=torch.long if whole else process.time.dtype, device=x.device)
    return list(rows[:, None].expand(-1, x.shape[0]).unbind())


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


class Sampler(NamedTuple):
    """A sampler that can be chosen by name, and the options that it takes of those a user can give."""

    run: Callable[..., Iterator[Step]]
    options: tuple[str, ...] = ()


SAMPLERS = {
    "ancestral": Sampler(ancestral, ("noise",)),
    "ddim": Sampler(ddim, ("eta", "noise")),
    "heun": Sampler(heun, ("noise",)),
    "dpm_solver": Sampler(dpm_solver),
}
