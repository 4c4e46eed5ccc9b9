"""Schedules, tables, respacing, positions between steps, and round trips between ways to write a prediction."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.diffusion import process as p
from guided_diffusion.diffusion.schedules import SCHEDULES, betas_for_alpha_bar, named_betas


def linear(num_steps: int = 1000) -> p.Process:
    return p.make_process(named_betas("linear", num_steps))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [21, 100, 4000])
def test_schedules_destroy_the_data_at_any_length(name: str, num_steps: int) -> None:
    alpha_bar = np.cumprod(1 - named_betas(name, num_steps))
    assert np.all(np.diff(alpha_bar) < 0) and alpha_bar[-1] < 1e-4


def test_betas_follow_their_alpha_bar() -> None:
    betas = betas_for_alpha_bar(50, lambda t: 1 - 0.9 * t)
    np.testing.assert_allclose(np.cumprod(1 - betas), 1 - 0.9 * np.arange(1, 51) / 50)
    assert betas_for_alpha_bar(4, lambda t: 1 - t, max_beta=0.9)[-1] == 0.9


def test_schedule_errors_name_value_and_remedy() -> None:
    with pytest.raises(ValueError, match="'wavy'.*linear, cosine"):
        named_betas("wavy", 10)
    with pytest.raises(ValueError, match="20-step.*at least 21"):
        named_betas("linear", 20)
    with pytest.raises(ValueError, match="not 0"):
        named_betas("cosine", 0)


@pytest.mark.parametrize("wrong", [[0.1, 1.0], [0.1, 0.0], [0.1, float("nan")], [], [[0.1]]])
def test_betas_are_checked(wrong: list) -> None:
    with pytest.raises(ValueError, match="beta"):
        p.make_process(wrong)


def test_process_is_frozen_and_keeps_float64_truth() -> None:
    given_betas = named_betas("linear", 30)
    process = p.make_process(given_betas)
    given_betas[0] = 0.5
    assert process.betas[0] != 0.5 and process.betas.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        process.betas[0] = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        process.time = process.time  # type: ignore[misc]
    fine = process.to(dtype=torch.float64)
    np.testing.assert_array_equal(fine.alpha_bar.numpy(), np.cumprod(1 - process.betas))
    assert process.to("cpu") is process and len(process) == 30 and process.alpha_bar.dtype == torch.float32


def test_posterior_is_bayes_rule() -> None:
    """q(x_{i-1} | x_i, x0) from products of densities on a grid, an independent route."""
    process = p.make_process([0.1, 0.3, 0.2]).to(dtype=torch.float64)
    x0, x, i = (
        torch.tensor([[0.4]], dtype=torch.float64),
        torch.tensor([[-0.9]], dtype=torch.float64),
        torch.tensor([2]),
    )
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    before = p.marginal(process, x0, torch.tensor([1]))
    log_density = -0.5 * (grid - before.mean) ** 2 / before.variance - 0.5 * (x - 0.8**0.5 * grid) ** 2 / 0.2
    weights = log_density.softmax(-1)
    mean = (weights * grid).sum()
    result = p.posterior(process, x0, x, i)
    torch.testing.assert_close(result.mean.squeeze(), mean)
    torch.testing.assert_close(result.variance.squeeze(), (weights * (grid - mean) ** 2).sum())
    torch.testing.assert_close(result.log_variance.exp(), result.variance)


positions = st.lists(st.floats(0, 999), min_size=1, max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@given(positions)
@settings(max_examples=30, deadline=None)
def test_positions_between_steps_are_linear_in_log_snr(i: torch.Tensor) -> None:
    process = linear().to(dtype=torch.float64)
    log_snr = torch.from_numpy(np.interp(i.numpy(), np.arange(1000), process.log_snr.numpy()))
    alpha_bar = process.at("alpha_bar", i, i)
    torch.testing.assert_close(alpha_bar, log_snr.sigmoid())
    torch.testing.assert_close(process.time_at(i), i)
    for name, value in {
        "sqrt_alpha_bar": alpha_bar**0.5,
        "sqrt_one_minus_alpha_bar": (1 - alpha_bar) ** 0.5,
        "log_one_minus_alpha_bar": (1 - alpha_bar).log(),
        "sqrt_recip_alpha_bar": alpha_bar**-0.5,
        "sqrt_recipm1_alpha_bar": (1 / alpha_bar - 1) ** 0.5,
    }.items():
        torch.testing.assert_close(process.at(name, i, i), value, rtol=1e-6, atol=1e-9)


def test_whole_positions_are_exactly_the_tables() -> None:
    process = p.respace(linear(), p.space_timesteps(1000, "25"))
    steps = torch.arange(25)
    tables = [f.name for f in dataclasses.fields(p.Process) if f.type == "Tensor" and f.name != "time"]
    for name in tables:
        assert torch.equal(process.at(name, steps.float(), steps), process.at(name, steps, steps)), name
    assert torch.equal(process.time_at(steps.float()), process.time)
    beyond = process.at("alpha_bar", torch.tensor([-1.0, 30.0]), steps)
    assert torch.equal(beyond, process.alpha_bar[[0, -1]])


def test_values_take_the_shape_that_multiplies() -> None:
    x = torch.zeros(3, 2, 4, 4)
    assert linear().at("beta", torch.tensor([1, 2, 3]), x).shape == (3, 1, 1, 1)
    assert linear().at("beta", torch.tensor(1), x).shape == (1, 1, 1, 1)


def test_respacing_keeps_levels_and_times() -> None:
    process = p.rescale_time(linear(500))
    keep = p.space_timesteps(500, "10,20,5")
    short = p.respace(process, keep)
    torch.testing.assert_close(short.alpha_bar, process.alpha_bar[keep])
    assert torch.equal(short.time, 2.0 * torch.tensor(keep))
    assert p.respace(process, range(500)) is process
    twice = p.respace(short, [0, 7, 34])
    torch.testing.assert_close(twice.alpha_bar, p.respace(process, [keep[0], keep[7], keep[34]]).alpha_bar)
    after = p.rescale_time(p.respace(linear(500), keep))
    assert torch.equal(after.time, short.time) and p.rescale_time(after).time.equal(after.time)
    for wrong in ([], [500], [-1, 3]):
        with pytest.raises(ValueError, match=r"0\.\.499"):
            p.respace(process, wrong)


@given(st.integers(1, 500), st.lists(st.integers(0, 40), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_sections(num_steps: int, counts: list[int]) -> None:
    sizes = [len(part) for part in np.array_split(np.arange(num_steps), len(counts))]
    if sum(counts) < min(2, num_steps) or any(count > size for count, size in zip(counts, sizes)):
        with pytest.raises(ValueError):
            p.space_timesteps(num_steps, counts)
        return
    steps = p.space_timesteps(num_steps, counts)
    assert steps == p.space_timesteps(num_steps, ",".join(map(str, counts)))
    assert steps == sorted(set(steps)) and len(steps) == sum(counts)
    for count, part in zip(counts, np.array_split(np.arange(num_steps), len(counts))):
        inside = [step for step in steps if part.size and part[0] <= step <= part[-1]]
        assert len(inside) == count
        if count:
            assert inside[0] == part[0]
        if count > 1:
            assert inside[-1] == part[-1] and np.ptp(np.diff(inside)) <= 1


@given(st.integers(2, 1000), st.integers(2, 1000))
@settings(max_examples=200, deadline=None)
def test_strides(num_steps: int, count: int) -> None:
    try:
        steps = p.space_timesteps(num_steps, f"ddim{count}")
    except ValueError as error:
        assert f"ddim{count}" in str(error)
        assert count > num_steps or all(len(range(0, num_steps, stride)) != count for stride in range(1, num_steps))
    else:
        assert len(steps) == count and steps[0] == 0 and len(set(np.diff(steps))) <= 1


WRONG = [*"ten ddim 10,,3 0 -5 101 10.5 60,1 3,-1 ddim0 ddim1 ddim-3 ddim60 ddim200 ddim5,5".split(), [0, 0], ["x"]]


@pytest.mark.parametrize("wrong", WRONG)
def test_respacing_that_makes_no_sense(wrong: object) -> None:
    """The message names flag and value, and what it proposes for them is accepted."""
    with pytest.raises(ValueError, match="timestep_respacing") as told:
        p.space_timesteps(100, wrong)  # type: ignore[arg-type]
    message = str(told.value)
    assert repr(wrong) in message
    for proposed in re.findall("'(ddim[0-9]+|[0-9,]+)'", message.replace(repr(wrong), "")):
        p.space_timesteps(1000, proposed)
    for proposed in re.findall("ddim[0-9]+(?= or|,)", message):
        p.space_timesteps(100, proposed)


def test_kinds_of_sections() -> None:
    assert p.space_timesteps(100, "") == list(range(100)) == p.space_timesteps(100, 100)
    assert p.space_timesteps(100, np.int64(5)) == p.space_timesteps(100, " 5 ") == p.space_timesteps(100, (5,))
    for one in ("1", 1, [1]):  # nothing to sample with, but 2021 gave it to code that looks at single steps
        assert p.space_timesteps(100, one) == [0]


def test_predictions_round_trip() -> None:
    process = p.respace(linear(), p.space_timesteps(1000, "50")).to(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(50, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    for i in (torch.arange(50), torch.arange(50).double() + 0.37):
        x = p.add_noise(process, x0, i, noise)
        torch.testing.assert_close(p.x0_from_eps(process, x, i, noise), x0)
        torch.testing.assert_close(p.eps_from_x0(process, x, i, x0), noise)
        torch.testing.assert_close(p.x0_from_v(process, x, i, p.v_from_x0(process, x0, i, noise)), x0)
    i = torch.arange(50)
    x = p.add_noise(process, x0, i, noise)
    torch.testing.assert_close(p.x0_from_previous_x(process, x, i, p.posterior_mean(process, x0, x, i)), x0)
    with pytest.raises(ValueError, match="same"):
        p.add_noise(process, x0, i, noise[:1])


def test_one_step_processes_exist() -> None:
    process = p.respace(linear(), [999])
    assert len(process) == 1
    for name in ("posterior_log_variance", "fixed_large_log_variance", "log_snr"):
        assert torch.isfinite(getattr(process, name)).all()


@pytest.mark.parametrize("shape", [(), (2,), (2, 1, 4, 4)])
def test_tables_at_positions_of_any_shape(shape: tuple[int, ...]) -> None:
    process, like = p.make_process(named_betas("linear", 40)), torch.zeros(2, 3, 4, 4)
    i = torch.arange(max(1, int(np.prod(shape)))).view(shape)
    expected = process.alpha_bar[i].reshape(shape + (1,) * (4 - len(shape)))
    assert torch.equal(process.at("alpha_bar", i, like).expand_as(like), expected.expand_as(like))
