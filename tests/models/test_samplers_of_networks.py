"""Samplers with a network of 2021, its weights by recipe, against recorded figures of independent implementations."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from network_recipe import GOLDEN, fill, normal
from torch import Tensor

from guided_diffusion.diffusion import grids, samplers
from guided_diffusion.diffusion.denoiser import make_denoiser
from guided_diffusion.diffusion.process import at_nodes, make_process
from guided_diffusion.diffusion.schedules import named_betas
from guided_diffusion.models.unet import UNetModel

FIGURES = json.loads((GOLDEN / "samplers" / "samplers.json").read_text())
RECORDED = {
    "heun_churn8|linear/strided/10": (
        "heun",
        {"churn": 8.0, "churn_min": 0.05, "churn_max": 50.0, "noise_scale": 1.003},
    ),
    "dpmpp_2m_low|linear/strided/10": ("dpm_solver", {}),
    "unipc2_bh2_low|cosine/karras80/10": ("unipc", {}),
    "dpmpp_3m_low|linear/respaced/8": ("dpm_solver", {"order": 3}),
    "ipndm4|cosine/karras80/10": ("ipndm", {"final_order": 4}),
    "dpmpp_2s|linear/respaced/8": ("dpm_solver_s", {}),
    "dpmpp_2m_sde_midpoint_eta1|cosine/karras80/10": ("sde_dpm_solver", {"final_order": 2}),
}


@lru_cache(maxsize=1)
def network() -> UNetModel:
    arguments = {
        **FIGURES["net"]["unet"],
        "attention_resolutions": tuple(FIGURES["net"]["unet"]["attention_resolutions"]),
    }
    return fill(UNetModel(**arguments, num_classes=1000)).eval()  # type: ignore[return-value]


def noise(like: Tensor, step: int, draw: int = 0) -> Tensor:
    return normal(FIGURES["net"]["noise_seed"], (step + 1, *like.shape))[step]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str) -> None:
    """Over the nodes of the grid, as commands sample."""
    case = FIGURES["cases"][f"net/{name}|plain0|clip_before|x0"]
    sampler, options = RECORDED[name]
    whole, recorded = make_process(named_betas(case["grid"].split("/")[0], 1000)), FIGURES["grids"][case["grid"]]
    grid = grids.Grid(np.array(recorded["i"]), np.array(recorded["lam"]))
    process = at_nodes(whole, grid)
    labels = torch.tensor(FIGURES["net"]["y"])

    def net(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        return network()(x, time, y=y)[:, :3]

    denoise = make_denoiser(net, process, {"y": labels}, predicts=case["predicts"], variance="fixed_small")
    entry = samplers.SAMPLERS[sampler]
    more: dict[str, Any] = {**options, **({"noise": noise} if entry.noise else {})}
    x = normal(FIGURES["net"]["x_seed"], tuple(FIGURES["net"]["shape"]))
    with torch.no_grad():
        result = samplers.last(entry.run(denoise, x, process, grids.own(process), **more))
    expected = np.load(GOLDEN / "samplers" / "samplers.npz")[f"net/{name}|plain0|clip_before|x0"]
    stride = FIGURES["net"]["out_stride"]
    np.testing.assert_allclose(
        result[..., ::stride, ::stride].numpy(), expected, rtol=0, atol=case["tolerance"] * max(1, case["max"])
    )
