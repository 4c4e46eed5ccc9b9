"""The door gaussian_diffusion (and SpacedDiffusion of respace): recorded figures, old signatures, hooks for subclasses."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "diffusion"))
from recorded import CASES, SEEDS, SHAPE, SHORT, Recorded, cond_fn, data, steps

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.script_util import create_gaussian_diffusion


def plain(num_steps=8, **options):
    """A small diffusion without respacing, for tests of behaviour."""
    settings = {
        "betas": np.linspace(0.02, 0.4, num_steps),
        "model_mean_type": gd.ModelMeanType.EPSILON,
        "model_var_type": gd.ModelVarType.FIXED_SMALL,
        "loss_type": gd.LossType.MSE,
    }
    return gd.GaussianDiffusion(**{**settings, **options})


def half(x, t, **kwargs):
    return 0.5 * x


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_and_losses(name):
    recorded, diffusion = Recorded(name), create_gaussian_diffusion(**CASES[name])
    x0, noise, kwargs = data()
    t = steps(diffusion.num_timesteps)
    np.testing.assert_allclose(diffusion.betas, recorded["betas"], rtol=0, atol=1e-9)
    assert diffusion.timestep_map == recorded["timestep_map"].tolist()
    x = diffusion.q_sample(x0, t, noise=noise)
    recorded.check("xt", x)
    out = diffusion.p_mean_variance(recorded.net, x, t, model_kwargs=kwargs)
    for key, value in out.items():
        recorded.check(f"pmv_{key}", value)
    recorded.check("cond_mean", diffusion.condition_mean(cond_fn, out, x, t, model_kwargs=kwargs))
    moved = diffusion.condition_score(cond_fn, out, x, t, model_kwargs=kwargs)
    recorded.check("cond_score_mean", moved["mean"])
    recorded.check("cond_score_x0", moved["pred_xstart"])
    recorded.check("ddim_reverse", diffusion.ddim_reverse_sample(recorded.net, x, t, model_kwargs=kwargs)["sample"])
    losses = diffusion.training_losses(recorded.net, x0, t, model_kwargs=kwargs, noise=noise)
    assert set(losses) == {key for key in ("loss", "mse", "vb") if f"loss_{key}" in recorded}
    for key, value in losses.items():
        recorded.check(f"loss_{key}", value)


@pytest.mark.parametrize("name", SHORT)
def test_recorded_chains_with_equal_seeds(name):
    recorded, diffusion = Recorded(name), create_gaussian_diffusion(**CASES[name])
    x0, _, kwargs = data()
    named = {"model_kwargs": kwargs, "device": "cpu"}
    torch.manual_seed(SEEDS["p_loop_guided"])
    recorded.check("p_loop_guided", diffusion.p_sample_loop(recorded.net, SHAPE, cond_fn=cond_fn, **named))
    torch.manual_seed(SEEDS["ddim_loop"])
    recorded.check("ddim_loop", diffusion.ddim_sample_loop(recorded.net, SHAPE, **named))
    torch.manual_seed(SEEDS["ddim_loop_eta_guided"])
    sample = diffusion.ddim_sample_loop(recorded.net, SHAPE, cond_fn=cond_fn, eta=0.7, **named)
    recorded.check("ddim_loop_eta_guided", sample)
    torch.manual_seed(SEEDS["bpd"])
    bound = diffusion.calc_bpd_loop(recorded.net, x0, model_kwargs=kwargs)
    for key, value in bound.items():
        recorded.check(f"bpd_{key}", value)


POSITIONS = {
    "q_sample": "x_start t noise",
    "q_posterior_mean_variance": "x_start x_t t",
    "p_mean_variance": "model x t clip_denoised denoised_fn model_kwargs",
    "condition_mean": "cond_fn p_mean_var x t model_kwargs",
    "condition_score": "cond_fn p_mean_var x t model_kwargs",
    "p_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs",
    "p_sample_loop": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress",
    "p_sample_loop_progressive": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress",
    "ddim_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs eta",
    "ddim_reverse_sample": "model x t clip_denoised denoised_fn model_kwargs eta",
    "ddim_sample_loop": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress eta",
    "ddim_sample_loop_progressive": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress eta",
    "_vb_terms_bpd": "model x_start x_t t clip_denoised model_kwargs",
    "training_losses": "model x_start t model_kwargs noise",
    "_prior_bpd": "x_start",
    "calc_bpd_loop": "model x_start clip_denoised model_kwargs",
    "_predict_xstart_from_eps": "x_t t eps",
    "_predict_xstart_from_xprev": "x_t t xprev",
    "_predict_eps_from_xstart": "x_t t pred_xstart",
    "_scale_timesteps": "t",
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positional_parameters_are_those_of_2021(name):
    parameters = inspect.signature(getattr(gd.GaussianDiffusion, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", *POSITIONS[name].split()]
    for more in ("plms_sample", "plms_sample_loop_progressive"):  # of a well-known fork
        assert inspect.signature(getattr(gd.GaussianDiffusion, more)).parameters["order"].default == 2


@pytest.mark.parametrize("convert", [list, torch.from_numpy, np.float32])
def test_betas_of_any_kind_become_writable_float64_arrays(convert):
    betas = np.linspace(0.02, 0.4, 8)
    diffusion = plain(betas=convert(betas))
    for name in gd._ATTRIBUTES:
        table = getattr(diffusion, name)
        assert table.dtype == np.float64 and table.shape == (8,)
        torch.from_numpy(table)  # warns if not writable
    scaled = diffusion.sqrt_one_minus_alphas_cumprod[3] * torch.ones(2)
    assert scaled.dtype == torch.float32


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, float("nan")])
def test_betas_outside_the_open_interval_are_refused(beta):
    with pytest.raises(ValueError, match="step 1 of 2"):
        plain(betas=[0.1, beta])


def test_extract_takes_scalars_and_batches():
    arr = np.linspace(0, 1, 5)
    out = gd._extract_into_tensor(arr, torch.tensor([1, 4]), (2, 3, 4))
    assert out.shape == (2, 3, 4) and out.dtype == torch.float32
    assert torch.equal(out[:, 0, 0], torch.tensor([0.25, 1.0]))
    x = torch.randn(2, 3, 4, 4)
    diffusion, noise = plain(), torch.randn(2, 3, 4, 4)
    one = diffusion.q_sample(x, torch.tensor(3), noise)
    torch.testing.assert_close(one, diffusion.q_sample(x, torch.tensor([3, 3]), noise), rtol=0, atol=0)


def test_reassigned_tables_are_read():
    diffusion, x, t = plain(), torch.randn(1, 1, 2, 2), torch.tensor([2])
    diffusion.posterior_mean_coef1 = np.zeros(8)
    diffusion.posterior_mean_coef2 = np.full(8, 3.0)
    torch.testing.assert_close(diffusion.p_mean_variance(half, x, t)["mean"], 3 * x)


def test_live_outputs_steer_the_chain_and_grad_mode_is_the_callers():
    diffusion = plain()
    for loop in ("p_sample_loop_progressive", "ddim_sample_loop_progressive", "plms_sample_loop_progressive"):
        steered = torch.randn(1, 1, 2, 2)
        modes, seen = [], []

        def net(x, t, seen=seen):
            seen.append(x.clone())
            assert not torch.is_grad_enabled()
            return 0.5 * x

        for out in getattr(diffusion, loop)(net, (1, 1, 2, 2), device="cpu"):
            modes.append(torch.is_grad_enabled())
            assert not out["sample"].requires_grad
            out["sample"] = steered
        assert modes == [True] * 8
        assert torch.equal(seen[-1], steered)


def test_previous_x_means_what_it_says():
    """A model that predicts the posterior mean of a known x0 gives back that mean and that x0."""
    diffusion, x0, t = (
        plain(model_mean_type=gd.ModelMeanType.PREVIOUS_X),
        torch.rand(4, 1, 2, 2),
        torch.tensor([1, 2, 5, 7]),
    )
    x = diffusion.q_sample(x0, t)
    mean, _, _ = diffusion.q_posterior_mean_variance(x0, x, t)
    out = diffusion.p_mean_variance(lambda x, t: mean, x, t)
    torch.testing.assert_close(out["pred_xstart"], x0, rtol=0, atol=2e-5)
    assert out["mean"] is mean
    losses = diffusion.training_losses(
        lambda x_t, t: diffusion.q_posterior_mean_variance(x0, x_t, t_of)[0], x0, (t_of := t)
    )
    assert losses["mse"].max() < 1e-10


def test_denoised_fn_comes_before_clipping():
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    out = plain().p_mean_variance(half, x, t, denoised_fn=lambda x0: x0 + 100)
    assert torch.equal(out["pred_xstart"], torch.ones_like(x))


def test_scaled_timesteps():
    heard = []
    net = lambda x, t: heard.append(t) or x  # noqa: E731
    plain(rescale_timesteps=True).p_mean_variance(net, torch.randn(1, 1, 2, 2), torch.tensor([4]))
    assert torch.equal(heard[0], torch.tensor([500.0]))
    assert torch.equal(plain()._scale_timesteps(torch.tensor([4])), torch.tensor([4]))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="eta=0.5"):
        plain().ddim_reverse_sample(half, torch.randn(1, 1, 2, 2), torch.tensor([1]), eta=0.5)
    with pytest.raises(TypeError, match="skip_timestep"):
        plain().p_sample_loop(half, (1, 1, 2, 2), device="cpu", skip_timestep=3)
    with pytest.raises(NotImplementedError, match="wavy"):
        gd.get_named_beta_schedule("wavy", 10)


# --- what a well-known fork added ---


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop", "plms_sample_loop"])
def test_guidance_with_gradient_equals_guidance_without_where_it_ignores_the_prediction(loop):
    diffusion, noise = plain(), torch.randn(2, 1, 3, 3)

    def through_prediction(x, t, out):
        assert out["pred_xstart"].requires_grad and x.requires_grad
        return torch.autograd.grad(-(x**2).sum(), x, retain_graph=True)[0] * 0.1

    results = []
    for options in ({"cond_fn": lambda x, t: -0.2 * x}, {"cond_fn": through_prediction, "cond_fn_with_grad": True}):
        torch.manual_seed(3)
        results.append(getattr(diffusion, loop)(half, (2, 1, 3, 3), noise=noise, device="cpu", **options))
    assert not results[1].requires_grad
    torch.testing.assert_close(*results)


def test_ddim_with_grad_returns_the_unguided_prediction():
    diffusion, x, t = plain(), torch.randn(1, 1, 2, 2), torch.tensor([4])
    out = diffusion.ddim_sample_with_grad(half, x, t, cond_fn=lambda x, t, out: -x)
    torch.testing.assert_close(out["pred_xstart"], diffusion.p_mean_variance(half, x, t)["pred_xstart"])
    guided = diffusion.ddim_sample(half, x, t, cond_fn=lambda x, t: -x)
    assert not torch.allclose(guided["pred_xstart"], out["pred_xstart"])


def test_plms_of_order_one_is_ddim():
    diffusion, noise = plain(), torch.randn(2, 1, 3, 3)
    options = {"noise": noise, "device": "cpu"}
    first = diffusion.plms_sample_loop(half, (2, 1, 3, 3), order=1, **options)
    torch.testing.assert_close(first, diffusion.ddim_sample_loop(half, (2, 1, 3, 3), **options))
    with pytest.raises(ValueError, match="order"):
        diffusion.plms_sample_loop(half, (2, 1, 3, 3), order=5, **options)


def test_condition_score_reads_attributes_as_they_are():
    diffusion = create_gaussian_diffusion(**CASES[next(iter(CASES))])
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2])
    out = {"pred_xstart": torch.zeros_like(x), "mean": x, "variance": x, "log_variance": x}
    diffusion.sqrt_recipm1_alphas_cumprod = np.full(diffusion.num_timesteps, 3.0)
    diffusion.alphas_cumprod = np.full(diffusion.num_timesteps, 0.75)  # the score moves by the root of 1 - 0.75
    moved = diffusion.condition_score(lambda x, t, **_: torch.ones_like(x), out, x, t)
    torch.testing.assert_close(moved["pred_xstart"], torch.full_like(x, 1.5))  # 3 times 0.5 times a gradient of 1


@pytest.mark.parametrize("given", ["contiguous", "channels_last"])
@pytest.mark.parametrize("returned", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("mean", list(gd.ModelMeanType))
@pytest.mark.parametrize("variance", list(gd.ModelVarType))
def test_what_leaves_is_contiguous(given, returned, mean, variance):
    """Whatever layout goes in or leaves the network: programs flatten with `view`. Broadcast tables have stride 0, as in 2021."""

    def laid_out(x, layout):
        if layout == "slice":
            return torch.cat([x, x], 1)[:, : x.shape[1]]
        return x.contiguous(memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout))

    def net(x, t, **kwargs):
        width = 2 if "LEARNED" in variance.name else 1
        return laid_out(torch.cat([0.5 * x] * width, 1), returned)

    def gradient(x, t, out=None, **kwargs):
        return laid_out(-0.1 * x, returned)

    diffusion = plain(model_mean_type=mean, model_var_type=variance)
    x, t = laid_out(torch.rand(2, 3, 4, 5), given), torch.tensor([0, 3])
    y = laid_out(torch.rand(2, 3, 4, 5), given)
    outputs = {}
    for clip in (False, True):
        options = {"clip_denoised": clip}
        out = outputs[f"p_mean_variance {clip}"] = diffusion.p_mean_variance(net, x, t, **options)
        outputs[f"reverse {clip}"] = diffusion.ddim_reverse_sample(net, x, t, **options)
        outputs[f"plms {clip}"] = diffusion.plms_sample(net, x, t, **options)
        for guide in (None, gradient):
            for step in ("p_sample", "ddim_sample", "p_sample_with_grad", "ddim_sample_with_grad"):
                outputs[f"{step} {clip} {guide}"] = getattr(diffusion, step)(net, x, t, cond_fn=guide, **options)
            for loop in ("p_sample_loop", "ddim_sample_loop", "plms_sample_loop"):
                outputs[f"{loop} {clip} {guide}"] = getattr(diffusion, loop)(
                    net, x.shape, noise=x, cond_fn=guide, **options
                )
    outputs["condition_mean"] = diffusion.condition_mean(gradient, out, x, t)
    outputs["condition_score"] = diffusion.condition_score(gradient, out, x, t)
    outputs["q_sample"] = diffusion.q_sample(x, t, noise=y)
    outputs["q_mean_variance"] = diffusion.q_mean_variance(x, t)
    outputs["q_posterior_mean_variance"] = diffusion.q_posterior_mean_variance(x, y, t)
    outputs["predictions"] = tuple(
        getattr(diffusion, name)(x, t, y)
        for name in ("_predict_xstart_from_eps", "_predict_xstart_from_xprev", "_predict_eps_from_xstart")
    )
    outputs["training_losses"] = diffusion.training_losses(net, x, t, noise=y)
    outputs["calc_bpd_loop"] = diffusion.calc_bpd_loop(net, x)
    for name, value in outputs.items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        for part in parts:
            for tensor in part if isinstance(part, list) else [part]:
                assert tensor.is_contiguous() or 0 in tensor.stride(), name


def test_methods_compile_as_one_graph():
    """Training code of others compiles its step around them."""
    diffusion, (x, noise), t = plain(), torch.randn(2, 2, 3, 4, 4), torch.tensor([1, 5])

    def loss(x, t):
        return diffusion.training_losses(half, x, t, noise=noise)["loss"]

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t), loss(x, t))
