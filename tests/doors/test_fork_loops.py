"""Keywords that a well-known fork of the 2021 package added to the loops, and that its users pass."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.respace import SpacedDiffusion

SHAPE = (2, 3, 8, 8)


def spaced() -> SpacedDiffusion:
    """5 of 50 steps."""
    return SpacedDiffusion(
        range(2, 50, 10),
        betas=np.linspace(0.001, 0.1, 50),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
    )


LOOPS = [f"{kind}_sample_loop{end}" for kind in ("p", "ddim") for end in ("", "_progressive")]
MORE = ["plms_sample_loop", "plms_sample_loop_progressive"]


@pytest.mark.parametrize("name", LOOPS + MORE)
def test_loops_take_the_keywords_of_the_fork(name: str) -> None:
    """Its start from an image, its random classes, and its guidance through the prediction, whose t counts own steps."""
    heard: list[int] = []
    image, noise, first = torch.rand(SHAPE), torch.randn(SHAPE), []

    class Net(torch.nn.Module):
        num_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            first.append(x.detach().clone())
            self.seen += y.tolist()
            return 0.5 * x

    def guide(x: Tensor, t: Tensor, out: dict[str, Tensor], y: Any = None) -> Tensor:
        heard.append(int(t[0]))
        return -torch.autograd.grad(out["pred_xstart"].pow(2).sum(), x)[0]

    net, diffusion = Net(), spaced()
    made = getattr(diffusion, name)(
        net, SHAPE, noise=noise, skip_timesteps=2, init_image=image, randomize_class=True, cond_fn=guide,
        cond_fn_with_grad=True, model_kwargs={"y": torch.tensor([3, 3])}, device="cpu",
    )  # fmt: skip
    sample = made if isinstance(made, Tensor) else list(made)[-1]["sample"]
    assert sample.shape == SHAPE and not sample.requires_grad and sample.isfinite().all()
    assert sorted(set(heard)) == [0, 1, 2] and set(net.seen) != {3}
    torch.testing.assert_close(first[0], diffusion.q_sample(image, torch.tensor([2, 2]), noise))


def test_additions_of_the_fork_are_off_unless_named() -> None:
    for name in LOOPS:
        method = getattr(gd.GaussianDiffusion, name)
        positional = inspect.getfullargspec(method)[0]
        assert not {"skip_timesteps", "init_image", "randomize_class", "cond_fn_with_grad"} & set(positional)
    for name in ("plms_sample", MORE[1]):
        assert inspect.signature(getattr(gd.GaussianDiffusion, name)).parameters["order"].default == 2


def test_multistep_loop_carries_on_from_step_to_step() -> None:
    """By default of order two, so no DDIM."""
    noise = torch.randn(SHAPE)

    def curved(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * 0.8

    named: dict[str, Any] = {"noise": noise, "device": "cpu", "clip_denoised": False}
    second = spaced().plms_sample_loop(curved, SHAPE, **named)
    assert not torch.allclose(second, spaced().ddim_sample_loop(curved, SHAPE, **named))
