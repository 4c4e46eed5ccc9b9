"""`sample --requests`: a file in, a folder per request out, the same as `sample` alone; bad files are told before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import BASE, CRITIC, filled
from processes import TORCHRUN, run_script

import guided_diffusion as gd
from guided_diffusion.cli import sample
from guided_diffusion.cli.main import main

LINES: list[dict[str, Any]] = [
    {"name": "threes", "seed": 5, "num_samples": 3, "classes": 3},
    {"name": "mixed", "num_samples": 6, "classes": "0,2", "labels": "balanced"},
    {"seed": 2, "classes": [1, "2"]},
]
# The same as `sample` is told it alone; the flags of all requests say --num_samples 2 --seed 8.
ALONE = {
    "threes": "--seed 5 --num_samples 3 --classes 3",
    "mixed": "--seed 8 --num_samples 6 --classes 0,2 --labels balanced",
    "0003": "--seed 2 --num_samples 2 --classes 1,2",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    gd.save(filled("diffusion", BASE), str(root / "base"))
    gd.save(filled("classifier", CRITIC), str(root / "critic"))
    gd.save(filled("diffusion", {**BASE, "class_cond": False, "num_classes": 0}), str(root / "without"))
    return root


def shared(models: Path) -> list[str]:
    words = f"--model_path {models}/base --classifier_path {models}/critic --classifier_scale 2"
    return f"{words} --timestep_respacing 4 --device cpu --batch_size 4".split()


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def assert_as_alone(models: Path, out: Path, tmp_path: Path) -> None:
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted(ALONE)
    for name, words in ALONE.items():
        alone = tmp_path / "alone" / name
        if not alone.exists():
            assert main(["sample", *shared(models), *words.split(), "--out", str(alone)]) == 0
        made, expected = (next(place.glob("*.npz")) for place in (out / name, alone))
        assert made.name == expected.name
        with np.load(made) as one, np.load(expected) as two:
            assert one["arr_0"].dtype == np.uint8 and one["arr_0"].shape == two["arr_0"].shape
            np.testing.assert_array_equal(one["arr_1"], two["arr_1"])
            difference = np.abs(one["arr_0"].astype(int) - two["arr_0"].astype(int))
            assert difference.max() <= 1 and (difference > 0).mean() < 0.02  # other places in a batch: rounding
        receipts = [json.loads((place / "sampling.json").read_text())["settings"] for place in (out / name, alone)]
        assert receipts[0] == receipts[1]


@pytest.mark.parametrize("as_list", [True, False])
def test_every_request_is_what_sample_makes_alone(
    models: Path, tmp_path: Path, as_list: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(LINES, indent=2) if as_list else "\n\n".join(map(json.dumps, LINES)) + "\n")
    words = [*shared(models), "--requests", str(file), "--num_samples", "2", "--seed", "8", "--out", f"{tmp_path}/out"]
    assert main(["sample", *words]) == 0
    assert "3 requests, 11 images in 3 batches instead of 4" in capsys.readouterr().out
    assert_as_alone(models, tmp_path / "out", tmp_path)
    assert (tmp_path / "out" / "threes" / "samples.png").exists()

    assert main(["sample", *words]) == 0
    assert "all 3 requests are there already" in capsys.readouterr().out
    # What was understood is written down, complete, and reads back as it is.
    told = sample.Sampling.of(sample.Sampling.flags(["--model_path", "m"], "p"))
    again = sample.read_requests(str(tmp_path / "out" / "requests.json"), told)
    expected = [("threes", 5, 3, "3", "random"), ("mixed", 8, 6, "0,2", "balanced"), ("0003", 2, 2, "1,2", "random")]
    assert [(one.name, *one.flags().values()) for one in again] == expected


def test_without_pictures_and_without_classes(models: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", [{"num_samples": 2}, {"num_samples": 1, "seed": 3}])
    words = f"--model_path {models}/without --timestep_respacing 4 --device cpu --grid 0 --batch_size auto"
    assert main(["sample", *words.split(), "--requests", file, "--out", str(tmp_path / "out")]) == 0
    assert not list(tmp_path.rglob("*.png"))
    with np.load(tmp_path / "out" / "0001" / "samples_2x8x8x3.npz") as found:
        assert found.files == ["arr_0"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no requests"),
        (["{'name': 'cats'}"], "line 1 is no JSON"),
        (["", '{"num_samples": 1}', "{"], "line 3 is no JSON"),
        (['[{"num_samples": 1},'], "starts with [ but is not valid JSON"),
        ([[1, 2]], "entry 1 is 1; a request is an object"),
        (["7"], "line 1 is 7; a request is an object"),
        ([{"num_samples": 1}, {"seed": 4}], "line 2 has no num_samples; write it there, or give --num_samples"),
        ([{"num_samples": 0}], "line 1: num_samples is 0; it must be at least 1"),
        ([{"num_samples": "3"}], "line 1: num_samples is '3'; it must be a whole number"),
        ([{"num_samples": 1, "seed": True}], "line 1: seed is True; it must be a whole number"),
        ([{"num_samples": 1, "labels": "even"}], "line 1: labels is 'even'; it must be one of 'random', 'balanced'"),
        ([{"num_samples": 1, "clases": 3}], "line 1: a request has no 'clases' (did you mean classes?)"),
        ([{"num_samples": 1, "classifier_scale": 3.0}], "classifier_scale is one for all requests; give it as --class"),
        ([{"num_samples": 1, "classes": 1.5}], 'line 1: classes is 1.5; write 7, "3,7", or a list'),
        ([{"num_samples": 1, "classes": [True]}], "line 1: classes is [True]"),
        ([{"num_samples": 1, "classes": []}], "line 1: classes is []"),
        ([{"num_samples": 1, "name": "../up"}], "line 1: name is '../up'; it becomes the name of a folder"),
        ([{"num_samples": 1, "name": ""}], "line 1: name is ''"),
        ([{"num_samples": 1, "name": 5}], "line 1: name is 5"),
        (
            [{"num_samples": 1, "name": "a"}, {"num_samples": 1, "name": "A"}],
            "line 2: name 'A' is already used in line 1",
        ),
    ],
)
def test_bad_files_are_told_before_any_weights_are_read(
    tmp_path: Path, lines: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.jsonl", lines)
    words = ["--model_path", "/nowhere", "--requests", file, "--out", str(tmp_path / "out")]
    assert main(["sample", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --requests {file}") and message in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\x93NUMPY\xff\xfe")
    for path, message in ((tmp_path / "no.json", "there is no such file"), (tmp_path / "binary", "is no text file")):
        assert main(["sample", "--model_path", "m", "--requests", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_unknown_classes_name_their_line(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "r.jsonl", [{"num_samples": 1, "classes": 3}, {"num_samples": 1, "classes": 4}])
    words = [*shared(models), "--requests", file, "--out", str(tmp_path / "out")]
    assert main(["sample", *words]) == 2
    assert "line 2: classes has '4'; there are the numbers 0 to 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_share_the_batches(models: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", LINES)
    words = [*shared(models), "--requests", file, "--num_samples", "2", "--seed", "8", "--out", f"{tmp_path}/out"]
    told = run_script("image_sample", " ".join(words), tmp_path, before=TORCHRUN)
    assert told.count("3 requests, 11 images in 3 batches instead of 4") == 1
    assert_as_alone(models, tmp_path / "out", tmp_path)
