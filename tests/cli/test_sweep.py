"""`sweep`: each setting is what `sample` makes, scores are the evaluator's; what cannot be made is refused before anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import BASE, CRITIC, filled
from PIL import Image

import guided_diffusion as gd
from evaluations import scoring
from evaluations.encoders import CallableEncoder
from evaluations.metrics import frechet_distance_of_features
from evaluations.neighbours import neighbours
from guided_diffusion.cli.main import main
from guided_diffusion.runtime.streams import EVALUATE, Streams
from guided_diffusion.sampling import queue
from guided_diffusion.sampling.features import classifier_features, read_images

SETTINGS = ["ddim-3-scale_0", "ddim-3-scale_2", "heun-3-scale_0", "heun-3-scale_2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    gd.save(filled("diffusion", BASE), str(root / "base"))
    gd.save(filled("classifier", CRITIC), str(root / "critic"))
    return root


def words(models: Path, out: Path, *more: object, samplers: str = "ddim,heun", steps: str = "3") -> list[str]:
    networks = f"--model_path {models}/base --classifier_path {models}/critic --samplers {samplers} --steps {steps}"
    return f"sweep {networks} --scales 0,2 --num_samples 5 --batch_size 4 --device cpu --out {out}".split() + [
        *map(str, more)
    ]


def images_of(folder: Path) -> Any:
    with np.load(next(folder.glob("samples_*.npz"))) as held:
        return held["arr_0"], held["arr_1"]


def test_settings_are_what_sample_makes_and_scores_are_the_evaluators(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(words(models, out, "--data_dir", photos)) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == SETTINGS
    alone = f"--model_path {models}/base --classifier_path {models}/critic --classifier_scale 2 --sampler heun"
    alone += f" --steps 3 --num_samples 5 --batch_size 4 --device cpu --out {tmp_path}/alone"
    assert main(["sample", *alone.split()]) == 0
    receipts = [
        json.loads((folder / "sampling.json").read_text()) for folder in (out / SETTINGS[3], tmp_path / "alone")
    ]
    assert receipts[0]["settings"] == receipts[1]["settings"]
    for one, two in zip(images_of(out / SETTINGS[3]), images_of(tmp_path / "alone")):
        np.testing.assert_array_equal(one, two)

    rows = json.loads((out / "sweep.json").read_text())["settings"]
    assert [(row["name"], row["calls"], row["classifier_calls"]) for row in rows] == list(
        zip(SETTINGS, (3, 3, 5, 5), (0, 3, 0, 5))
    )
    critic = gd.load(str(models / "critic"), kind="classifier")
    real, _ = classifier_features(critic, read_images(str(photos), critic, 4)[0])
    for row in rows:
        images, labels = images_of(out / row["name"])
        made, predicted = classifier_features(critic, [images])
        near, scores = neighbours(made, real), {name: score["value"] for name, score in row["scores"].items()}
        assert scores["FD"] == pytest.approx(frechet_distance_of_features(made, real), rel=1e-5)
        assert (scores["Precision"], scores["Recall"]) == (near.precision, near.recall)
        assert scores["Accuracy"] == (predicted == labels).mean()
        assert all(score["error"] >= 0 for score in row["scores"].values())
        assert row["seconds_per_image"] > 0 and row["name"].split("-")[0] in printed
    assert "FD is FID-like" in printed
    # Ten columns or as many as there are images, a line of picture and of text for each setting.
    assert Image.open(out / "pictures.png").size == (5 * 66 + 2, 4 * 78 + 2)


def test_scales_are_those_of_whatever_guides(models: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", f"sweep --model_path {models}/base --guidance random_label --steps 3 --scales 1,2.5"
    assert main([*words.split(), "--num_samples", "2", "--device", "cpu", "--out", str(out)]) == 0
    scales = [
        json.loads((out / f"ddim-3-scale_{name}" / "sampling.json").read_text())["settings"] for name in ("1", "2.5")
    ]
    assert [[guide["scale"] for guide in each["guidance"]] for each in scales] == [[], [2.5]]
    rows = json.loads((out / "sweep.json").read_text())["settings"]
    assert [(row["calls"], row["classifier_calls"]) for row in rows] == [(3, 0), (6, 0)]


def test_a_killed_sweep_goes_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(words(models, whole)) == 0
    batches, draw = [], queue.draw

    def drawn(*args: Any, **kwargs: Any) -> Any:
        if len(batches) == 3 and not resumed:
            raise KeyboardInterrupt
        batches.append(1)
        return draw(*args, **kwargs)

    resumed = False
    monkeypatch.setattr(queue, "draw", drawn)
    assert main(words(models, killed)) == 130
    first = json.loads((killed / "sweep.json").read_text())["settings"][0]
    resumed = True
    assert main(words(models, killed)) == 0
    assert len(batches) == 8  # two for each of four settings
    assert json.loads((killed / "sweep.json").read_text())["settings"][0] == first
    for name in SETTINGS:
        for one, two in zip(images_of(whole / name), images_of(killed / name)):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"samplers": "ddim,hein"}, "'hein'"),
        ({"steps": "3,2000"}, "ddim-2000-scale_0: "),
        ({"steps": "2.5"}, "--steps has 2.5; it must be whole numbers"),
        ({"more": ["--scales", "1,x"]}, "--scales is '1,x'"),
        ({"more": ["--classifier_scale", "1"]}, "--classifier_scale is one for all images; for a sweep give --scales"),
        ({"samplers": "heun,ddim", "more": ["--eta", "0.5"]}, "heun-3-scale_0: --eta is of ddim"),
        ({"more": ["--classifier_path", ""]}, "--scales is '0,2', but nothing guides"),
        ({"more": ["--classifier_path", "", "--scales", "0", "--data_dir", "x"]}, "--data_dir is 'x'"),
    ],
)
def test_all_settings_are_checked_first(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], told: str
) -> None:
    out = tmp_path / "out"
    assert main(words(models, out, *more.pop("more", ()), **more)) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_against_a_reference_the_evaluator_scores(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = CallableEncoder("toy", lambda images: images.float().mean(dim=(1, 2)))
    monkeypatch.setattr(scoring, "make_encoder", lambda settings, device: encoder)
    np.savez(tmp_path / "ref.npz", np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8))
    out = tmp_path / "out"
    assert main(words(models, out, "--reference", tmp_path / "ref.npz", samplers="ddim")) == 0
    report = json.loads((out / "evaluation.json").read_text())
    for row, one in zip(json.loads((out / "sweep.json").read_text())["settings"], report["sets"], strict=True):
        alone = scoring.evaluate(str(tmp_path / "ref.npz"), row["samples"], scoring.Settings(errors=True))
        assert alone is not None
        assert row["scores"] == {
            score.name: {"value": score.value, "error": score.error} for score in alone.sets[0].scores
        }
        assert one["samples"]["sha256"] == alone.sets[0].samples.sha256
    assert "FD toy" in capsys.readouterr().out


def test_without_anything_to_score_by_this_is_said(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"sweep --model_path {models}/base --samplers ancestral --steps 2 --num_samples 2 --device cpu --out {tmp_path}/out"
    assert main(line.split()) == 0
    assert "not scored: give --reference" in capsys.readouterr().out
    (tmp_path / "out" / "sweep.json").write_text("{cut")
    assert main(line.split()) == 2
    assert "sweep.json is not the file of a sweep" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["ancestral-2-scale_0"]


def test_noise_levels_of_a_linear_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two classes, bright and dark; log p has a gradient in closed form."""
    from dataclasses import replace

    from guided_diffusion.sampling import noise_levels

    class Linear(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.sum(dim=(1, 2, 3)), -x.sum(dim=(1, 2, 3))], dim=1)

    for k in range(20):
        folder = tmp_path / "data" / ("bright", "dark")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), (150, 105)[k % 2], np.uint8)).save(folder / f"{k}.png")
    critic = filled("classifier", {**CRITIC, "num_classes": 2})
    levels = noise_levels.measure(replace(critic, net=Linear()), str(tmp_path / "data"), levels=6, seed=3)
    steps = np.diff(np.log([level.sigma for level in levels]))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)  # even in log-SNR
    # In the order of the folders: ten bright images, ten dark ones.
    sides = np.repeat([1, -1], 10)
    streams = Streams(3, EVALUATE, ids=range(20))
    for k, level in enumerate(levels):
        alpha, sigma = 1 / np.sqrt(1 + level.sigma**2), level.sigma / np.sqrt(1 + level.sigma**2)
        noise = streams.noise(torch.empty(20, 3, 8, 8), k).double().sum(dim=(1, 2, 3)).numpy()
        towards = sides * (alpha * 192 * np.where(sides > 0, 150 / 127.5 - 1, 105 / 127.5 - 1) + sigma * noise)
        assert level.accuracy == (towards > 0).mean()
        # log p = log sigmoid(2 s), of which the gradient with respect to each of 192 numbers is 2 / (1 + e^(2 s)).
        norms = 2 * np.sqrt(192) / (1 + np.exp(2 * towards))
        assert level.gradient == pytest.approx(norms.mean(), rel=1e-4, abs=1e-6)
        assert level.gradient_error == pytest.approx(norms.std(ddof=1) / np.sqrt(20), rel=1e-4, abs=1e-6)
        assert level.shift == pytest.approx(sigma * norms.mean() / np.sqrt(192), rel=1e-4, abs=1e-6)
    assert levels[0].accuracy < 1 == levels[-1].accuracy

    gd.save(critic, str(tmp_path / "critic"))
    line = (
        f"noise-levels --classifier_path {tmp_path}/critic --data_dir {tmp_path}/data --levels 4 --out {tmp_path}/out"
    )
    assert main([*line.split(), "--device", "cpu"]) == 0
    assert "sigma/alpha" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "noise_levels.json").read_text())["noise_levels"]) == 4
    for wrong, least in (("num_samples", 1), ("levels", 2), ("batch_size", 1)):
        assert main([*line.split(), f"--{wrong}", "0"]) == 2
        assert f"--{wrong} is 0; it must be at least {least}" in capsys.readouterr().err
