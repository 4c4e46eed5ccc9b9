"""The way from images to a report, with a cheap stand-in for the network."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations import compare, metrics, plots, report
from evaluations.encoders import CallableEncoder, Encoder, make_encoder
from evaluations.features import World
from evaluations.scoring import Settings, evaluate

RNG = np.random.default_rng(0)
REFERENCE = RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
SAMPLES = np.clip(RNG.integers(0, 256, (50, 8, 8, 3)) * 0.9 + 20, 0, 255).astype(np.uint8)
LABELS = np.arange(50) % 3
PLAIN = Settings(progress=False, device="cpu")
ALL = Settings(
    progress=False, device="cpu", errors=True, kid=True, density_coverage=True, fid_infinity=True, per_class=True
)


def corners(images: torch.Tensor) -> torch.Tensor:
    """Six features per image."""
    return torch.cat([images[:, :4].float().mean((1, 2)), images[:, 4:].float().mean((1, 2))], 1) / 50


@pytest.fixture
def encoder() -> Encoder:
    return CallableEncoder("corners", corners, {"weights_sha256": "0" * 64})


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    np.savez(tmp_path / "ref.npz", REFERENCE, np.arange(60) % 3)
    np.savez(tmp_path / "smp.npz", SAMPLES, LABELS)
    return str(tmp_path / "ref.npz"), str(tmp_path / "smp.npz")


@pytest.mark.filterwarnings("ignore:precision and recall rest")
def test_every_metric_is_there(files: tuple[str, str], encoder: Encoder) -> None:
    found = evaluate(files[0], files[1], ALL, encoder=encoder)
    one = found.sets[0]
    names = [score.name for score in one.scores]
    assert names == ["FD corners", "Precision", "Recall", "Density", "Coverage", "KID"]
    assert all(math.isfinite(score.value) and score.error > 0 and score.method for score in one.scores)
    x, y = (corners(torch.from_numpy(images)).numpy() for images in (SAMPLES, REFERENCE))
    assert one.score("FD corners").value == metrics.frechet_distance_of_features(x, y)
    assert one.fid_infinity.counts[-1] == 50 and one.fid_infinity.error > one.score("FD corners").error
    lines = report.extra_lines(one)
    assert sum(line.startswith("FD corners infinity") for line in lines) == 2
    assert not any("FID" in line for line in lines)  # other features never pass for FID
    assert [row.label for row in one.per_class] == [0, 1, 2]
    assert sum(row.samples for row in one.per_class) == 50
    total = sum(row.precision * row.samples for row in one.per_class) / 50
    assert total == pytest.approx(one.score("Precision").value)
    assert all(row.fid > 0 and row.references == 20 for row in one.per_class)


@pytest.mark.filterwarnings("ignore:precision and recall rest")
def test_receipt_holds_identity_and_json_is_strict(files: tuple[str, str], encoder: Encoder, tmp_path: Path) -> None:
    found = evaluate(files[0], files[1], PLAIN, encoder=encoder)
    found.write(tmp_path / "a.json")
    loaded = report.read_report(tmp_path / "a.json")
    assert loaded["reference"]["sha256"] != loaded["sets"][0]["samples"]["sha256"]
    assert loaded["sets"][0]["samples"]["count"] == 50 and loaded["sets"][0]["samples"]["shape"] == [8, 8, 3]
    assert loaded["encoder"]["weights_sha256"] == "0" * 64
    assert {"python", "torch", "numpy", "device"} <= set(loaded["versions"])
    assert loaded["settings"]["k"] == 3 and "<=" in loaded["settings"]["neighbours"]
    assert any("60 reference images" in text for text in loaded["warnings"])
    assert report.classic_lines(found.sets[0])[0].startswith("Precision: ")


@pytest.mark.filterwarnings("ignore:precision and recall rest")
def test_several_sets_are_compared(files: tuple[str, str], encoder: Encoder, tmp_path: Path) -> None:
    found = evaluate(
        files[0],
        [SAMPLES, SAMPLES[:, ::-1].copy(), SAMPLES[:40]],
        Settings(progress=False, errors=True),
        encoder=encoder,
    )
    assert len(found.sets) == 3 and len(found.differences) == 3 * 3
    assert [d.paired for d in found.differences if d.score == "FD corners"] == [True, False, False]
    assert all(d.paired for d in found.differences if d.score == "Recall")  # by groups of samples
    lines = report.difference_lines(found.differences)
    assert "standard errors" in lines[0] and "matched by position" in lines[0]
    plots.draw(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.filterwarnings("ignore:precision and recall rest")
def test_reading_order_of_the_sources_and_of_images_does_not_matter(encoder: Encoder) -> None:
    scores = [
        {s.name: s.value for s in evaluate(REFERENCE[order], SAMPLES, PLAIN, encoder=encoder).sets[0].scores}
        for order in (np.arange(60), RNG.permutation(60))
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-10)
    batched = evaluate(REFERENCE, (SAMPLES[i : i + 7] for i in range(0, 50, 7)), PLAIN, encoder=encoder)
    assert {s.name: s.value for s in batched.sets[0].scores} == scores[0]


def test_only_the_first_process_reports(files: tuple[str, str], encoder: Encoder) -> None:
    assert evaluate(files[0], files[1], PLAIN, encoder=encoder, world=World(1, 2, 1)) is None


@pytest.mark.filterwarnings("ignore:precision and recall rest", "ignore:FD corners", "ignore:array in memory has no")
def test_what_is_doubtful_is_said(encoder: Encoder) -> None:
    with pytest.warns(UserWarning, match="at least 4 images"):
        found = evaluate(REFERENCE, SAMPLES[:3], Settings(progress=False, per_class=True), encoder=encoder)
    assert math.isnan(found.sets[0].score("Precision").value)
    assert json.loads(found.to_json())["sets"][0]["scores"][1]["value"] is None
    assert any("no labels" in text for text in found.warnings)
    encoder.weight = torch.randn(5, 6)
    with pytest.warns(UserWarning, match="sorted by class"):
        source = ((SAMPLES[i : i + 25], np.full(25, i)) for i in (0, 25))
        found = evaluate(REFERENCE, source, replace(PLAIN, split_size=20), encoder=encoder)
    assert found.sets[0].score("Inception Score").value >= 1
    source = ((SAMPLES[i : i + 25], np.full(25, i)) for i in (0, 25))
    found = evaluate(REFERENCE, source, PLAIN, encoder=encoder)  # one split: order has no effect on it
    assert not any("sorted" in text for text in found.warnings)


@pytest.mark.filterwarnings("ignore:precision and recall rest")
def test_a_conversion_is_told_on_the_spot(encoder: Encoder) -> None:
    with pytest.warns(UserWarning, match=r"array in memory: float32 images in \[0, 1\]: taken as round"):
        found = evaluate(REFERENCE, SAMPLES.astype(np.float32) / 255, PLAIN, encoder=encoder)
    assert found.warnings and found.sets[0].samples.notes


def test_features_and_counts_without_a_score() -> None:
    broken = CallableEncoder("broken", lambda images: images.float().mean((1, 2)) / 0)
    with pytest.raises(ValueError, match="array in memory: features hold values that are not finite"):
        evaluate(REFERENCE, SAMPLES, PLAIN, encoder=broken)
    with pytest.raises(ValueError, match="holds 1 images; scores need at least 2"):
        evaluate(REFERENCE, SAMPLES[:1], PLAIN, encoder=CallableEncoder("corners", corners))


def test_features_made_elsewhere(tmp_path: Path) -> None:
    x, y = RNG.standard_normal((40, 5)).astype(np.float32), RNG.standard_normal((45, 5)).astype(np.float32)
    np.savez(tmp_path / "x.npz", features=x)
    np.savez(tmp_path / "y.npz", y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(str(tmp_path / "y.npz"), str(tmp_path / "x.npz"), Settings(features="npz"))
    assert found.sets[0].score("FD npz").value == metrics.frechet_distance_of_features(x, y)
    np.savez(tmp_path / "bad.npz", np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="expected a float matrix"):
        evaluate(str(tmp_path / "bad.npz"), str(tmp_path / "x.npz"), Settings(features="npz"))
    np.savez(tmp_path / "bad.npz", features=x, arr_1=np.arange(39))
    with pytest.raises(ValueError, match=r"arr_1 in .* has shape \(39,\) .* each of the 40 rows"):
        evaluate(str(tmp_path / "y.npz"), str(tmp_path / "bad.npz"), Settings(features="npz"))
    (tmp_path / "bad.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="cut off or damaged"):
        evaluate(str(tmp_path / "y.npz"), str(tmp_path / "bad.npz"), Settings(features="npz"))


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pr_dtype is 'float8', allowed are float16, float32, float64"):
        Settings(pr_dtype="float8")
    with pytest.raises(ValueError, match="k is 0"):
        Settings(k=0)
    with pytest.raises(ValueError, match="features is 'resnet', allowed are inception, npz, dinov2:FOLDER"):
        make_encoder(Settings(features="resnet"), torch.device("cpu"))
    with pytest.raises(ValueError, match="has no config.json"):
        make_encoder(Settings(features=f"dinov2:{tmp_path}"), torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:precision and recall rest")
def test_compare_names_the_first_difference(
    files: tuple[str, str], encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    evaluate(files[0], files[1], Settings(progress=False, errors=True), encoder=encoder).write(paths[0])
    evaluate(files[0], SAMPLES[:40], Settings(progress=False, k=5, errors=True), encoder=encoder).write(paths[1])
    evaluate(files[0], files[1], Settings(progress=False, batch_size=7), encoder=encoder).write(paths[2])
    assert compare.main(paths[:2]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[2] == "first difference: number of samples: A 50, B 40 (FID falls as about 1/N; 50,000 is the custom)"
    assert any(line.startswith("also: k: A 3, B 5") for line in told)
    assert any(line.startswith("FD corners: A ") and "+-" in line for line in told)
    assert compare.main([paths[0], paths[2]]) == 0
    assert "nothing that bears on a score differs" in capsys.readouterr().out
    for text in ("{}", "[]", '{"format": 1, "sets": [1]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="no report of this evaluator"):
            report.read_report(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot be read"):
        report.read_report(tmp_path / "absent.json")


def test_class_table_shows_the_worst_first() -> None:
    rows = [report.ClassScores(label, 10, None, precision, 1.0) for label, precision in ((0, 0.9), (1, 0.2))]
    lines = report.class_table(rows)
    assert lines[1].split() == ["1", "10", "-", "0.2000", "-", "1.0000", "-", "-"]
    assert [line.split()[0] for line in lines] == ["class", "1", "0"]
