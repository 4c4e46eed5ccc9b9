"""Guidance against the figures of independent implementations, recorded in tests/golden/samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guided_diffusion.diffusion import guidance
from guided_diffusion.diffusion.denoiser import Denoised, Denoiser, Spread

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
