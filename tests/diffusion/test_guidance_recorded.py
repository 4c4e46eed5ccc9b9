"""Guidance against the figures of independent implementations, recorded in tests/golden/samplers."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.network_recipe import fill

from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import Denoised, Denoiser, Spread, make_denoiser
from guided_diffusion.diffusion.grids import Grid
from guided_diffusion.diffusion.process import make_process
from guided_diffusion.diffusion.schedules import named_betas
from guided_diffusion.models.unet import EncoderUNetModel, UNetModel

FOLDER = Path(__file__).parent.parent / "golden" / "samplers"
FIGURES: dict[str, Any] = json.loads((FOLDER / "samplers.json").read_text())
ARRAYS = np.load(FOLDER / "samplers.npz")
GUIDERS = [name for name in FIGURES["cases"] if name.startswith("guider/")]

X, AT = torch.zeros(2, 3, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.long)


def in_turn(*predictions: np.ndarray) -> Denoiser:
    """Gives the next prediction at each call."""
    left = [torch.from_numpy(prediction) for prediction in predictions]
    return lambda x, i: Denoised(left.pop(0), Spread(x, x))


@pytest.mark.parametrize("name", GUIDERS)
def test_predictions_are_combined_as_recorded(name: str) -> None:
    case = FIGURES["cases"][name]
    state = np.random.RandomState(700)
    c0, u0, c1, u1, c2, u2 = (state.standard_normal((2, 3, 8, 8)) for _ in range(6))
    options, w = case["options"], case["options"]["w"]
    if "phi" in options or name == "guider/cfg":
        guided = guidance.classifier_free(in_turn(c0), in_turn(u0), w, rescale=options.get("phi", 0.0))
        found, conditional, unconditional = guided(X, AT).x0, c0, u0
    else:
        rule = {"eta": options["eta"], "norm": options["norm_threshold"], "momentum": options["momentum"] or 0.0}
        steps = 3 if options["momentum"] else 1
        strong, weak = in_turn(*(c0, c1, c2)[:steps]), in_turn(*(u0, u1, u2)[:steps])
        guided = guidance.apg(strong, weak, w, memory={}, **rule)
        found = [guided(X, AT).x0 for _ in range(steps)][-1]
        conditional, unconditional = (c0, c1, c2)[steps - 1], (u0, u1, u2)[steps - 1]
        if "paper" not in name:  # recorded with w times the difference added to the unconditional prediction
            difference = (found - torch.from_numpy(conditional)) / (w - 1)
            found = torch.from_numpy(unconditional) + w * difference
    tolerance = case["tolerance"] * max(1.0, float(np.abs(ARRAYS[name]).max()))
    np.testing.assert_allclose(found.numpy(), ARRAYS[name], rtol=0, atol=tolerance)


NETS = FIGURES["net"]


@lru_cache(maxsize=3)
def network(kind: str) -> torch.nn.Module:
    make = EncoderUNetModel if kind == "classifier" else UNetModel
    classes = {"num_classes": 1000} if kind == "conditional" else {}
    return fill(make(**NETS["classifier" if kind == "classifier" else "unet"], **classes)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "name", [name for name in FIGURES["cases"] if re.match(r"net/euler\|linear/respaced/8\|(classifier3|cfg2)\|", name)]
)
def test_guided_networks_sample_as_recorded(name: str) -> None:
    """`clip` before: each prediction, which is then guided; after: the guided prediction, once."""
    case = FIGURES["cases"][name]
    recorded = FIGURES["grids"][case["grid"]]
    grid = Grid(np.array(recorded["i"]), np.array(recorded["lam"]))
    process = make_process(named_betas(case["grid"].split("/")[0], 1000))
    y, before = torch.tensor(NETS["y"]), case["clip"] == "before"

    def reading(kind: str) -> Denoiser:
        cond = {"y": y} if kind == "conditional" else {}
        return make_denoiser(network(kind), process, cond, predicts=case["predicts"], clip=before)

    denoise, scale = reading("conditional"), case["guidance"]["scale"]
    if case["guidance"]["kind"] == "cfg":
        denoise = guidance.classifier_free(denoise, reading("unconditional"), scale)
    else:
        denoise = guidance.classifier(denoise, process, guidance.log_prob_gradient(network("classifier"), y), scale)
    if not before:
        denoise = guidance.clipped(denoise)
    x = torch.from_numpy(np.random.RandomState(NETS["x_seed"]).standard_normal(NETS["shape"]).astype(np.float32))
    found = samplers.last(samplers.euler(denoise, x, process, grid))
    tolerance = case["tolerance"] * max(1.0, case["max"])
    np.testing.assert_allclose(found[..., ::2, ::2].numpy(), ARRAYS[name], rtol=0, atol=tolerance)
