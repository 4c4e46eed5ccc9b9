"""A sampler on the nodes of a grid: what `--sampler`, `--steps`, `--grid` and the options of both ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion import grids, samplers
from ..diffusion.denoiser import ByLevel, Denoised, Denoiser, Spread
from ..diffusion.grids import GRIDS, SIGMA_MAX, Grid
from ..diffusion.process import Process, at_nodes, position_of, respace, space_timesteps
from ..diffusion.samplers import SAMPLERS, Step
from ..diffusion.updates import Noise


@dataclass(frozen=True)
class Chain:
    """A sampler, its options, and where it stops.

    process  the one that denoisers are made for: its own steps are the nodes
    grid     those steps, for the sampler
    nodes    the same as steps of the whole process, falling, possibly fractional
    """

    sampler: str
    options: Mapping[str, Any]
    process: Process
    grid: Grid
    nodes: tuple[float, ...]

    def steps(self, denoise: Denoiser, x: Tensor, noise: Noise) -> Iterator[Step]:
        """The steps from pure noise `x` to the end."""
        kind = SAMPLERS[self.sampler]
        source = {"noise": noise} if kind.noise else {}
        return kind.run(denoise, x, self.process, self.grid, **self.options, **source)

    def inverse(self, denoise: Denoiser, x: Tensor) -> Iterator[Step]:
        """The steps from images `x` back to pure noise, by DDIM."""
        return samplers.ddim_invert(denoise, x, self.process, self.grid)

    def levels(self) -> list[float]:
        """sigma/alpha of each evaluation of the denoiser, in turn."""
        return self._tried()[0]

    @property
    def draws(self) -> bool:
        """Whether it draws fresh noise on its way."""
        return self._tried()[1]

    def _tried(self) -> tuple[list[float], bool]:
        """`levels` and `draws`, of a run that computes nothing."""
        seen: list[float] = []
        drawn: list[int] = []
        zero = torch.zeros(1, 1)

        def fresh(like: Tensor, step: int, draw: int = 0) -> Tensor:
            drawn.append(step)
            return zero

        def at(sigma: float) -> Denoiser:
            seen.append(sigma)
            return lambda x, i: Denoised(x, Spread(zero, zero), 0.0)

        # Nothing is computed, so the tables may as well be on the CPU.
        on_host = Chain(self.sampler, self.options, self.process.to("cpu"), self.grid, self.nodes)
        for _ in on_host.steps(ByLevel(on_host.process, at), zero, fresh):
            pass
        return seen, bool(drawn)

    def describe(self) -> dict[str, Any]:
        """For receipts."""
        return {
            "sampler": self.sampler,
            "options": dict(self.options),
            "steps": len(self.nodes),
            "nodes": list(self.nodes),
        }


def make_chain(
    process: Process,
    sampler: str = "ancestral",
    *,
    steps: int | str | None = None,
    grid: str | Grid | None = None,
    options: Mapping[str, Any] | None = None,
) -> Chain:
    """The chain of a sampler on `process`, which may be respaced: without `steps`, `grid` and `nodes=`, on its own steps.

    steps    how many, placed by `grid` (a name; default: as fits the sampler) among all steps of the process before respacing;
             or which, as --timestep_respacing spells it: "ddim25", "90,60,60,20,20"
    grid     or a grid of the process before respacing
    options  of sampler and grid, by name

    ValueError where an option has an impossible value, or neither has it.
    """
    name, _ = samplers.named(sampler)
    kind, whole, given = SAMPLERS[name], process.whole or process, dict(options or {})
    if isinstance(steps, str):
        process, steps = respace(whole, space_timesteps(len(whole), steps)), None
    if steps is not None:
        grids.check_steps(steps)
    if isinstance(grid, Grid) and steps not in (None, len(grid)):
        raise ValueError(f"steps={steps}, and the grid has {len(grid)} nodes; leave steps out")
    chosen = grid if isinstance(grid, str) else "nodes" if given.get("nodes") else kind.grid if steps else ""
    if chosen and chosen not in GRIDS:
        raise ValueError(f"grid is {chosen!r}; it must be one of {', '.join(GRIDS)}")
    of_grid = {option: given.pop(option) for option in (GRIDS[chosen].options if chosen else ()) if option in given}
    for option in given:
        if option not in kind.options and (having := [each for each in GRIDS if option in GRIDS[each].options]):
            where = f"the grid here is {chosen}" if chosen else "here are the steps of the process itself; give --steps"
            raise ValueError(f"--{option} is of --grid {', '.join(having)}, and {where}")
    own = samplers.options_of(sampler, given)
    if isinstance(grid, Grid) or chosen:
        if not isinstance(grid, Grid):
            cut = {} if not kind.full or "sigma_max" not in GRIDS[chosen].options else {"sigma_max": None}
            grid = GRIDS[chosen].make(whole, steps, **{**cut, **of_grid})
        nodes = at_nodes(whole, grid)
        return Chain(name, own, nodes, grids.own(nodes), tuple(grid.positions.tolist()))
    grid = grids.own(process, sigma_max=None if kind.full else SIGMA_MAX)
    in_whole = position_of(whole, 2 * grid.lam)
    near = in_whole.round()
    return Chain(name, own, process, grid, tuple(np.where(abs(in_whole - near) < 1e-6, near, in_whole).tolist()))
