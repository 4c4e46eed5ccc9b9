"""A published figure end to end, with stand-ins: small twins of the networks, synthetic Inception weights, a tiny reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import filled

import guided_diffusion as gd
from evaluations.selftest import synthetic_network
from guided_diffusion.cli import reproduce
from guided_diffusion.cli.main import main
from guided_diffusion.cli.sample import Sampling
from guided_diffusion.sampling.chains import make_chain
from guided_diffusion.weights.later import LATER
from guided_diffusion.weights.released import PRESETS

SMALL = {
    "image_size": 16, "num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "8", "num_res_blocks": 1,
    "num_head_channels": 16, "learn_sigma": True, "class_cond": True, "num_classes": 10, "noise_schedule": "linear",
}  # fmt: skip
CRITIC = {
    "image_size": 16, "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "8",
    "classifier_channel_mult": "1,2", "classifier_num_head_channels": 16, "num_classes": 10,
}  # fmt: skip


def test_every_published_figure_has_a_name() -> None:
    known = reproduce.targets()
    recipe = {name: recipe for name, (_, recipe) in known.items()}
    assert recipe["imagenet256-guided"].expected.fid == 4.59  # type: ignore[union-attr]
    assert recipe["imagenet256-guided-ddim25"].use_ddim
    assert recipe["imagenet128-unguided"].scale == 0
    assert recipe["lsun-bedroom-sweep"].respacing == "90,60,60,20,20"
    later = {name for name, each in LATER.items() if each.flags}
    assert len(known) == sum(len(preset.recipes) for preset in PRESETS.values()) + len(later) and later < set(known)


def test_every_result_of_two_stages_has_a_name() -> None:
    """Table 6 of the paper."""
    stacks = {name: recipe for name, (_, recipe) in reproduce.targets().items() if "stack" in name}
    assert {name: recipe.expected.fid for name, recipe in stacks.items() if recipe.expected} == {
        "imagenet256-stack-guided": 3.94,
        "imagenet256-stack-unguided": 7.49,
        "imagenet512-stack-guided": 3.85,
        "imagenet512-stack-unguided": 9.96,
        "imagenet512-stack-guided-250-ddim25": 4.11,
        "imagenet512-stack-guided-ddim25-ddim25": 5.96,
    }
    for recipe in stacks.values():
        assert recipe.scale == 0 and recipe.base is not None  # only the base is guided
        # The base as in its own row of the paper.
        alone = [
            r
            for r in PRESETS[recipe.small].recipes
            if (r.respacing, r.scale) == (recipe.base.respacing, recipe.base.scale)
        ]
        assert [r.use_ddim for r in alone] == [recipe.base.use_ddim]


@pytest.mark.parametrize("name", [name for name, later in LATER.items() if later.flags])
def test_flags_of_later_figures_are_those_of_sample(name: str) -> None:
    options = Sampling.of(Sampling.flags(LATER[name].flags.split(), "sample"))
    process = gd.build_process(PRESETS[LATER[name].model].diffusion)
    respacing = options.typed.get("timestep_respacing", "")
    respaced = gd.respace(process, gd.space_timesteps(1000, respacing)) if respacing else process
    chosen = {"steps": options.steps or None, "grid": options.grid or None, "options": options.chain_options}
    levels = make_chain(respaced, options.method, **chosen).levels()
    steps = options.steps or int(respacing)
    assert len(levels) == (2 * steps - 1 if options.sampler == "heun" else steps)
    # What the entry says of its calls: 250 of SAG are 500.
    calls = LATER[name].cost.split()[0]
    assert not calls.isdigit() or int(calls) == steps * (2 if "sag" in options.guidance else 1)


def test_a_later_figure_is_made_by_its_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gd.save(filled("diffusion", SMALL), str(tmp_path / "model"))
    gd.save(filled("classifier", CRITIC), str(tmp_path / "critic"))
    words = "--num_samples 2 --batch_size 2 --precision fp32 --device cpu".split()
    words += [f"--model_path={tmp_path}/model", f"--classifier_path={tmp_path}/critic"]
    for name, sampler, guides in (
        ("imagenet256-dpm-solver20", "dpm_solver", {"classifier": 8.0, "threshold": 0.995}),
        ("imagenet64-epsilon20", "ancestral", {"epsilon_scaling": 1.0041}),
    ):
        assert main(["reproduce", name, *words, f"--out={tmp_path}/{name}"]) == 0
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        made = manifest["sampling"]["sampling.json"]["settings"]
        assert (made["sampler"], made["steps"]) == (sampler, 20)
        assert {guide["name"]: guide["scale"] for guide in made["guidance"]} == guides
        assert (manifest["source"], manifest["caveat"]) == (LATER[name].source, LATER[name].caveat)


def test_two_stages_run_one_after_the_other(tmp_path: Path) -> None:
    gd.save(filled("diffusion", {**SMALL, "image_size": 8}), str(tmp_path / "model"))
    gd.save(
        filled("classifier", {**CRITIC, "image_size": 8, "classifier_attention_resolutions": "4"}),
        str(tmp_path / "critic"),
    )
    large = {name: value for name, value in SMALL.items() if name != "image_size"}
    gd.save(filled("super_resolution", {**large, "large_size": 16, "small_size": 8}), str(tmp_path / "upsampler"))
    words = "--num_samples 2 --batch_size 2 --precision fp32 --device cpu".split()
    paths = {"out": "out", "model_path": "model", "classifier_path": "critic", "upsampler_path": "upsampler"}
    words += [f"--{flag}={tmp_path / name}" for flag, name in paths.items()]
    assert main(["reproduce", "imagenet512-stack-guided-ddim25-ddim25", *words]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    base, second = (manifest["sampling"][f"{stage}/sampling.json"]["settings"] for stage in ("base", "upsampled"))
    assert [(guide["name"], guide["scale"]) for guide in base["guidance"]] == [("classifier", 1.25)]
    assert (base["sampler"], base["steps"]) == (second["sampler"], second["steps"]) == ("ddim", 25)
    assert second["guidance"] == []
    with np.load(tmp_path / "out" / "upsampled" / "samples_2x16x16x3.npz") as found:
        assert found["arr_0"].shape == (2, 16, 16, 3) and found["arr_1"].shape == (2,)


def test_unknown_names_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "cifar"]) == 2
    assert "no published figure called 'cifar'; there are imagenet64-unguided" in capsys.readouterr().err


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the published layout, numbers from a seed."""
    path = tmp_path_factory.mktemp("inception") / "synthetic.pth"
    torch.save(synthetic_network().state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:scores rest on unknown")
def test_from_weights_to_the_score(inception: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gd.save(filled("diffusion", SMALL), str(tmp_path / "model"))
    gd.save(filled("classifier", CRITIC), str(tmp_path / "critic"))
    images = np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "ref.npz", images)
    words = (
        f"--num_samples 6 --batch_size 6 --reference {tmp_path}/ref.npz --out {tmp_path}/out --model_path {tmp_path}/model "
        f"--classifier_path {tmp_path}/critic --inception {inception} --allow_other_weights --precision fp32 --device cpu"
    )
    assert main(["reproduce", "imagenet256-guided-ddim25", *words.split()]) == 0
    told = capsys.readouterr().out
    assert "published" in told and "5.4400" in told

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    rows = {row["metric"]: row for row in manifest["comparison"]}
    assert {name: row["published"] for name, row in rows.items()} == {
        "fid": 5.44, "sfid": 5.32, "precision": 0.81, "recall": 0.49,
    }  # fmt: skip
    assert manifest["source"] in told and not manifest["caveat"]
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    scores = {score["name"]: score["value"] for score in report["sets"][0]["scores"]}
    assert rows["fid"]["measured"] == scores["FID"] and rows["recall"]["measured"] == scores["Recall"]
    assert rows["sfid"]["measured"] == scores["sFID"] and np.isfinite(scores["sFID"])

    settings = manifest["sampling"]["sampling.json"]["settings"]
    assert settings["sampler"] == "ddim" and settings["steps"] == 25 and settings["guidance"][0]["scale"] == 2.5
    critic = settings["guidance"][0]["network"]
    assert settings["seed"] == 0 and len(settings["model"]["sha256"]) == len(critic["sha256"]) == 64
    assert {"flags", "label_draw", "quantisation", "samples_sha256", "versions", "hardware"} <= set(manifest)
    assert manifest["evaluation"]["reference"]["sha256"]
    with np.load(tmp_path / "out" / "samples_6x16x16x3.npz") as found:
        assert found["arr_1"].shape == (6,)


def test_without_a_reference_images_are_made_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gd.save(filled("diffusion", SMALL), str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    words = ["--num_samples", "2", "--batch_size", "2", "--model_path", "model", "--device", "cpu"]
    assert main(["reproduce", "imagenet256-unguided", *words]) == 0
    assert "not scored: no --reference was given" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "runs/reproduce/imagenet256-unguided/manifest.json").read_text())
    assert "comparison" not in manifest and manifest["recipe"] == "imagenet256-unguided"
    assert torch.__version__ == manifest["versions"]["torch"]
