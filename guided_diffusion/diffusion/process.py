"""The noising process: its tables over steps, its respacing, and every formula that reads a table.

Notation of Ho et al. 2020 (arXiv 2006.11239): x_i = sqrt(alpha_bar_i) x0 + sqrt(1 - alpha_bar_i) eps, steps i = 0 .. T-1, i = 0 nearly
clean. A position between two steps is a float i. Tables that depend on the noise level alone are then interpolated in log-SNR
= log(alpha_bar / (1 - alpha_bar)), others linearly; at whole numbers the result is exactly the table's. The network's time
between steps is that of the process before respacing at this log-SNR.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Tables(Protocol):
    """Anything that gives the value of a named table at step positions, shaped to multiply `like`."""

    def at(self, name: str, i: Tensor, like: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Process:
    """Tables over steps i = 0..T-1, computed from the float64 `betas`; tensors are float32 (or as `.to` made them)."""

    betas: np.ndarray
    time: Tensor  # the network's time input at step i, respaced and rescaled
    time_span: float  # length of the axis of `time`: number of steps before any respacing, or 1000 once rescaled
    beta: Tensor
    log_beta: Tensor
    log_snr: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    alpha_bar_next: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    log_one_minus_alpha_bar: Tensor
    sqrt_recip_alpha_bar: Tensor
    sqrt_recipm1_alpha_bar: Tensor
    score_to_x0: Tensor  # how far the clean prediction moves with the score
    posterior_variance: Tensor
    posterior_log_variance: Tensor  # step 0 has variance zero; its logarithm is that of step 1 instead
    posterior_mean_x0: Tensor
    posterior_mean_x: Tensor
    fixed_large_variance: Tensor
    fixed_large_log_variance: Tensor
    whole: Process | None = None  # the process before respacing, for the times between the steps kept; None: this one

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def device(self) -> torch.device:
        return self.time.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Process:
        """The same process with its tensors on `device` as `dtype`, computed anew from the float64 betas."""
        device, dtype = torch.device(device or self.device), dtype or self.beta.dtype
        if device == self.device and dtype == self.beta.dtype:
            return self
        moved = _process(self.betas, self.time, self.time_span, device, dtype)
        return replace(moved, whole=self.whole and self.whole.to(device, dtype))

    def at(self, name: str, i: Tensor, like: Tensor) -> Tensor:
        """Table `name` at positions `i` (integers or floats, `[B]` or a scalar), with trailing axes added to match `like` `[B, ...]`."""
        table = getattr(self, name)
        value = self._interpolated(name, table, i) if i.is_floating_point() else _looked_up(table, i)
        if i.ndim > 1:
            return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))
        return value.view(-1, *(1,) * (like.ndim - 1))

    def time_at(self, i: Tensor) -> Tensor:
        """The network's time input at positions `i`, `[B]`."""
        if not i.is_floating_point():
            return _looked_up(self.time, i)
        if self.whole is None:
            return self._interpolated("time", self.time, i)
        # Log-SNR falls with the step: find the two steps of the whole process around it, and interpolate their times.
        log_snr, time = self.whole.log_snr, self.whole.time
        target = self._interpolated("log_snr", self.log_snr, i)
        above = torch.searchsorted(-log_snr, -target).clamp(1, len(time) - 1)
        fraction = (log_snr[above - 1] - target) / (log_snr[above - 1] - log_snr[above])
        between = torch.lerp(time[above - 1], time[above], fraction.clamp(0, 1))
        return torch.where(i == i.round(), self._interpolated("time", self.time, i), between)

    def _interpolated(self, name: str, table: Tensor, i: Tensor) -> Tensor:
        i = i.clamp(0, len(self) - 1)
        lower = i.floor()
        fraction = (i - lower).to(table.dtype)
        below, above = lower.long(), i.ceil().long()
        if name not in _FROM_LOG_SNR:
            return torch.lerp(table[below], table[above], fraction)
        log_snr = torch.lerp(self.log_snr[below], self.log_snr[above], fraction)
        return torch.where(fraction == 0, table[below], _FROM_LOG_SNR[name](log_snr))


def _looked_up(table: Tensor, i: Tensor) -> Tensor:
    return table.index_select(0, i) if i.ndim == 1 else table[i]  # index_select has a third of the overhead


# The tables that depend on the noise level alone, as functions of log-SNR.
_FROM_LOG_SNR: dict[str, Callable[[Tensor], Tensor]] = {
    "alpha_bar": torch.sigmoid,
    "sqrt_alpha_bar": lambda log_snr: log_snr.sigmoid().sqrt(),
    "sqrt_one_minus_alpha_bar": lambda log_snr: (-log_snr).sigmoid().sqrt(),
    "log_one_minus_alpha_bar": lambda log_snr: torch.nn.functional.logsigmoid(-log_snr),
    "sqrt_recip_alpha_bar": lambda log_snr: log_snr.sigmoid().rsqrt(),
    "sqrt_recipm1_alpha_bar": lambda log_snr: (-log_snr / 2).exp(),
    "score_to_x0": lambda log_snr: (-log_snr).sigmoid() * log_snr.sigmoid().rsqrt(),
}


def tables_of(betas: np.ndarray) -> dict[str, np.ndarray]:
    """Every table over steps in float64, by name; equation numbers are those of arXiv 2006.11239."""
    alpha_bar = np.cumprod(1.0 - betas)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    posterior_variance = betas * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)  # eq. 7
    instead_of_0 = posterior_variance[1] if len(betas) > 1 else betas[0]  # at step 0, where the logarithm is -inf
    fixed_large = np.append(instead_of_0, betas[1:])
    return {
        "beta": betas,
        "log_beta": np.log(betas),
        "log_snr": np.log(alpha_bar) - np.log1p(-alpha_bar),
        "alpha_bar": alpha_bar,
        "alpha_bar_prev": alpha_bar_prev,
        "alpha_bar_next": np.append(alpha_bar[1:], 0.0),
        "sqrt_alpha_bar": np.sqrt(alpha_bar),
        "sqrt_one_minus_alpha_bar": np.sqrt(1.0 - alpha_bar),
        "log_one_minus_alpha_bar": np.log(1.0 - alpha_bar),
        "sqrt_recip_alpha_bar": np.sqrt(1.0 / alpha_bar),
        "sqrt_recipm1_alpha_bar": np.sqrt(1.0 / alpha_bar - 1.0),
        "score_to_x0": (1.0 - alpha_bar) / np.sqrt(alpha_bar),
        "posterior_variance": posterior_variance,
        "posterior_log_variance": np.log(np.append(instead_of_0, posterior_variance[1:])),
        "posterior_mean_x0": betas * np.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),  # eq. 7
        "posterior_mean_x": (1.0 - alpha_bar_prev) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar),
        "fixed_large_variance": fixed_large,
        "fixed_large_log_variance": np.log(fixed_large),
    }


def check_betas(betas: Any) -> np.ndarray:
    """Betas as float64 `[T]`, from an array, list or tensor; ValueError unless each lies strictly between 0 and 1."""
    array = np.array(betas.detach().cpu().numpy() if isinstance(betas, Tensor) else betas, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"betas must be one row of numbers, one per step; got shape {array.shape}")
    wrong = np.flatnonzero(~((array > 0) & (array < 1)))
    if wrong.size:
        raise ValueError(
            f"every beta must lie strictly between 0 and 1; step {wrong[0]} of {len(array)} has {array[wrong[0]]}"
        )
    return array


def _process(betas: np.ndarray, time: Tensor, span: float, device: torch.device, dtype: torch.dtype) -> Process:
    betas.setflags(write=False)
    tensors: dict[str, Any] = {
        name: torch.tensor(table, dtype=dtype, device=device) for name, table in tables_of(betas).items()
    }
    return Process(betas=betas, time=time.to(device, dtype), time_span=span, **tensors)


def make_process(betas: Any, time: Any = None) -> Process:
    """A process on the CPU from its betas; `time` `[T]` is the network's input at each step (default: the number of the step)."""
    betas = check_betas(betas)
    times = torch.arange(len(betas)) if time is None else torch.as_tensor(time)
    if times.shape != (len(betas),):
        raise ValueError(
            f"time must hold one number for each of the {len(betas)} betas; got shape {tuple(times.shape)}"
        )
    return _process(betas, times.to(torch.float32), float(len(betas)), torch.device("cpu"), torch.float32)


def rescale_time(process: Process, span: float = 1000.0) -> Process:
    """The same process, with times on an axis of length `span`, however many steps there were before respacing."""
    whole = process.whole and rescale_time(process.whole, span)
    return replace(process, time=rescaled(process.time, process.time_span, span), time_span=float(span), whole=whole)


def rescaled(time: Tensor, num_steps: float, span: float = 1000.0) -> Tensor:
    """Times counted in `num_steps`, on an axis of length `span`."""
    return time * (span / num_steps)


def respace(process: Process, keep: Iterable[int]) -> Process:
    """The process over only the steps `keep`, with new betas between them (arXiv 2102.09672, eq. 19); itself if all."""
    steps = sorted({int(step) for step in keep})
    if not steps or steps[0] < 0 or steps[-1] >= len(process):
        raise ValueError(
            f"steps to keep must lie in 0..{len(process) - 1} and be at least one; got {steps[:3]}..{steps[-1:]}"
        )
    if len(steps) == len(process):
        return process
    time = process.time[torch.tensor(steps, device=process.device)]
    betas = respaced_betas(process.betas, steps)
    kept = _process(betas, time, process.time_span, process.device, process.beta.dtype)
    return replace(kept, whole=process.whole or process)


def respaced_betas(betas: np.ndarray, keep: Iterable[int]) -> np.ndarray:
    """Betas of the process over only the steps `keep` (rising): 1 - alpha_bar / (alpha_bar of the kept step before)."""
    alpha_bar = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[list(keep)]
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def position_of(process: Process, log_snr: np.ndarray) -> np.ndarray:
    """The (fractional) step positions with these values of log alpha_bar / (1 - alpha_bar); outside the process, its ends."""
    table = tables_of(process.betas)["log_snr"]
    return np.interp(-log_snr, -table, np.arange(len(table), dtype=np.float64))


class Nodes(Protocol):
    """The nodes of a `grids.Grid`: falling positions and log(alpha / sigma) there."""

    @property
    def positions(self) -> np.ndarray: ...
    @property
    def lam(self) -> np.ndarray: ...


def at_nodes(process: Process, grid: Nodes) -> Process:
    """The process whose own steps 0..N-1 are the nodes of a grid of `process`: `respace`, also between steps."""
    positions, lam = grid.positions[::-1], grid.lam[::-1]
    steps = positions.round().astype(int)
    # Levels of another process may lie beyond the ends of this one, at positions that are whole and yet not theirs.
    if (positions == steps).all() and np.allclose(lam, tables_of(process.betas)["log_snr"][steps] / 2):
        return respace(process, steps.tolist())
    exact = process.to("cpu", torch.float64)
    time = exact.time_at(torch.from_numpy(positions.copy()))
    alpha_bar = 1 / (1 + np.exp(-2 * lam))
    betas = 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    made = _process(betas, time, process.time_span, process.device, process.beta.dtype)
    return replace(made, whole=process.whole or process)


def space_timesteps(num_steps: int, sections: str | int | Iterable[int]) -> list[int]:
    """Which of `num_steps` steps to keep, rising.

    "250" or 250: that many, evenly from first to last. "90,60,60,20,20" or a list: cut the steps into equal sections (the first is the
    least noisy) and take so many from each. "ddim25": every k-th step from 0, with the whole number k that gives 25. "": all.
    """
    parts: Iterable[Any] = sections if isinstance(sections, Iterable) else [operator.index(sections)]
    strided = False
    if isinstance(sections, str):
        text = sections.strip()
        if not text:
            return list(range(num_steps))
        strided = text.startswith("ddim")
        parts = [text.removeprefix("ddim")] if strided else text.split(",")
    try:
        counts = [int(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"timestep_respacing {sections!r} is not understood; write a number of steps as in '250', numbers for equal sections as in "
            "'90,60,60,20,20', 'ddim25' for an even stride, or '' for all steps"
        ) from None
    if not 1 <= sum(counts) <= num_steps:
        raise ValueError(
            f"timestep_respacing {sections!r} asks for {sum(counts)} of {num_steps} steps; give at least 1 and at most {num_steps}, "
            "as in '250', '90,60,60,20,20' or 'ddim25', or '' for all"
        )
    if min(counts) < 0:
        raise ValueError(f"timestep_respacing {sections!r} has a negative count; a section gives 0 steps or more")
    if strided:
        return _strided(num_steps, counts[0], sections)

    steps: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        size = num_steps // len(counts) + (index < num_steps % len(counts))
        if size < count:
            raise ValueError(
                f"timestep_respacing {sections!r} asks for {count} steps from section {index + 1} of {len(counts)}, "
                f"which has {size} of the {num_steps} steps; ask for at most {size} there"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride  # summed, not multiplied: halves must round as they did for the released results
        start += size
    return steps


def _strided(num_steps: int, count: int, sections: Any) -> list[int]:
    # Strides fall, so that the smallest stride of a count is the one that stays in the dict.
    stride_for = {len(range(0, num_steps, stride)): stride for stride in range(max(1, num_steps - 1), 0, -1)}
    if count not in stride_for:
        near = sorted(sorted(stride_for, key=lambda n: abs(n - count))[:2])
        raise ValueError(
            f"timestep_respacing {sections!r}: no whole stride takes exactly {count} of {num_steps} steps; use "
            f"{' or '.join(f'ddim{n}' for n in near)}, or '{count}' for uneven strides"
        )
    return list(range(0, num_steps, stride_for[count]))


class Gaussian(NamedTuple):
    """A diagonal normal distribution; all three broadcast to the shape of x."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def marginal(tables: Tables, x0: Tensor, i: Tensor) -> Gaussian:
    """q(x_i | x0), eq. 4."""
    variance = tables.at("sqrt_one_minus_alpha_bar", i, x0) ** 2  # more exact in float32 than 1 - alpha_bar
    return Gaussian(tables.at("sqrt_alpha_bar", i, x0) * x0, variance, tables.at("log_one_minus_alpha_bar", i, x0))


def add_noise(tables: Tables, x0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
    """x_i from clean data and standard normal `noise` of the same shape, eq. 4."""
    if noise.shape != x0.shape:
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} for data of shape {tuple(x0.shape)}; they must be the same"
        )
    return tables.at("sqrt_alpha_bar", i, x0) * x0 + tables.at("sqrt_one_minus_alpha_bar", i, x0) * noise


def posterior_mean(tables: Tables, x0: Tensor, x: Tensor, i: Tensor) -> Tensor:
    """Mean of q(x_{i-1} | x_i, x0), eq. 7."""
    return tables.at("posterior_mean_x0", i, x) * x0 + tables.at("posterior_mean_x", i, x) * x


def posterior(tables: Tables, x0: Tensor, x: Tensor, i: Tensor) -> Gaussian:
    """q(x_{i-1} | x_i, x0), eqs. 6-7; at i = 0 the variance is zero and its logarithm that of step 1."""
    log_variance = tables.at("posterior_log_variance", i, x)
    return Gaussian(posterior_mean(tables, x0, x, i), tables.at("posterior_variance", i, x), log_variance)


def x0_from_eps(tables: Tables, x: Tensor, i: Tensor, eps: Tensor) -> Tensor:
    """The clean data implied by noise `eps` in `x`, eq. 4 solved for x0."""
    scaled = tables.at("sqrt_recip_alpha_bar", i, x) * x
    return torch.addcmul(scaled, tables.at("sqrt_recipm1_alpha_bar", i, x), eps, value=-1)


def eps_from_x0(tables: Tables, x: Tensor, i: Tensor, x0: Tensor) -> Tensor:
    """The noise implied by clean data `x0` in `x`, eq. 4 solved for eps."""
    return (tables.at("sqrt_recip_alpha_bar", i, x) * x - x0) / tables.at("sqrt_recipm1_alpha_bar", i, x)


def x0_from_previous_x(tables: Tables, x: Tensor, i: Tensor, previous: Tensor) -> Tensor:
    """The x0 for which `previous` (x_{i-1}) is the posterior mean, eq. 7 solved for x0."""
    return (previous - tables.at("posterior_mean_x", i, x) * x) / tables.at("posterior_mean_x0", i, x)


def v_from_x0(tables: Tables, x0: Tensor, i: Tensor, eps: Tensor) -> Tensor:
    """Velocity sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""
    return tables.at("sqrt_alpha_bar", i, x0) * eps - tables.at("sqrt_one_minus_alpha_bar", i, x0) * x0


def x0_from_v(tables: Tables, x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    """The clean data implied by velocity `v` at `x`."""
    return tables.at("sqrt_alpha_bar", i, x) * x - tables.at("sqrt_one_minus_alpha_bar", i, x) * v
