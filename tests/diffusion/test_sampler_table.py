"""What holds for every sampler of the table: options, calls, noise by address, guidance, levels known to the host, and identities."""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_data import exact_process, ideal, normal
from golden_mixtures import Mixture, process_of, x_T
from torch import Tensor

from guided_diffusion.diffusion import grids, guidance, samplers
from guided_diffusion.diffusion.denoiser import ByLevel, Denoised, Denoiser, Spread
from guided_diffusion.diffusion.process import Process, at_nodes
from guided_diffusion.diffusion.samplers import ALIASES, SAMPLERS, last, options_of

NEEDED: dict[str, dict[str, Any]] = {"restart": {"restart": "3,2,0.3,2"}}
NOISY: dict[str, dict[str, Any]] = {
    "ddim": {"eta": 0.7},
    "heun": {"churn": 6.0, "churn_min": 0.05, "churn_max": 50.0},
    "euler": {"churn": 6.0},
    **NEEDED,
}
RANDOM = [name for name, entry in SAMPLERS.items() if entry.noise]


def addressed(ids: list[int]) -> Any:
    """Noise of image, step and draw."""

    def noise(like: Tensor, step: int, draw: int = 0) -> Tensor:
        rows = []
        for each in ids:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{each},{step},{draw}".encode()))
            rows.append(torch.randn(like.shape[1:], dtype=like.dtype, generator=generator))
        return torch.stack(rows)

    return noise


def run(
    name: str, denoise: Denoiser, x: Tensor, process: Process, grid: grids.Grid | None = None, **options: Any
) -> Tensor:
    entry = SAMPLERS[name]
    own = {"noise": addressed(list(range(len(x))))} if entry.noise else {}
    return last(entry.run(denoise, x, process, grid, **{**own, **NEEDED.get(name, {}), **options}))


def shrinking(process: Process) -> Denoiser:
    def denoise(x: Tensor, i: Tensor) -> Denoised:
        alpha_bar = process.at("alpha_bar", i, x)
        return Denoised(x * (alpha_bar.sqrt() * 0.3 / (0.3 * alpha_bar + 1 - alpha_bar)), Spread(x, x), 0.5)

    return denoise


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_entry_names_what_its_function_takes(name: str) -> None:
    entry = SAMPLERS[name]
    keywords = {p.name for p in inspect.signature(entry.run).parameters.values() if p.kind is p.KEYWORD_ONLY}
    hidden = {"start", "num_steps"} | ({"rho"} if name in ("heun", "restart") else set())
    assert keywords - hidden - {"noise"} == set(entry.options) and entry.noise == ("noise" in keywords)
    assert entry.grid in grids.GRIDS and set(entry.defaults()) == set(entry.options)


def test_aliases_name_samplers_and_options_that_they_have() -> None:
    assert not set(ALIASES) & set(SAMPLERS)
    for name, (sampler, options) in ALIASES.items():
        assert set(options_of(name, {})) == set(SAMPLERS[sampler].options) and set(options) <= set(
            SAMPLERS[sampler].options
        )
    assert options_of("fast", {"final_order": None})["order"] == 2 and samplers.named("fast")[0] == "unipc"
    assert options_of("dpmpp_3m", {"exact": True}) == {
        "order": 3, "final_order": 1, "exact": True, "solver": "midpoint", "form": "data",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("unipc", {"churn": 1.0}, "--churn is of heun and euler; --sampler unipc has none"),
        ("ddim", {"tau": 1.0}, "--tau is of sa; --sampler ddim has none"),
        ("ancestral", {"order": 2}, "--order is of dpm_solver, unipc, .* and sa; --sampler ancestral has none"),
        ("lms", {"eta": 0.5}, "--eta is of ddim, sde_dpm_solver, ancestral_euler and dpm_sde; --sampler lms has none"),
        ("ddmi", {}, "sampler is 'ddmi'; it must be one of ancestral, ddim"),
    ],
)
def test_an_option_that_a_sampler_has_not(name: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        options_of(name, given)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("unipc", {"order": 4}, "order=4 must be a whole number from 1 to 3"),
        ("adams", {"order": 5}, "order=5"),
        ("ipndm", {"order": 4, "steps": 3}, "order=4 needs at least 4 nodes; there are 3"),
        ("deis", {"final_order": 0}, "final_order=0"),
        ("dpm_solver", {"exact": True}, "exact=True means nothing with order=2"),
        ("dpm_solver", {"solver": "euler"}, "solver='euler' must be one of midpoint, taylor"),
        ("dpm_solver", {"form": "v"}, "form='v'"),
        ("unipc", {"variant": "bh3"}, "variant='bh3'"),
        ("dpm_solver_s", {"order": 1}, "order=1 must be 2 or 3"),
        ("sde_dpm_solver", {"eta": 2.0}, "eta=2.0"),
        ("ancestral_euler", {"eta": -1.0}, "eta=-1.0"),
        ("dpm_sde", {"eta": 1.5}, "eta=1.5"),
        ("sa", {"tau": -1.0}, "tau=-1.0"),
        ("sa", {"corrector": 7}, "corrector=7"),
        ("euler", {"churn": -2.0}, "churn=-2.0"),
        ("heun", {"churn_min": 2.0, "churn_max": 1.0}, "churn_min=2.0"),
        ("restart", {"restart": "3,2,0.3"}, "not understood"),
        ("restart", {"restart": ""}, "give one"),
        ("restart", {"restart": "1,2,0.3,2"}, "needs 2 nodes"),
        ("restart", {"restart": "3,1,20,300"}, r"restart 3,1,20,300 .* from 157.41 to 0.01"),
    ],
)
def test_numbers_that_mean_nothing(name: str, options: dict[str, Any], text: str) -> None:
    process = process_of("linear")
    grid = grids.log_snr(process, options.pop("steps", 10))
    with pytest.raises(ValueError, match=text):
        run(name, shrinking(process), normal(2, 1, 1, 1), process, grid, **options)


# With 12 nodes; those not named evaluate each node once. A restart of n nodes, K times, adds 2 K (n - 1).
EVALUATIONS = {"plms": 13, "heun": 23, "dpm2": 23, "dpm_solver_s": 23, "dpm_sde": 23}
CALLS = [
    *((name, NEEDED.get(name, {}), EVALUATIONS.get(name, 12)) for name in SAMPLERS if name != "restart"),
    ("plms", {"order": 1}, 12),
    ("dpm_solver_s", {"order": 3}, 34),
    ("heun", NOISY["heun"], 23),
    ("restart", {"restart": "3,2,0.3,2"}, 31),
    ("restart", {"restart": "4,1,5,20;3,3,0.06,0.3"}, 41),
]


@pytest.mark.parametrize(("name", "options", "calls"), CALLS)
def test_calls_and_levels(name: str, options: dict[str, Any], calls: int) -> None:
    process, asked = exact_process(), []
    plain = shrinking(process)

    def make(sigma: float) -> Denoiser:
        def denoise(x: Tensor, i: Tensor) -> Denoised:
            assert float(process.at("sqrt_recipm1_alpha_bar", i, i)[0]) == pytest.approx(sigma, rel=1e-9)
            asked.append(sigma)
            return plain(x, i)

        return denoise

    grid = grids.karras(process, 12)
    run(name, ByLevel(process, make), normal(2, 3), process, grid, **options)
    assert len(asked) == calls
    assert asked[-1] == pytest.approx(np.exp(-grid.lam[-1]))


@pytest.mark.parametrize("name", RANDOM)
def test_an_image_is_the_same_in_any_batch(name: str) -> None:
    process = process_of("linear")
    grid, denoise = grids.log_snr(process, 8), shrinking(process)
    x = normal(4, 4, 4, 4)

    def chain(rows: list[int], ids: list[int] | None = None) -> Tensor:
        options = {"noise": addressed(ids or rows), **NOISY.get(name, {})}
        return last(SAMPLERS[name].run(denoise, x[rows], process, grid, **options))

    whole = chain([0, 1, 2, 3])
    assert torch.equal(chain([2]), whole[2:3]) and torch.equal(chain([3, 1]), whole[[3, 1]])
    assert not torch.allclose(chain([0, 1, 2, 3], [4, 5, 6, 7]), whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_over_the_nodes_is_a_chain_over_the_grid(name: str) -> None:
    """The same levels, told by whole numbers in `at_nodes` and by positions between steps in the whole process."""
    whole = process_of("cosine")
    grid = grids.quadratic(whole, 9)
    nodes, x = at_nodes(whole, grid), normal(2, 3)

    def on(process: Process) -> Denoiser:
        plain = shrinking(process)

        def denoise(x: Tensor, i: Tensor) -> Denoised:
            time, x0 = process.time_at(i), plain(x, i).x0
            spread = Spread(process.at("posterior_variance", i, x), process.at("posterior_log_variance", i, x))
            return Denoised(x0 + 1e-4 * time.view(-1, 1), spread, 0.0)

        return denoise

    one = run(name, on(nodes), x, nodes, grids.own(nodes))
    torch.testing.assert_close(one, run(name, on(whole), x, whole, grid), rtol=0, atol=1e-8)
    torch.testing.assert_close(
        one, run(name, on(nodes), x, nodes), rtol=0, atol=0
    )  # its own steps are what it takes anyway


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_classifier_with_scale_1_samples_the_class(name: str) -> None:
    mixture, process = Mixture("mix8"), process_of("linear")
    plain, of_class = (mixture.denoiser(process, {"guidance": {"kind": kind}}) for kind in ("plain", "cond"))

    def gradient(x: Tensor, time: Tensor) -> Tensor:
        score, each = mixture.scores(x.flatten(1), process.at("alpha_bar", time, x.flatten(1)))
        return (each[torch.arange(len(x)), [0, 1, 2]] - score).view_as(x)

    x, grid = x_T(mixture.shape), grids.log_snr(process, 8)
    guided = run(name, guided_with_share(guidance.classifier(plain, process, gradient, 1.0)), x, process, grid)
    right = run(name, of_class, x, process, grid)
    torch.testing.assert_close(guided, right, rtol=0, atol=1e-10)


def guided_with_share(denoise: Denoiser) -> Denoiser:
    return lambda x, i: Denoised(denoise(x, i).x0, Spread(x, x), 0.0)


def test_the_same_rules_under_other_names() -> None:
    mixture, process = Mixture("mix2"), process_of("linear")
    denoise, x, grid = mixture.denoiser(process), x_T(mixture.shape), grids.karras(process, 10)

    def end(name: str, **options: Any) -> Tensor:
        return run(name, denoise, x, process, grid, **options)

    same = [
        (end("sa", order=2, corrector=0, tau=0.0), end("dpm_solver", solver="taylor")),
        (end("sde_dpm_solver", eta=0.0), end("dpm_solver")),
        (end("sde_dpm_solver", eta=0.0, order=3), end("dpm_solver", order=3)),
        (end("ancestral_euler"), end("ddim", eta=1.0)),
        (end("ancestral_euler"), end("sde_dpm_solver", order=1)),
        (end("ancestral"), end("ddim", eta=1.0)),
        (end("sa", order=1, corrector=0), end("ddim", eta=1.0)),
        (end("deis", order=1), end("ddim")),
        (end("adams", order=1), end("ddim")),
        (end("euler"), end("ddim")),
        (end("deis"), end("dpm_solver", form="noise", solver="taylor")),
        (
            end("dpm_solver", order=3, exact=True, solver="taylor"),
            end("sa", order=3, corrector=0, tau=0.0),
        ),
        (end("dpm_sde", eta=0.0), end("dpm_solver_s")),
    ]
    for one, other in same:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert not torch.allclose(end("dpm_solver", order=3), end("dpm_solver", order=3, exact=True))


@pytest.mark.parametrize("kind", ["log_snr", "respaced"])
def test_ancestral_on_another_grid(kind: str) -> None:
    """Learned shares on whole steps are the variance of the respaced process; a learned logarithm is refused elsewhere."""
    whole = exact_process()
    grid = grids.GRIDS[kind].make(whole, 7)
    nodes, x = at_nodes(whole, grid), normal(2, 3)

    def on(process: Process) -> Denoiser:
        def denoise(x: Tensor, i: Tensor) -> Denoised:
            share = (torch.sin(3 * x) + 1) / 2
            log = share * process.at("log_beta", i, x) + (1 - share) * process.at("posterior_log_variance", i, x)
            return Denoised(shrinking(process)(x, i).x0, Spread(log.exp(), log), share)

        return denoise

    torch.testing.assert_close(
        run("ancestral", on(whole), x, whole, grid), run("ancestral", on(nodes), x, nodes), rtol=0, atol=1e-9
    )
    with pytest.raises(ValueError, match="variance='learned'.*--grid respaced"):
        run("ancestral", ideal(whole), normal(2, 2), whole, grid)
