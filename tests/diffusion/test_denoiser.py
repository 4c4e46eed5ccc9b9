"""What a denoiser tells the network, and what it does to the prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian_data import exact_process

from guided_diffusion.diffusion.denoiser import Denoised, Spread, make_denoiser
from guided_diffusion.diffusion.process import make_process, rescale_time, respace
from guided_diffusion.diffusion.schedules import named_betas


def test_the_network_hears_original_rescaled_times_and_conditions() -> None:
    heard = {}

    def net(x: torch.Tensor, time: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        heard.update(cond, time=time)
        return x

    whole = make_process(named_betas("cosine", 500)).to(dtype=torch.float64)
    process = respace(rescale_time(whole), [0, 100, 400])
    y, low_res = torch.tensor([3, 4]), torch.zeros(2, 3, 2, 2)
    denoise = make_denoiser(net, process, {"y": y, "low_res": low_res}, variance="fixed_large")
    denoise(torch.zeros(2, 3, 4, 4), torch.tensor([2, 1]))
    assert heard["y"] is y and heard["low_res"] is low_res and heard["time"].tolist() == [800.0, 200.0]
    between = torch.tensor([1.5, 0.25], dtype=torch.float64)
    denoise(torch.zeros(2, 3, 4, 4), between)
    level = process.at(
        "log_snr", between, between
    )  # between steps kept: the time that all 500 steps have for this noise
    expected = 2 * np.interp(-level.numpy(), -whole.log_snr.numpy(), np.arange(500))
    np.testing.assert_allclose(heard["time"].numpy(), expected, rtol=1e-9)
    for again in (respace(process, [0, 2]), rescale_time(respace(whole, [0, 100, 400]))):
        there = torch.searchsorted(-again.log_snr, -level[0]).double() - 1
        fraction = (again.log_snr[int(there)] - level[0]) / (again.log_snr[int(there)] - again.log_snr[int(there) + 1])
        torch.testing.assert_close(again.time_at((there + fraction)[None]), heard["time"][:1])


def test_transform_comes_before_clipping() -> None:
    process, x, i = exact_process(keep="10"), torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 9])

    def x0_of(**options) -> torch.Tensor:
        return make_denoiser(lambda x, time: 3 * x, process, predicts="x0", variance="fixed_small", **options)(x, i).x0

    assert torch.equal(x0_of(), torch.ones_like(x))
    assert torch.equal(x0_of(clip=False), torch.full_like(x, 1.5))
    assert torch.equal(x0_of(transform_x0=lambda x0: x0 / 2), torch.full_like(x, 0.75))


def test_fixed_small_variance_is_zero_where_the_chain_ends() -> None:
    process, x, i = exact_process(keep="10"), torch.zeros(2, 1), torch.tensor([0, 1])
    out = make_denoiser(lambda x, time: x, process, variance="fixed_small")(x, i)
    assert out.variance[0] == 0 and torch.isfinite(out.log_variance).all()
    torch.testing.assert_close(out.variance[1], out.log_variance[1].exp())


def test_spread_is_a_value_or_computed_when_asked_for() -> None:
    calls = []

    def compute() -> Spread:
        calls.append(1)
        return Spread(torch.ones(1), torch.zeros(1))

    lazy = Denoised(torch.zeros(1), compute)
    assert not calls and lazy.log_variance == 0 and lazy.variance == 1 and len(calls) == 2
    assert Denoised(torch.zeros(1), compute()).both().variance == 1


def test_unknown_readings_are_refused_at_once() -> None:
    for options in ({"predicts": "score"}, {"variance": "huge"}):
        with pytest.raises(ValueError, match="is not one of"):
            make_denoiser(lambda x, time: x, exact_process(keep="10"), **options)  # type: ignore[arg-type]
