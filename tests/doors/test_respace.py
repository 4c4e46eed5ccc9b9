"""The door respace: kept steps, what the wrapped model hears, and the names a star import brings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import respace


def spaced(keep, **options):
    settings = {
        "betas": np.linspace(1e-3, 0.02, 100),
        "model_mean_type": gd.ModelMeanType.EPSILON,
        "model_var_type": gd.ModelVarType.FIXED_LARGE,
        "loss_type": gd.LossType.MSE,
    }
    return respace.SpacedDiffusion(use_timesteps=keep, **{**settings, **options})


def test_space_timesteps_gives_a_set():
    assert respace.space_timesteps(100, "ddim4") == {0, 25, 50, 75}
    assert respace.space_timesteps(100, [2, 2]) == {0, 49, 50, 99}
    assert respace.space_timesteps(100, 5) == respace.space_timesteps(100, "5")
    with pytest.raises(ValueError, match="ddim60"):
        respace.space_timesteps(1000, "ddim60")


def test_attributes():
    diffusion = spaced([3, 50, 99])
    assert isinstance(diffusion, gd.GaussianDiffusion)
    assert diffusion.use_timesteps == {3, 50, 99} and diffusion.timestep_map == [3, 50, 99]
    assert diffusion.original_num_steps == 100 and diffusion.num_timesteps == 3


@pytest.mark.parametrize("rescale", [False, True])
def test_model_and_guidance_hear_original_steps(rescale):
    heard = {"model": [], "guide": []}

    def model(x, t, y=None):
        heard["model"].append(t)
        return x

    def guide(x, t, y=None):
        heard["guide"].append(t)
        return x

    diffusion = spaced([3, 50, 99], rescale_timesteps=rescale)
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([2, 1])
    expected = torch.tensor([990.0, 500.0]) if rescale else torch.tensor([99, 50])
    diffusion.p_sample(model, x, t, cond_fn=guide)
    diffusion.ddim_sample(model, x, t, cond_fn=guide)
    diffusion.training_losses(model, x, t)
    diffusion.calc_bpd_loop(model, x)
    for t_heard in [*heard["model"][:3], *heard["guide"]]:
        assert torch.equal(t_heard, expected)
    assert torch.equal(diffusion._scale_timesteps(t), t)


def test_with_grad_guidance_hears_own_steps():
    heard = []
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([2, 1])
    spaced([3, 50, 99]).p_sample_with_grad(lambda x, t: x, x, t, cond_fn=lambda x, t, out: heard.append(t) or x)
    assert torch.equal(heard[0], t)


def test_wrapping_once_is_enough():
    diffusion = spaced([3, 50, 99])
    wrapped = diffusion._wrap_model(torch.nn.Identity())
    assert isinstance(wrapped, respace._WrappedModel) and diffusion._wrap_model(wrapped) is wrapped
    told = respace._WrappedModel(lambda x, t: t, [3, 50, 99], True, 100)(None, torch.tensor([1]))
    assert torch.equal(told, torch.tensor([500.0]))


def test_keeping_everything_changes_nothing():
    x, t = torch.randn(3, 1, 2, 2), torch.tensor([0, 40, 99])
    whole = gd.GaussianDiffusion(
        betas=np.linspace(1e-3, 0.02, 100),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_LARGE,
        loss_type=gd.LossType.MSE,
    )
    kept = spaced(range(100))
    np.testing.assert_allclose(kept.betas, whole.betas, rtol=1e-12)
    first, second = (d.p_mean_variance(lambda x, t: 0.5 * x, x, t) for d in (kept, whole))
    for key in first:
        torch.testing.assert_close(first[key], second[key])


def test_star_import():
    namespace: dict = {}
    exec("from guided_diffusion.respace import *", namespace)
    assert {"np", "th", "GaussianDiffusion", "SpacedDiffusion", "space_timesteps"} <= set(namespace)
