"""Grids: recorded nodes, the limits, and processes over their nodes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_data import exact_process
from golden_mixtures import FIGURES, process_of

from guided_diffusion.diffusion import grids
from guided_diffusion.diffusion.process import Process, at_nodes, rescale_time, respace, space_timesteps, tables_of

KINDS = {"respaced": "respaced", "lam_uniform": "log_snr", "strided": "strided", "karras80": "karras"}


@pytest.mark.parametrize("name", FIGURES["grids"])
def test_recorded_nodes(name: str) -> None:
    schedule, kind, count = name.split("/")
    limit = 80 if kind == "karras80" else None
    grid = grids.GRIDS[KINDS[kind]].make(process_of(schedule), int(count), sigma_max=limit)
    np.testing.assert_allclose(grid.lam, FIGURES["grids"][name]["lam"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(grid.positions, FIGURES["grids"][name]["i"], rtol=0, atol=1e-9)


def options_for(kind: str) -> dict[str, Any]:
    return {"sections": {"sections": "4,3,2"}, "nodes": {"nodes": "sigma:100,20.5,3,1,0.5,0.2,0.1,0.05,0.02,0"}}.get(
        kind, {}
    )


def made(kind: str, process: Process, steps: int | None = 9, **options: Any) -> grids.Grid:
    counted = None if kind in ("sections", "nodes") else steps
    return grids.GRIDS[kind].make(process, counted, **{**options_for(kind), **options})


@pytest.mark.parametrize("kind", grids.GRIDS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_grid_falls_in_step_and_keeps_the_limit_and_the_count(kind: str, schedule: str) -> None:
    process = process_of(schedule)
    grid = made(kind, process)
    whole = -np.log(process.sqrt_recipm1_alpha_bar.numpy())
    assert len(grid) == 9 and (np.diff(grid.positions) < 0).all() and (np.diff(grid.lam) > 0).all()
    np.testing.assert_allclose(grid.lam, np.interp(grid.positions, np.arange(1000), whole), rtol=0, atol=1e-9)
    assert np.exp(-grid.lam[0]) <= 164 * (1 + 1e-12)
    np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1, rtol=1e-14)
    np.testing.assert_allclose(grid.alpha / grid.sigma, np.exp(grid.lam), rtol=1e-14)
    if kind != "nodes":
        for limits in (
            {"sigma_max": 30.0},
            {"sigma_max": 30.0, "sigma_min": 0.1},
            {"sigma_max": None, "sigma_min": 0.05},
        ):
            cut = made(kind, process, **limits)
            s = np.exp(-cut.lam)
            assert len(cut) == 9 and s[0] <= (limits["sigma_max"] or np.inf) * (1 + 1e-12)
            assert s[-1] >= limits.get("sigma_min", 0) * (1 - 1e-12)
            if limits["sigma_max"] is None:
                assert cut.positions[0] == 999 or kind == "strided"


def test_whole_steps_are_those_of_2021() -> None:
    process = process_of("linear")
    for kind, text in (("respaced", "25"), ("strided", "ddim25"), ("sections", "10,8,7")):
        options = {"sections": text} if kind == "sections" else {}
        grid = grids.GRIDS[kind].make(process, 25, **options)
        assert grid.positions.tolist() == space_timesteps(1000, text)[::-1]
    # Five steps of the cosine schedule lie above the limit: the rules choose among the others.
    assert grids.respaced(process_of("cosine"), 5).positions.tolist() == space_timesteps(996, "5")[::-1]


def test_own_steps() -> None:
    process = exact_process("cosine", keep="10")
    grid = grids.own(process)
    assert grid.positions.tolist() == list(range(9, -1, -1))
    np.testing.assert_allclose(2 * grid.lam[::-1], process.log_snr.numpy(), rtol=1e-14)
    cut = grids.own(process, sigma_max=164.0)
    assert (
        cut.positions[1:].tolist() == list(range(8, -1, -1)) and cut.lam[0] == -np.log(164) and 8 < cut.positions[0] < 9
    )
    assert grids.own(process_of("linear"), sigma_max=164.0).positions[0] == 999


@pytest.mark.parametrize("kind", grids.GRIDS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_process_over_the_nodes(kind: str, schedule: str) -> None:
    whole = rescale_time(process_of(schedule), 4000.0)
    grid = made(kind, whole)
    process = at_nodes(whole, grid)
    again = grids.own(process, sigma_max=grids.SIGMA_MAX)
    assert len(process) == 9 and again.positions.tolist() == list(range(8, -1, -1))
    np.testing.assert_allclose(again.lam, grid.lam, rtol=0, atol=2e-11)
    np.testing.assert_allclose(process.time.numpy()[::-1], grid.positions * 4, atol=1e-4)
    # Between its steps, times are those of the whole process.
    between = torch.tensor([0.5, 3.25, 6.75], dtype=torch.float64)
    log_snr = process.at("log_snr", between, between).numpy()
    told = np.interp(-log_snr, -whole.log_snr.numpy(), np.arange(1000) * 4.0)
    np.testing.assert_allclose(process.time_at(between).numpy(), told, atol=1e-6)
    if kind in ("respaced", "strided", "sections"):
        same = respace(whole, grid.positions.astype(int).tolist())
        assert np.array_equal(process.betas, same.betas) and torch.equal(process.time, same.time)


def test_nodes_of_a_respaced_process_refer_to_it() -> None:
    whole = process_of("linear")
    short = respace(whole, range(0, 1000, 10))
    process = at_nodes(short, grids.nodes(short, nodes=[99, 50.5, 0]))
    assert process.whole is whole and process.time[0] == 0 and process.time[2] == 990
    assert 500 < process.time[1] < 510


def test_lists_of_nodes() -> None:
    process = process_of("linear")
    assert grids.nodes(process, nodes="999, 850.5,0").positions.tolist() == [999, 850.5, 0]
    by_level = grids.nodes(process, nodes="sigma:14.615, 6.475,0.3,0.029,0.0")
    np.testing.assert_allclose(np.exp(-by_level.lam), [14.615, 6.475, 0.3, 0.029])
    assert grids.nodes(process, nodes="sigma:157.41,1,0.01").positions[0] == 999  # published levels are rounded


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("log_snr", {"steps": 1}, "steps=1"),
        ("respaced", {"steps": 2.5}, "steps=2.5"),
        ("log_snr", {"sigma_max": 1.0, "sigma_min": 2.0}, r"sigma_min=2.0 must be.*sigma_max=1.0.* 0\.01 to 157"),
        ("karras", {"sigma_max": 0.001}, r"sigma_max=0.001.* 0\.01 to 157"),
        ("quadratic", {"sigma_max": -1.0}, "sigma_max=-1"),
        ("respaced", {"sigma_max": 0.0101}, "fewer than 2 steps"),
        ("karras", {"rho": 0.0}, "rho=0.0"),
        ("respaced", {"steps": 2000}, "2000"),
        ("sections", {"sections": "900,2"}, "900"),
        ("sections", {"sections": "4,4", "steps": 9}, "steps=9, but sections='4,4' gives 8 nodes"),
        ("nodes", {"nodes": "999,ten"}, "not understood"),
        ("nodes", {"nodes": "10,500"}, "fall"),
        ("nodes", {"nodes": "999"}, "at least 2"),
        ("nodes", {"nodes": "1200,0"}, "from 999 to 0"),
        ("nodes", {"nodes": "sigma:300,1"}, "from 157"),
        ("nodes", {"nodes": "999,0", "steps": 3}, "steps=3"),
    ],
)
def test_errors(kind: str, options: dict[str, Any], text: str) -> None:
    steps = options.pop("steps", None if kind in ("sections", "nodes") else 10)
    with pytest.raises(ValueError, match=text):
        grids.GRIDS[kind].make(process_of("linear"), steps, **options)


def test_the_table_names_the_options_of_its_functions() -> None:
    for kind, entry in grids.GRIDS.items():
        keywords = [p.name for p in inspect.signature(entry.make).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert sorted(keywords) == sorted(entry.options), kind


def test_levels_of_another_process() -> None:
    """Step k is the same noise level in both; beyond the end of the other schedule a network is told its last time."""
    process, other = process_of("cosine"), process_of("linear")
    nodes = at_nodes(process, grids.log_snr(process, 9, sigma_max=None))
    matched = grids.with_levels_of(nodes, other)
    np.testing.assert_allclose(grids.own(matched).lam, grids.own(nodes).lam, rtol=1e-9)
    lam = tables_of(other.betas)["log_snr"] / 2
    np.testing.assert_allclose(matched.time, np.interp(-grids.own(nodes).lam[::-1], -lam, np.arange(1000.0)), atol=1e-6)
    assert grids.own(nodes).lam[0] < lam[-1] and matched.time[-1] == 999
    assert grids.with_levels_of(nodes, process) is nodes
