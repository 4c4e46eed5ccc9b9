"""The way from images to a report, with a cheap stand-in for the network."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations import compare, inputs, metrics, plots, report, statistics
from evaluations.encoders import CallableEncoder, Encoder, make_encoder
from evaluations.inputs import open_images
from evaluations.scoring import evaluate
from evaluations.settings import Settings
from guided_diffusion.runtime.launchers import Place

pytestmark = pytest.mark.filterwarnings(
    "ignore:precision and recall rest", "ignore:FD corners", "ignore:array in memory has no"
)
RNG = np.random.default_rng(0)
REFERENCE = RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
SAMPLES = np.clip(RNG.integers(0, 256, (50, 8, 8, 3)) * 0.9 + 20, 0, 255).astype(np.uint8)
LABELS = np.arange(50) % 3
PLAIN = Settings(progress=False, device="cpu")
ALL = replace(PLAIN, errors=True, kid=True, density_coverage=True, fid_infinity=True, per_class=True)


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


def test_several_sets_are_compared(files: tuple[str, str], encoder: Encoder, tmp_path: Path) -> None:
    sets = [SAMPLES, SAMPLES[:, ::-1].copy(), SAMPLES[:40]]
    found = evaluate(files[0], sets, replace(PLAIN, errors=True), encoder=encoder)
    assert len(found.sets) == 3 and len(found.differences) == 3 * 3
    assert [d.paired for d in found.differences if d.score == "FD corners"] == [True, False, False]
    assert all(d.paired for d in found.differences if d.score == "Recall")  # by groups of samples
    lines = report.difference_lines(found.differences)
    assert "standard errors" in lines[0] and "matched by position" in lines[0]
    plots.draw(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_reading_order_of_the_sources_and_of_images_does_not_matter(encoder: Encoder) -> None:
    scores = [
        {s.name: s.value for s in evaluate(REFERENCE[order], SAMPLES, PLAIN, encoder=encoder).sets[0].scores}
        for order in (np.arange(60), RNG.permutation(60))
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-10)
    batched = evaluate(REFERENCE, (SAMPLES[i : i + 7] for i in range(0, 50, 7)), PLAIN, encoder=encoder)
    assert {s.name: s.value for s in batched.sets[0].scores} == scores[0]


def test_only_the_first_process_reports(files: tuple[str, str], encoder: Encoder) -> None:
    assert evaluate(files[0], files[1], PLAIN, encoder=encoder, world=Place(1, 2)) is None


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


def test_features_made_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "evaluations")
    monkeypatch.chdir(tmp_path)
    settings = Settings(features="npz")
    x, y = RNG.standard_normal((40, 5)).astype(np.float32), RNG.standard_normal((45, 5)).astype(np.float32)
    np.savez("x.npz", features=x)
    np.savez("y.npz", y)
    found = evaluate("y.npz", "x.npz", settings)
    assert found.sets[0].score("FD npz").value == metrics.frechet_distance_of_features(x, y)
    np.savez("bad.npz", np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="expected a float matrix"):
        evaluate("bad.npz", "x.npz", settings)
    np.savez("bad.npz", features=x, arr_1=np.arange(39))
    with pytest.raises(ValueError, match=r"arr_1 in .* of shape \(39,\) .* each of the 40 .* Scores per class"):
        evaluate("y.npz", "bad.npz", replace(settings, per_class=True))
    for bad, words in (
        (x[:, :4], "holds 4 features of each image and .* 5"),
        (np.where(x == x[3, 2], np.nan, x), "features hold nan"),
        (np.where(x == x[3, 2], -np.inf, x), "features hold inf"),
        (1e60 * x.astype(np.float64), "up to 1e.48"),
        (x[:1], "holds 1 images"),
        (x[:0], "holds 0 images"),
        (np.array([[1.0, 2.0], [3.0]], dtype=object), "pickled"),
    ):
        np.savez("bad.npz", features=bad)
        caplog.clear()
        with pytest.raises(ValueError, match=words):
            evaluate("y.npz", ["x.npz", "bad.npz"], settings)
        assert not caplog.messages  # the second set is looked at before the first is scored
    Path("bad.npz").write_bytes(Path("x.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="cut off or damaged"):
        evaluate("y.npz", "bad.npz", settings)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"features": 1e30 * x, "spectrum": np.zeros(2, complex)},
        lambda x: {"features": x.astype(np.float16), "names": np.array(["a"] * 40)},
        lambda x: {"features": np.repeat(x[:1], 40, 0)},
        lambda x: {"features": x, "arr_1": np.array(["a"] * 40)},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_hostile_features_give_finite_scores_or_an_error(change, tmp_path: Path) -> None:
    rng, paths = np.random.default_rng(0), (tmp_path / "y.npz", tmp_path / "x.npz")
    stored = [change(rng.standard_normal((count, 5)).astype(np.float32)) for count in (45, 40)]
    for path, arrays in zip(paths, stored):
        np.savez(path, **arrays)
    one = evaluate(*paths, replace(ALL, features="npz", per_class=False)).sets[0]
    assert all(math.isfinite(score.value) and math.isfinite(score.error) for score in one.scores)
    y, x = (arrays["features"] for arrays in stored)
    assert one.score("FD npz").value == metrics.frechet_distance_of_features(x, y)
    if "arr_1" in stored[0]:
        with pytest.raises(ValueError, match="arr_1"):
            evaluate(*paths, replace(ALL, features="npz"))


def untouchable(images: torch.Tensor) -> torch.Tensor:
    raise AssertionError("an image was encoded")


@pytest.mark.parametrize("place", ["reference", "first", "last"])
@pytest.mark.parametrize(
    ("store", "settings", "words"),
    [
        (None, PLAIN, "no file or folder"),
        ({"arr_0": SAMPLES[:1]}, PLAIN, "holds 1 images"),
        ({"arr_0": SAMPLES[0]}, PLAIN, "one image"),
        ({"arr_0": SAMPLES[..., 0] > 9}, PLAIN, "truth values"),
        ({"images": SAMPLES}, PLAIN, "missing arr_0"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, PLAIN, "holds no images; corners features"),
        ({"arr_0": SAMPLES, "arr_1": np.array(["cat", "dog"] * 25)}, ALL, "arr_1.*--per_class"),
        ({"arr_0": SAMPLES, "arr_1": np.eye(50)}, ALL, "arr_1.*--per_class"),
        ({"arr_0": SAMPLES, "arr_1": LABELS - 1}, ALL, "label -1.*--per_class"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_told_before_an_image_is_encoded(store, settings, words: str, place: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, SAMPLES, LABELS)
    if store is not None:
        np.savez(bad, **store)
    reference, samples = {"reference": (bad, [good]), "first": (good, [bad, good]), "last": (good, [good, bad])}[place]
    with pytest.raises(ValueError, match=words):
        evaluate(reference, samples, settings, encoder=CallableEncoder("corners", untouchable))


def test_labels_that_no_score_asks_for_change_nothing(encoder: Encoder, tmp_path: Path) -> None:
    encoder.weight = torch.randn(5, 6)
    np.savez(tmp_path / "plain.npz", SAMPLES)
    expected = evaluate(REFERENCE, tmp_path / "plain.npz", PLAIN, encoder=encoder).sets[0].scores
    for labels in (np.eye(50), np.array(["a"] * 50), np.arange(3), np.array([{}] * 50), LABELS - 5):
        np.savez(tmp_path / "x.npz", SAMPLES, labels)
        found = evaluate(REFERENCE, tmp_path / "x.npz", PLAIN, encoder=encoder)
        assert found.sets[0].scores == expected
        assert evaluate(tmp_path / "x.npz", REFERENCE, PLAIN, encoder=encoder).reference.count == 50
        assert evaluate(REFERENCE, iter([(SAMPLES, labels)]), PLAIN, encoder=encoder)
    with pytest.raises(ValueError, match="a batch holds labels of shape .50, 50. .*each of the 50 images"):
        evaluate(REFERENCE, iter([(SAMPLES, np.eye(50))]), ALL, encoder=encoder)


class PretendedInception(CallableEncoder):
    """Under Inception's name, so that precomputed statistics count."""

    def open(self, source):
        return open_images(source)

    def encode(self, images, settings, world):
        found = super().encode(images, settings, world)
        return found._replace(spatial=found.pool[:, :5])


@pytest.mark.filterwarnings("ignore")
def test_a_reference_of_mu_and_sigma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "STATISTICS", {"mu": (6,), "sigma": (6, 6), "mu_s": (5,), "sigma_s": (5, 5)})
    encoder = PretendedInception("inception", corners)
    rows = corners(torch.from_numpy(REFERENCE)).numpy()
    pool, spatial = statistics.from_features(rows), statistics.from_features(rows[:, :5])
    files = {
        "full": {"mu": pool.mu, "sigma": pool.sigma, "mu_s": spatial.mu, "sigma_s": spatial.sigma},
        "two": {"mu": pool.mu, "sigma": pool.sigma},
        "half": {"mu": pool.mu, "sigma": pool.sigma, "mu_s": spatial.mu},
        "float32": {"mu": pool.mu.astype(np.float32), "sigma": pool.sigma.astype(np.float32)},
        "images": {"mu": pool.mu, "sigma": pool.sigma, "arr_0": REFERENCE[:20]},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    right = evaluate(tmp_path / "full.npz", SAMPLES, PLAIN, encoder=encoder)
    distance = right.sets[0].score("FID").value
    made = evaluate(REFERENCE, SAMPLES, PLAIN, encoder=encoder).sets[0]  # from the images behind the statistics
    assert [right.sets[0].score(name).value for name in ("FID", "sFID")] == pytest.approx(
        [made.score(name).value for name in ("FID", "sFID")], rel=1e-9
    )
    for name in ("two", "half", "float32", "images"):
        found = evaluate(tmp_path / f"{name}.npz", SAMPLES, PLAIN, encoder=encoder)
        assert found.sets[0].score("FID").value == pytest.approx(distance, rel=1e-4 if name == "float32" else 1e-12)
        assert found.sets[0].score("sFID") is None and any("sFID is left out" in text for text in found.warnings)
        assert math.isfinite(found.sets[0].score("Precision").value) == (name == "images")
    # As samples: the distance is the same both ways round, and nothing else can be said.
    for name in ("two", "full"):
        back = evaluate(SAMPLES, tmp_path / f"{name}.npz", PLAIN, encoder=encoder)
        assert back.sets[0].score("FID").value == pytest.approx(distance, rel=1e-9)
        assert (back.sets[0].score("sFID") is None) == (name == "two")
        assert any("holds no images" in text for text in back.warnings)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "skew.npz", mu=pool.mu, sigma=np.triu(np.ones((6, 6))))
    np.savez(tmp_path / "negative.npz", mu=pool.mu, sigma=-pool.sigma)
    untouched = PretendedInception("inception", untouchable)
    for name, words in (("other", "another network"), ("skew", "not symmetric"), ("negative", "negative eigenvalues")):
        with pytest.raises(ValueError, match=words):
            evaluate(SAMPLES, [SAMPLES, tmp_path / f"{name}.npz"], PLAIN, encoder=untouched)


def test_a_shorter_last_split_is_told(encoder: Encoder) -> None:
    encoder.weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))

    def said(samples: object, split_size: int) -> list[str]:
        found = evaluate(REFERENCE, samples, replace(PLAIN, split_size=split_size), encoder=encoder)
        return [text for text in found.warnings if "split" in text]

    for split_size, last in ((20, 10), (49, 1), (26, 24)):
        (text,) = said(SAMPLES, split_size)
        assert f"holds {last} of {split_size} images" in text
    assert not said(SAMPLES, 25) and not said(SAMPLES, 50) and not said(SAMPLES, 5000)  # even, or one split
    assert len(said([SAMPLES, SAMPLES[:40], SAMPLES[:31]], 20)) == 2


def test_an_order_by_class_shows_without_labels() -> None:
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(4), 16)
    images = np.clip(60 * classes[:, None, None, None] + rng.integers(0, 20, (64, 8, 8, 3)), 0, 255).astype(np.uint8)
    levels = torch.tensor([10.0, 70, 130, 190])
    encoder = CallableEncoder("levels", lambda x: -((x.float().mean((1, 2, 3))[:, None] - levels) ** 2) / 50)
    encoder.weight = torch.eye(4)

    def told(order: np.ndarray, split_size: int = 16, labels: np.ndarray | None = None) -> str:
        settings = replace(PLAIN, split_size=split_size)
        found = evaluate(REFERENCE, [iter([(images[order], classes[order] if labels is None else labels)])], settings,
                         encoder=encoder)  # fmt: skip
        return " ".join(found.warnings)

    no_labels = np.array(["?"] * 64)
    assert "sorted by class" in told(np.arange(64))
    for order in (np.arange(64), np.arange(64)[::-1], np.arange(64).reshape(4, 16)[[2, 0, 3, 1]].reshape(-1)):
        assert "look sorted" in told(order, labels=no_labels)
        assert "sorted" not in told(order, 64, no_labels)
    for order in (rng.permutation(64), np.arange(64).reshape(4, 16).T.reshape(-1)):
        assert "sorted" not in told(order, labels=no_labels)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pr_dtype is 'float8', allowed are float32, float16, float64"):
        Settings(pr_dtype="float8")
    with pytest.raises(ValueError, match="k is 0"):
        Settings(k=0)
    with pytest.raises(ValueError, match="features is 'resnet', allowed are inception, npz, dinov2:FOLDER"):
        make_encoder(Settings(features="resnet"), torch.device("cpu"))
    with pytest.raises(ValueError, match="has no config.json"):
        make_encoder(Settings(features=f"dinov2:{tmp_path}"), torch.device("cpu"))


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
    assert "nothing that can affect a score differs" in capsys.readouterr().out
    for text in ("{}", "[]", '{"format": 1, "sets": [1]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="no report of this evaluator"):
            report.read_report(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot be read"):
        report.read_report(tmp_path / "absent.json")


def classes_of(root: Path, images: np.ndarray, *names: str) -> str:
    """A folder with one sub-folder of pictures for each name."""
    for k, image in enumerate(images):
        path = root / names[k % len(names)] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return str(root)


def test_classes_of_folders_are_matched_by_name(encoder: Encoder, tmp_path: Path) -> None:
    settings = replace(PLAIN, per_class=True)
    against = classes_of(tmp_path / "ref", REFERENCE, "ant", "bee", "cat")
    same = evaluate(against, classes_of(tmp_path / "same", REFERENCE, "ant", "bee", "cat"), settings, encoder=encoder)
    assert not any("by name" in told for told in same.warnings)
    fewer = evaluate(against, classes_of(tmp_path / "few", SAMPLES[:20], "bee", "cat"), settings, encoder=encoder)
    assert [(row.label, row.references) for row in fewer.sets[0].per_class] == [(1, 20), (2, 20)]
    assert any("by name" in told for told in fewer.warnings)
    other = evaluate(against, classes_of(tmp_path / "other", SAMPLES[:20], "asp", "cat"), settings, encoder=encoder)
    assert [(row.label, row.references) for row in other.sets[0].per_class] == [(2, 20), (3, 0)]
    assert any("lacks 1 of the classes of" in told and "(3)" in told for told in other.warnings)


def test_scores_per_class_that_are_left_out_are_told(files: tuple[str, str], encoder: Encoder, tmp_path: Path) -> None:
    plain, far = str(tmp_path / "plain.npz"), str(tmp_path / "far.npz")
    np.savez(plain, REFERENCE)
    np.savez(far, SAMPLES, LABELS + 7)
    for reference, samples, words in (
        (plain, files[1], "plain.npz has no labels .arr_1., so recall, FID and KID of each class are left out"),
        (files[0], far, r"ref.npz lacks 3 of the classes of .*far.npz \(7, 8, 9\)"),
        (files[0], plain, "plain.npz has no labels .arr_1., so there are no scores per class"),
    ):
        with pytest.warns(UserWarning, match=words):
            evaluate(reference, samples, replace(PLAIN, per_class=True), encoder=encoder)


def test_fewer_images_than_features_are_named() -> None:
    encoder = CallableEncoder("pixels", lambda images: images[:, :4, :4].float().flatten(1))  # 48 of them
    with pytest.warns(UserWarning, match="FD pixels: the sample set has 40 images for 48 features.*rank deficient"):
        evaluate(REFERENCE, SAMPLES[:40], PLAIN, encoder=encoder)


def test_sizes_that_differ_are_told(encoder: Encoder) -> None:
    words = "holds images of 8x4, array in memory of 8x8"
    with pytest.warns(UserWarning, match=words):
        evaluate(REFERENCE, SAMPLES[:, :4], PLAIN, encoder=replace_rows(encoder))
    assert not any(words[:5] in told for told in evaluate(REFERENCE, SAMPLES, PLAIN, encoder=encoder).warnings)


def replace_rows(encoder: Encoder) -> Encoder:
    """Six features whatever the height."""
    return CallableEncoder("rows", lambda images: images[:, :2].float().mean(1).flatten(1)[:, :6])


def test_class_table_shows_the_worst_first() -> None:
    rows = [report.ClassScores(label, 10, None, precision, 1.0) for label, precision in ((0, 0.9), (1, 0.2))]
    lines = report.class_table(rows)
    assert lines[1].split() == ["1", "10", "-", "0.2000", "-", "1.0000", "-", "-"]
    assert [line.split()[0] for line in lines] == ["class", "1", "0"]
