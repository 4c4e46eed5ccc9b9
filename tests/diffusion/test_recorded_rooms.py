"""The rooms of the mathematics reproduce what the 2021 implementation computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recorded import CASES, FIGURES, SEEDS, SHAPE, SHORT, Recorded, close, cond_fn, data, normal, steps

from guided_diffusion.diffusion import guidance, samplers, updates
from guided_diffusion.diffusion.denoiser import make_denoiser
from guided_diffusion.diffusion.densities import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.diffusion.likelihood import bits_per_dim
from guided_diffusion.diffusion.objectives import training_losses
from guided_diffusion.diffusion.process import (
    Process,
    add_noise,
    eps_from_x0,
    make_process,
    posterior_mean,
    rescale_time,
    respace,
    space_timesteps,
)
from guided_diffusion.diffusion.schedules import named_betas
from guided_diffusion.diffusion.timesteps import LossSecondMoment


def process_of(flags: dict) -> Process:
    process = make_process(named_betas(flags.get("noise_schedule", "linear"), flags.get("steps", 1000)))
    if flags.get("rescale_timesteps"):
        process = rescale_time(process)
    return respace(process, space_timesteps(len(process), flags.get("timestep_respacing", "")))


def reading_of(flags: dict) -> dict:
    fixed = "fixed_small" if flags.get("sigma_small") else "fixed_large"
    return {
        "predicts": "x0" if flags.get("predict_xstart") else "eps",
        "variance": "learned_range" if flags.get("learn_sigma") else fixed,
    }


def guidance_of(y: torch.Tensor) -> guidance.GradLogProb:
    return lambda x, time: cond_fn(x, time, y)


@pytest.mark.parametrize("name", CASES)
def test_tables_predictions_guidance_and_losses(name: str) -> None:
    recorded, process, reading = Recorded(name), process_of(CASES[name]), reading_of(CASES[name])
    x0, noise, cond = data()
    i = steps(len(process))
    np.testing.assert_allclose(process.betas, recorded["betas"], rtol=0, atol=1e-9)
    scale = 1000 / CASES[name].get("steps", 1000) if CASES[name].get("rescale_timesteps") else 1
    close(process.time, (recorded["timestep_map"] * scale).astype(np.float32))

    x = add_noise(process, x0, i, noise)
    recorded.check("xt", x)
    denoise = make_denoiser(recorded.net, process, cond, **reading)
    out = denoise(x, i)
    recorded.check("pmv_pred_xstart", out.x0)
    recorded.check("pmv_mean", posterior_mean(process, out.x0, x, i))
    recorded.check("pmv_variance", out.variance.expand(SHAPE))
    recorded.check("pmv_log_variance", out.log_variance.expand(SHAPE))

    mean_guided = guidance.classifier_mean(denoise, process, guidance_of(cond["y"]))(x, i)
    recorded.check("cond_mean", posterior_mean(process, mean_guided.x0, x, i))
    score_guided = guidance.classifier(denoise, process, guidance_of(cond["y"]))(x, i)
    recorded.check("cond_score_x0", score_guided.x0)
    recorded.check("cond_score_mean", posterior_mean(process, score_guided.x0, x, i))

    eps = eps_from_x0(process, x, i, out.x0)
    recorded.check("ddim_reverse", updates.ddim_update(out.x0, eps, process.at("alpha_bar_next", i, x)))

    flags = CASES[name]
    loss = "rescaled_kl" if flags.get("use_kl") else "rescaled_mse" if flags.get("rescale_learned_sigmas") else "mse"
    losses = training_losses(recorded.net, process, x0, i, noise, cond, loss=loss, **reading)
    assert set(losses) == {key for key in ("loss", "mse", "vb") if f"loss_{key}" in recorded}
    for key, value in losses.items():
        recorded.check(f"loss_{key}", value)


@pytest.mark.parametrize("name", SHORT)
def test_whole_chains(name: str) -> None:
    recorded, process = Recorded(name), process_of(CASES[name])
    x0, _, cond = data()
    denoise = make_denoiser(recorded.net, process, cond, **reading_of(CASES[name]))
    by_mean = guidance.classifier_mean(denoise, process, guidance_of(cond["y"]))
    by_score = guidance.classifier(denoise, process, guidance_of(cond["y"]))

    torch.manual_seed(SEEDS["p_loop_guided"])
    recorded.check("p_loop_guided", samplers.last(samplers.ancestral(by_mean, torch.randn(*SHAPE), process)))
    torch.manual_seed(SEEDS["ddim_loop"])
    recorded.check("ddim_loop", samplers.last(samplers.ddim(denoise, torch.randn(*SHAPE), process)))
    torch.manual_seed(SEEDS["ddim_loop_eta_guided"])
    steps = samplers.ddim(by_score, torch.randn(*SHAPE), process, eta=0.7)
    recorded.check("ddim_loop_eta_guided", samplers.last(steps))

    torch.manual_seed(SEEDS["bpd"])
    bound = bits_per_dim(denoise, process, x0)
    for key, value in zip(("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"), (bound.total, *bound)):
        recorded.check(f"bpd_{key}", value)


@pytest.mark.parametrize("question", FIGURES["space_timesteps"])
def test_space_timesteps(question: str) -> None:
    count, sections = question.split("|")
    expected = FIGURES["space_timesteps"][question]
    if expected == "ValueError":
        with pytest.raises(ValueError, match=sections.removeprefix("ddim")):
            space_timesteps(int(count), sections)
    else:
        assert space_timesteps(int(count), sections) == expected


def test_loss_second_moment() -> None:
    case, arrays = FIGURES["resample"], Recorded("eps_learned").arrays
    chooser = LossSecondMoment(case["steps"], case["history_per_term"], case["uniform_prob"])
    for i, losses in case["updates"]:
        chooser.update(torch.tensor(i), torch.tensor(losses))
    close(chooser.probabilities(), arrays["resample/weights"])


def test_divergence_and_pixel_likelihood() -> None:
    """Inputs: standard normal arrays of consecutive seeds; the scales of the pixels are exp(0.5 n - 2)."""
    arrays = Recorded("eps_learned").arrays
    close(normal_kl(*(normal(seed, (3, 4)) for seed in range(20, 24))), arrays["losses/normal_kl"])
    x = torch.from_numpy(arrays["losses/dgll_x"])
    means, log_scales = normal(25, x.shape), 0.5 * normal(26, x.shape) - 2
    close(discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales), arrays["losses/dgll"])
