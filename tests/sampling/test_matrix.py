"""Every sampler, grid and guidance together on a tiny network: images, receipts that differ, calls as counted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from chains import again
from checkpoint_files import BASE, CRITIC, filled
from torch import Tensor, nn

import guided_diffusion as gd
from guided_diffusion.diffusion.grids import GRIDS
from guided_diffusion.diffusion.guidance import GUIDANCES
from guided_diffusion.diffusion.samplers import SAMPLERS
from guided_diffusion.sampling import execution
from guided_diffusion.sampling.chains import Chain, make_chain
from guided_diffusion.sampling.guiding import Guided, guided
from guided_diffusion.sampling.pipeline import pipeline_of

CLASSES = 4
OF_GRID: dict[str, Any] = {
    "sections": {"steps": None, "sections": "3,2"},
    "nodes": {"steps": None, "nodes": "sigma:2,1.5,1,0.5,0.1"},
}
SCALES = {"classifier_free": 2.0, "apg": 2.0, "random_label": 2.0, "epsilon_scaling": 1.05, "threshold": 0.5}
OPTIONS: dict[str, Any] = {"restart": {"restart": "3,2,0.5,1.5"}}  # without which a sampler does not run
IN_ATTENTION = [name for name, kind in GUIDANCES.items() if "layers" in kind.source]


class Tiny(nn.Module):
    """One convolution, which counts its calls: a denoiser of 3 channels with variances, or a classifier."""

    def __init__(self, seed: int, classifier: bool = False) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(6, 3, 3, 3, generator=source) / 5
        self.classes, self.calls = torch.randn(CLASSES, 6, generator=source), 0
        self.classifier = classifier

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        out = torch.nn.functional.conv2d(x, self.weight, padding=1) * (1 + 1e-3 * time.view(-1, 1, 1, 1))
        if self.classifier:
            return out.mean(dim=(2, 3)) @ self.classes.T
        return out if y is None else out + 0.3 * self.classes[y][:, :, None, None]


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    plain = {**BASE, "class_cond": False, "num_classes": 0, "noise_schedule": "cosine", "learn_sigma": True}
    real = {
        "model": filled("diffusion", BASE),
        "classifier": filled("classifier", CRITIC),
        "plain": filled("diffusion", plain),
    }
    small = {name: replace(each, net=Tiny(k, name == "classifier")) for k, (name, each) in enumerate(real.items())}
    return {**small, "real": real["model"]}


def guide(name: str, networks: dict[str, Any], scale: Any = None) -> gd.Guidance:
    kind, scale = GUIDANCES[name], SCALES.get(name) if scale is None else scale
    if name in IN_ATTENTION:
        return gd.Guidance(name, scale, options={"layers": ("middle_block.1",)})
    if kind.needs == "classifier":
        return gd.Guidance(name, scale, networks["classifier"])
    if kind.needs == "clean":
        return gd.Guidance(name, scale, lambda x: 9 * x.flatten(1)[:, :CLASSES])
    second = {"autoguidance": "model", "random_label": ""}.get(name, "plain") if kind.needs == "weak" else ""
    return gd.Guidance(name, scale, replace(networks[second], net=Tiny(7)) if second else None)


def images(model: Any, **options: Any) -> bytes:
    options |= OPTIONS.get(options.get("sampler", ""), {})
    made = gd.sample(model, labels=[1, 3], batch_size=2, cuda_graphs=False, **options)
    assert made.shape == (2, 8, 8, 3) and made.std() > 5
    return made.tobytes()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_on_each_grid_with_each_guidance(networks: dict[str, Any], sampler: str) -> None:
    made, receipts = [], []
    for grid in GRIDS:
        place = {"grid": grid, "steps": 5, **OF_GRID.get(grid, {})}
        plain = images(networks["model"], sampler=sampler, **place)
        made.append(plain)
        receipts.append(chain_of(networks, sampler, **place).describe())
        # All guidances on one grid, and on the others those whose turn it is.
        names = [name for name in GUIDANCES if name not in (*IN_ATTENTION, "clip")]
        for name in names if grid == "quadratic" else names[len(made) :: 6]:
            assert images(networks["model"], sampler=sampler, guidance=guide(name, networks), **place) != plain, (
                grid,
                name,
            )
    assert len(set(made)) == len(GRIDS) == len({json.dumps(receipt) for receipt in receipts})


def chain_of(networks: dict[str, Any], sampler: str, *, steps: Any, grid: Any = None, **options: Any) -> Chain:
    options |= OPTIONS.get(sampler, {})
    return make_chain(networks["model"].process, sampler, steps=steps, grid=grid, options=options)


@pytest.mark.parametrize("sampler", ["ancestral", "unipc", "heun"])
@pytest.mark.parametrize("name", IN_ATTENTION)
def test_guidance_by_attention(networks: dict[str, Any], name: str, sampler: str) -> None:
    plain = images(networks["real"], sampler=sampler, steps=3)
    assert images(networks["real"], sampler=sampler, steps=3, guidance=guide(name, networks)) != plain


def counted(networks: dict[str, Any], chain: Chain, whole: Guided) -> dict[str, int]:
    """The calls of each network for one chain."""
    for network in whole.networks:
        network.net.calls = 0
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline_of(whole, chain)(x, lambda like, step, draw=0: torch.zeros_like(like), {"y": torch.tensor([1, 3])})
    return {
        network.net.classifier and "classifier" or f"network {k}": network.net.calls
        for k, network in enumerate(whole.networks)
    }


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_are_as_counted_and_none_outside_an_interval(networks: dict[str, Any], sampler: str) -> None:
    chain = chain_of(networks, sampler, steps=8)
    levels = chain.levels()
    inside = sum(0.2 < sigma <= 2.0 for sigma in levels)
    assert 0 < inside < len(levels)
    guides = [guide(name, networks, gd.interval(2.0, 0.2, 2.0)) for name in ("classifier", "classifier_free")]
    whole = guided(networks["model"], guides, sampler=sampler)
    assert whole.calls(levels) == {"model": len(levels), "classifier_free": inside, "classifier": inside}
    assert counted(networks, chain, whole) == {"network 0": len(levels), "network 1": inside, "classifier": inside}


@pytest.mark.parametrize("name", ["classifier", "classifier_free", "random_label", "threshold", "sag", "pag"])
def test_recorded_steps_make_the_same_images(
    networks: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recordings, where an interval has steps on both of its sides; each is replayed with the batch's own labels."""
    scale = SCALES[name] if name == "threshold" else gd.interval(2.0, 0.2, 2.0)
    model = networks["real" if name in IN_ATTENTION else "model"]
    options: dict[str, Any] = {
        "labels": [1, 3, 0],
        "sampler": "unipc",
        "steps": 6,
        "guidance": guide(name, networks, scale),
    }
    plain = gd.sample(model, batch_size=2, cuda_graphs=False, **options)
    monkeypatch.setattr(execution, "Graphed", partial(execution.Graphed, record=again))
    assert np.abs(gd.sample(model, batch_size=2, cuda_graphs=True, **options).astype(int) - plain).max() <= 1


@pytest.mark.parametrize("name", ["classifier", "classifier_free", "random_label", "epsilon_scaling", "threshold"])
def test_a_guided_step_compiles_as_one_graph(networks: dict[str, Any], name: str) -> None:
    whole, chain = guided(networks["model"], guide(name, networks)), chain_of(networks, "unipc", steps=6)
    make = partial(whole.on(chain.process), whole.scales(1.0))
    cond = {"y": torch.tensor([1, 3]), "y_random": torch.tensor([0, 2])}
    x, i = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 3])
    found = execution.Compiled(make, backend="aot_eager")(cond)(x, i)  # raises where there is a graph break
    torch.testing.assert_close(found.x0, make(cond)(x, i).x0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["classifier", "classifier_free", "random_label", "threshold", "sag", "pag"])
def test_recorded_steps_on_a_gpu(name: str) -> None:
    plain = {**BASE, "class_cond": False, "num_classes": 0}
    kinds = {"model": ("diffusion", BASE), "classifier": ("classifier", CRITIC), "plain": ("diffusion", plain)}
    found = {key: filled(*kind) for key, kind in kinds.items()}
    on_gpu = {key: replace(each, net=each.net.cuda(), process=each.process.to("cuda")) for key, each in found.items()}
    scale = SCALES[name] if name == "threshold" else gd.interval(2.0, 0.2, 2.0)
    guides = gd.Guidance(name, scale, on_gpu["plain"]) if name == "classifier_free" else guide(name, on_gpu, scale)
    for sampler in ("unipc", "sde_dpm_solver"):
        options: dict[str, Any] = {"labels": [1, 3, 0], "sampler": sampler, "steps": 6, "guidance": guides}
        eager, recorded = (
            gd.sample(on_gpu["model"], batch_size=2, cuda_graphs=graphs, **options) for graphs in (False, True)
        )
        assert eager.std() > 5 and np.abs(eager.astype(int) - recorded).mean() < 1


def test_guided_ddim_from_pure_noise_is_warned_of(networks: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Of a cosine schedule's first steps, where what clipping came before throws x0 far out."""
    cosine = networks["plain"]
    critic = replace(networks["classifier"], config=filled("classifier", {**CRITIC, "noise_schedule": "cosine"}).config)
    towards = gd.classifier(critic)
    for options in (
        {"clip": "after"},
        {"sampler": "unipc"},
        {"sampler": "ancestral"},
        {"sigma_max": 164.0, "grid": "respaced"},
    ):
        gd.make_pipeline(cosine, guidance=towards, **{"sampler": "ddim", "steps": 5, **options})
    assert "DDIM ends far from images" not in caplog.text
    gd.make_pipeline(cosine, guidance=towards, sampler="ddim", steps=5)
    assert "DDIM ends far from images" in caplog.text


def test_an_interval_without_steps_is_named(networks: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    whole = guided(networks["model"], guide("classifier", networks, gd.interval(2.0, 900.0, 1000.0)))
    pipeline_of(whole, make_chain(networks["model"].process, "ddim", steps=5))
    assert "classifier is never applied" in caplog.text and "the levels go from" in caplog.text


@pytest.mark.parametrize("sampler", [name for name, kind in SAMPLERS.items() if kind.noise])
def test_image_i_is_the_same_in_any_batch(networks: dict[str, Any], sampler: str) -> None:
    options: dict[str, Any] = {"sampler": sampler, "steps": 5, "labels": [1, 3, 0, 2, 1], "cuda_graphs": False}
    options |= {"churn": 3.0} if "churn" in SAMPLERS[sampler].options else OPTIONS.get(sampler, {})
    options |= {"guidance": guide("random_label", networks, gd.interval(1.5, 0.3, 1.0))}
    five, one = (gd.sample(networks["model"], batch_size=size, **options) for size in (5, 1))
    assert np.abs(five.astype(int) - one).max() <= 1


MISTAKES = [
    ({"sampler": "unipc", "churn": 3.0}, "--churn is of heun and euler; --sampler unipc has none"),
    ({"sampler": "unipc", "eta": 1.0}, "--eta is of .*; --sampler unipc has none"),
    ({"sampler": "heun", "order": 2}, "--order is of .*; --sampler heun has none"),
    ({"sampler": "ddim", "rho": 5.0}, "--rho is of --grid karras, and the grid here is respaced"),
    ({"sampler": "unipc", "order": 3, "steps": 2}, "order.3 needs at least 3 nodes"),
    ({"sampler": "unipc", "order": 2.0}, "order=2.0 must be a whole number"),
    ({"sampler": "dpm_solver", "exact": True}, "exact"),
    ({"steps": 1}, "at least 2"),
    ({"steps": 0}, "at least 2"),
    ({"guidance": gd.Guidance("epsilon_scaling", -1.0)}, "must be above 0"),
    ({"grid": "log"}, "grid is 'log'; it must be one of respaced"),
    ({"sampler": "unipc", "sigma_min": 9.0, "sigma_max": 2.0}, "sigma_min"),
    ({"clip": "before", "guidance": gd.threshold()}, "exclude each other"),
    ({"clip": "late"}, "clip is 'late'; it must be one of before, after, none"),
    ({"guidance": [gd.threshold(), gd.Guidance("clip")]}, "exclude each other"),
    ({"guidance": gd.Guidance("autoguidance", 2.0, abs)}, "its network is a builtin_function.*; give a loaded one, as"),
    ({"guidance": gd.Guidance("classifier", 2.0, "a/path")}, "classifier: its network is a str; give a loaded one"),
    ({"guidance": gd.Guidance("autoguidance", 2.0)}, "needs a weaker network; give --guide_path"),
    ({"guidance": gd.Guidance("classifier_free", 2.0)}, "has no label for no class; give --guide_path"),
    ({"guidance": gd.Guidance("classifier", 2.0)}, "needs a classifier; give --classifier_path"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=str)
def test_mistakes_are_named(networks: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(networks["model"], **{"steps": 5, **options})


def test_a_scale_that_does_nothing_takes_labels(networks: dict[str, Any]) -> None:
    """So that a program may go through scales from 0 on."""
    flags = filled("diffusion", {**BASE, "class_cond": False, "num_classes": 0}).config
    plain, off = replace(networks["plain"], config=flags), gd.classifier(networks["classifier"], scale=0.0)
    none = gd.sample(plain, num_images=2, steps=4)
    assert (gd.sample(plain, labels=[1, 3], steps=4, guidance=off) == none).all()


def test_what_is_clipped_before_guidance(networks: dict[str, Any]) -> None:
    """As published, and nothing else; without guidance there is no difference."""
    of_clean = gd.Guidance("classifier_x0", 1.0, networks["classifier"].net)
    for sampler, bounds in {"ancestral": "bbba", "ddim": "bbaa", "unipc": "baaa", "fast": "baaa"}.items():
        for guide_, bound in zip(
            ([], guide("classifier", networks), of_clean, guide("random_label", networks)), bounds
        ):
            assert guided(networks["model"], guide_, sampler=sampler).bound[0] == bound


def test_second_networks_are_checked(networks: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="both are class-conditional; give one of each"):
        guided(networks["model"], gd.Guidance("classifier_free", 2.0, networks["model"]))
    with pytest.raises(ValueError, match="is unconditional; give --guide_path to a class-conditional file"):
        guided(networks["plain"], gd.Guidance("random_label", 2.0))
    larger = replace(
        networks["plain"],
        config=filled("diffusion", {**BASE, "image_size": 16, "class_cond": False, "num_classes": 0}).config,
    )
    with pytest.raises(ValueError, match=r"differ in image size \(8, 8\) and \(16, 16\)"):
        guided(networks["model"], gd.Guidance("classifier_free", 2.0, larger))
    # Of a pair, the network with classes is the guided one, whichever is given first.
    assert guided(networks["plain"], gd.Guidance("classifier_free", 2.0, networks["model"])).model is networks["model"]


def test_a_second_network_of_another_schedule_is_told_its_own_times(networks: dict[str, Any]) -> None:
    model, other = networks["model"], networks["plain"]  # linear, cosine
    told: list[tuple[float, float]] = []
    chain = make_chain(model.process, "unipc", steps=6, grid="log_snr", options={"sigma_max": 2.0, "sigma_min": 0.2})

    class Listening(Tiny):
        def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
            told.append(float(time[0]))  # type: ignore[arg-type]
            return super().forward(x, time, y)

    second = replace(other, net=Listening(5))
    counted(networks, chain, guided(model, gd.Guidance("classifier_free", 2.0, second)))
    log_snr = other.process.log_snr.double().numpy()
    expected = np.interp(-2 * chain.grid.lam, -log_snr, np.arange(len(log_snr)))
    np.testing.assert_allclose(told, expected * 1.0, atol=2e-3)
