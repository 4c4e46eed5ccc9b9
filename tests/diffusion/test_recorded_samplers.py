"""Every sampler against the figures of independent implementations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from golden_mixtures import CASES, Mixture, arrays, grid_of, method_of, process_of, x_T
from torch import Tensor

from guided_diffusion.diffusion import rules, samplers
from guided_diffusion.diffusion.denoiser import Denoiser
from guided_diffusion.diffusion.grids import Grid

BUILT = [name for name in CASES if not name.startswith(("net/", "guider/")) and method_of(name.split("|")[0])]


def recorded_noise(sampler: str) -> Any:
    """The k-th recorded draw where the k-th is asked for."""

    count = itertools.count()

    def noise(like: Tensor, step: int, draw: int = 0) -> Tensor:
        k = next(count) if sampler == "restart" else {"dpm_sde": 2 * step + draw, "sa": step + 1}.get(sampler, step)
        return torch.from_numpy(np.random.RandomState(202).standard_normal((80, *like.shape))[k])

    return noise


def corrected_at_the_end(denoise: Denoiser, grid: Grid, steps: list[samplers.Step], tau: float) -> Tensor:
    """The recorded chains of SA correct the last node too, and evaluate there once more."""
    move, n = rules.data_moves(grid, tau**2)[-1], len(grid) - 2
    change = move.factor * rules.exact(rules.points(n, grid.lam, 2, new=True), move.exponent)
    change[1] -= move.factor * rules.exact(np.zeros(1), move.exponent)[0]
    x = steps[-2].x + change[0] * steps[-1].x0 + change[1] * steps[-2].x0
    return denoise(x, torch.full((len(x),), grid.positions[-1])).x0


@pytest.mark.parametrize("name", BUILT)
def test_recorded(name: str) -> None:
    case = CASES[name]
    found = method_of(name.split("|")[0])
    assert found
    sampler, options = found
    mixture, process = Mixture(case["model"]), process_of(case["grid"].split("/")[0])
    if sampler == "restart":
        options["noise_scale"] = case["options"]["s_noise"]
        options["restart"] = [
            tuple(level[key] for key in ("nodes", "times", "sigma_min", "sigma_max"))
            for level in case["options"]["levels"]
        ]
    entry, grid = samplers.SAMPLERS[sampler], grid_of(case["grid"])
    if entry.noise:
        options["noise"] = recorded_noise(sampler)
    denoise = mixture.denoiser(process, case)
    steps = list(entry.run(denoise, x_T(mixture.shape), process, grid, **options))
    result, expected = steps[-1].x, arrays()[name]
    if options.get("corrector"):
        result = corrected_at_the_end(denoise, grid, steps, options["tau"])
    np.testing.assert_allclose(
        result.numpy(), expected, rtol=0, atol=case["tolerance"] * max(1, np.abs(expected).max())
    )
