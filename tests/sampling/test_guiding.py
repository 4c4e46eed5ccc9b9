"""Guidances of loaded models: what is refused, what is shared along a chain, and that nothing that was asked for is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import BASE, filled
from torch import Tensor

import guided_diffusion as gd
from guided_diffusion.sampling.guiding import guided


@pytest.fixture(scope="module")
def model() -> Any:
    return filled("diffusion", BASE)


@pytest.fixture(scope="module")
def plain() -> Any:
    return filled("diffusion", {**BASE, "class_cond": False, "num_classes": 0})


def images(model: Any, *guidance: gd.Guidance, **options: Any) -> bytes:
    labels = {"labels": [1, 3]} if model.num_classes or guidance else {"num_images": 2}
    return gd.sample(model, guidance=list(guidance), **{"steps": 5, "sampler": "ddim", **labels, **options}).tobytes()


def test_momentum_lasts_for_the_chain_where_scales_vary(model: Any, plain: Any) -> None:
    def apg(scale: Any) -> gd.Guidance:
        return gd.Guidance("apg", scale, plain, {"momentum": -0.7, "norm": 5.0})

    # Almost the same scale, but another number at each level.
    varying = images(model, apg(lambda sigma: 3.0 + 1e-12 * sigma))
    constant = images(model, apg(3.0))
    assert np.abs(np.frombuffer(varying, np.uint8).astype(int) - np.frombuffer(constant, np.uint8)).max() <= 1
    assert images(model, apg(3.0)) == constant  # and starts anew with the next chain
    without = images(model, gd.Guidance("apg", 3.0, plain, {"norm": 5.0}))
    assert without != constant


def test_a_slope_alone_scales_eps(model: Any) -> None:
    assert images(model, gd.Guidance("epsilon_scaling", 1.0, options={"slope": 0.1})) != images(model)
    assert guided(model, gd.Guidance("epsilon_scaling", 1.0)).guides == ()


def test_a_function_of_clean_images_guides_a_network_without_classes(plain: Any) -> None:
    def towards(x: Tensor) -> Tensor:
        return torch.stack([9.0 * x.mean((1, 2, 3)) * k for k in range(5)], dim=1)

    for sampler in ("ddim", "ancestral"):
        guide = gd.Guidance("classifier_x0", 5.0, towards)
        assert images(plain, guide, sampler=sampler) != images(plain, sampler=sampler)


MISTAKES = [
    (("classifier_free", None, {}), "classifier_free has no usual scale; give --guidance_scale"),
    (("sag", None, {"layers": ("middle_block.1", "input_blocks.3.1")}), "sag looks at one layer"),
    (("sag", None, {"layers": ("middle_block.1",), "blur": 0.0}), "blur=0.0 must be above 0"),
    (("sag", None, {"kernel": 3.5}), "sag: kernel is 3.5; it must be a value such as 31"),
    (("pag", None, {"layers": "middle_block.1"}), "pag: layers is 'middle_block.1'; it must be a value such as"),
    (("classifier", None, {"entropy": 1}), "classifier: entropy is 1; it must be a value such as False"),
    (("classifier_x0", None, {}), "needs a function of clean images"),
]


@pytest.mark.parametrize(("guide", "message"), MISTAKES, ids=str)
def test_mistakes_are_named(model: Any, guide: tuple[str, Any, Any], message: str) -> None:
    name, scale, options = guide
    with pytest.raises(ValueError, match=message):
        images(model, gd.Guidance(name, scale, options=options))
