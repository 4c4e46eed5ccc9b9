"""The recorded figures of the 2021 networks: outputs, gradients of images, norms of parameter gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from network_recipe import build, figures, fill, normal

from guided_diffusion.models.layers import timestep_embedding

META, ARRAYS = figures()
TOLERANCE = 2e-5  # of each array's largest value: float32 sums taken in another order
WAYS = ["default", "checkpointed"]


def assert_close(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def make(kind: str, flags: dict[str, Any], way: str) -> torch.nn.Module:
    return fill(build(kind, flags, use_checkpoint=way == "checkpointed"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", META["unet"])
def test_unet(name: str, way: str) -> None:
    case = META["unet"][name]
    net = make("diffusion", case["flags"], way)
    x = normal(case["x_seed"], tuple(case["x_shape"])).requires_grad_()
    y = None if case["y"] is None else torch.tensor(case["y"])
    out = net(x, torch.tensor(case["t"]), y)
    out.pow(2).mean().backward()
    stride = case["out_stride"]
    assert_close(out.detach()[..., ::stride, ::stride], ARRAYS[f"unet/{name}/out"])
    assert_close(x.grad[..., ::8, ::8], ARRAYS[f"unet/{name}/xgrad"])
    norms = {key.removeprefix("net."): p.grad.norm().item() for key, p in net.named_parameters()}
    assert_close([norms[key] for key in case["grad_norms"]], list(case["grad_norms"].values()))
    assert_close(np.linalg.norm(list(norms.values())), case["total_grad_norm"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", META["classifier"])
def test_classifier(name: str, way: str) -> None:
    case = META["classifier"][name]
    net = make("classifier", case, way).requires_grad_(False)
    x = normal(case["x_seed"], (2, 3, 64, 64)).requires_grad_()
    logits = net(x, torch.tensor(case["t"]))
    assert_close(logits.detach(), ARRAYS[f"classifier/{name}/logits"])
    chosen = torch.log_softmax(logits, dim=-1)[range(2), case["y"]].sum()
    (gradient,) = torch.autograd.grad(chosen, x)
    assert_close(gradient[..., ::4, ::4], ARRAYS[f"classifier/{name}/guidance_grad"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", META["super_resolution"])
def test_super_resolution(name: str, way: str) -> None:
    case = META["super_resolution"][name]
    net = make("super_resolution", case["flags"], way)
    large, small = case["flags"]["large_size"], case["flags"]["small_size"]
    x = normal(case["x_seed"], (2, 3, large, large))
    low = torch.tanh(normal(case["low_res_seed"], (2, 3, small, small)))
    with torch.no_grad():
        out = net(x, torch.tensor(case["t"]), low_res=low, y=torch.tensor(case["y"]))
    stride = case["out_stride"]
    assert_close(out[..., ::stride, ::stride], ARRAYS[f"sr/{name}/out"])


def test_timestep_embedding() -> None:
    found = timestep_embedding(torch.tensor([0, 1, 250.5, 999]), 33)
    assert found.dtype == torch.float32
    assert_close(found, ARRAYS["nn/timestep_embedding"])
