"""Values that are not finite never become an image: the image and the step are named, for every sampler."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import chain
from torch import Tensor

from guided_diffusion import build
from guided_diffusion.config import RunConfig, SampleConfig
from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import make_denoiser
from guided_diffusion.diffusion.process import Process, make_process, respace, space_timesteps
from guided_diffusion.diffusion.schedules import named_betas
from guided_diffusion.sampling.jobs import Job, Request
from guided_diffusion.sampling.pipeline import write_preview
from guided_diffusion.sampling.queue import answers, generate
from guided_diffusion.training.callbacks import SampleGrid
from guided_diffusion.training.trainer import Trainer
from guided_diffusion.weights.load import Loaded

NAN, INF = math.nan, math.inf
SMALL = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "4", "diffusion_steps": 100}


def steps(count: int = 6) -> Process:
    return respace(make_process(named_betas("linear", 1000)), space_timesteps(1000, str(count)))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", [name for name in samplers.SAMPLERS if name != "restart"])
def test_the_row_and_the_step_are_named(name: str, value: float) -> None:
    """Also an infinite prediction, which clipping would turn into an ordinary white or black pixel."""
    process = steps()

    def net(x: Tensor, time: Tensor) -> Tensor:
        out = 0.1 * x
        if float(time[0]) <= float(process.time[3]):  # from the third step on
            out[1, 0, 2, 2] = value
        return out

    denoise = make_denoiser(net, process, variance="fixed_small")
    with pytest.raises(samplers.NotFinite, match=r"from step [23] of") as told:  # heun looks a step ahead
        samplers.last(getattr(samplers, name)(denoise, torch.randn(3, 3, 4, 4), process))
    assert told.value.row == 1


def test_finite_values_stay_what_they_are() -> None:
    process, x = steps(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = make_denoiser(lambda x, time: 3 * x, process, variance="fixed_small")
    i = torch.tensor([5, 0])
    x0 = make_denoiser(lambda x, time: 3 * x, process, variance="fixed_small", clip=False)(x, i).x0
    assert torch.equal(plain(x, i).x0, x0.clamp(-1, 1))


@pytest.mark.parametrize("scale", [NAN, INF, -INF])
def test_scales_that_are_none_are_refused(scale: float) -> None:
    process = steps()
    denoise = make_denoiser(lambda x, time: x, process, variance="fixed_small")
    for make in (guidance.classifier, guidance.classifier_mean):
        with pytest.raises(ValueError, match="must be a finite number"):
            make(denoise, process, lambda x, time: x, scale)
    for wrong in (scale, str(scale)):
        with pytest.raises(ValueError, match="must be a finite number"):
            guidance.classifier_free(denoise, denoise, wrong)
    for options in ({"churn": scale}, {"noise_scale": scale}, {"rho": scale}):
        with pytest.raises(ValueError, match="must be"):
            samplers.last(samplers.heun(denoise, torch.zeros(1, 3, 4, 4), process, **options))
    for name in ("classifier_scale", "eta"):
        with pytest.raises(ValueError, match=f"--{name}"):
            SampleConfig(**{name: scale}).validate()


def broken(noise: Tensor, fresh: Any, cond: dict[str, Tensor]) -> Tensor:
    images = chain(noise, fresh, cond)
    images[-1, 0, 0, 0] = NAN
    return images


def test_no_job_writes_such_an_image(tmp_path: Path) -> None:
    job = Job(Request("", 6), str(tmp_path), (3, 4, 4), 4)
    with pytest.raises(ValueError, match="^image 3: its values are not finite"):
        generate(broken, job, progress=False)
    assert not list(tmp_path.rglob("*.np[yz]"))
    with pytest.raises(ValueError, match="request 'b', image 1: its values"):
        list(answers(broken, [Request("a", 2), Request("b", 2)], shape=(3, 4, 4), batch_size=4))


def test_a_preview_of_a_broken_network_is_a_warning_of_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its losses end a run, if they stay so; a picture never does."""
    config = RunConfig.from_flags("diffusion", SMALL)
    net = build.build_network(config.model, config.diffusion, seed=0)
    torch.nn.init.constant_(net.out[-1].weight, NAN)
    process = build.build_process(config.diffusion)

    def draw(net: torch.nn.Module, path: str) -> None:
        write_preview(Loaded(net, process, config, ""), path, steps="4")

    trainer = Trainer(net, lambda *_: None, iter([]), ema_rates=(0.9,))  # type: ignore[arg-type,return-value]
    SampleGrid(draw, str(tmp_path))(trainer)
    assert "no picture of samples at step 0: image 0: its values are not finite" in caplog.text
    assert not list(tmp_path.iterdir()) and trainer.net.training
