"""The command itself, on synthetic weights, against the recorded run of the 2021 evaluator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_files import GOLDEN

from evaluations import evaluator, selftest
from evaluations.features import extract
from evaluations.settings import Settings
from guided_diffusion.runtime import launchers

SCRIPT = Path(evaluator.__file__).resolve()
PROGRESS = [
    "warming up PyTorch...",
    "computing reference batch activations...",
    "computing/reading reference batch statistics...",
    "computing sample batch activations...",
    "computing/reading sample batch statistics...",
    "Computing evaluations...",
]
RECORDED = GOLDEN["end_to_end"]["evaluator_run"]
EXACT = {"FID": 17.5258301184, "sFID": 85.343085351}


@pytest.fixture(scope="module")
def place(net, synthetic_pb, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: weights, two npz files; and the features in a cache, computed once."""
    folder = tmp_path_factory.mktemp("evaluator")
    os.link(synthetic_pb, folder / "classify_image_graph_def.pb")
    np.savez(folder / "ref.npz", selftest.synthetic_images(41, 96, 64, 64))
    np.savez(folder / "smp.npz", selftest.synthetic_images(42, 80, 64, 64), np.arange(80) % 2)
    for name in ("ref.npz", "smp.npz"):
        extract(str(folder / name), net, Settings(shard_dir=str(folder / "cache")))
    return folder


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python evaluator.py ...` as a plain file, in a folder that knows nothing of the package."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [
        sys.executable,
        str(SCRIPT),
        *arguments,
        "--allow_other_weights",
        "--device",
        "cpu",
        "--quiet",
        "--shard_dir",
        "cache",
    ]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=1000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_prints_what_the_original_prints(place: Path) -> None:
    done = run(place, "ref.npz", "smp.npz")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:6] == PROGRESS and len(lines) == 11
    printed = dict(line.split(": ", 1) for line in lines[6:])
    assert list(printed) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    found = {name: float(value) for name, value in printed.items()}
    assert all(value == repr(found[name]) for name, value in printed.items())
    assert found["Inception Score"] == pytest.approx(RECORDED["inception_score"], rel=1e-5)
    for name, key in (("FID", "fid"), ("sFID", "sfid")):
        assert found[name] == pytest.approx(RECORDED[key], rel=5e-5)
        assert found[name] == pytest.approx(EXACT[name], rel=2e-6)
    assert (found["Precision"], found["Recall"]) == (0.9625, RECORDED["recall"])
    assert "rank deficient" in done.stderr and "unknown Inception weights" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_options_and_the_published_half_precision(place: Path) -> None:
    done = run(place, "ref.npz", "smp.npz", "--all", "--pr_dtype", "float16", "--json", "a.json", "--plot", "a.png")
    assert done.returncode == 0, done.stderr
    loaded = json.loads((place / "a.json").read_text())
    scores = {score["name"]: score for score in loaded["sets"][0]["scores"]}
    assert scores["Precision"]["value"] == pytest.approx(RECORDED["precision"], abs=1.01 / 80)
    assert scores["Recall"]["value"] == pytest.approx(RECORDED["recall"], abs=1.01 / 96)
    assert {"KID", "Density", "Coverage"} <= set(scores) and all(score["error"] > 0 for score in scores.values())
    assert loaded["sets"][0]["fid_infinity"]["counts"][-1] == 80 and len(loaded["sets"][0]["per_class"]) == 2
    assert len(loaded["encoder"]["weights_sha256"]) == 64 and loaded["encoder"]["weights_published"] is False
    assert "no half-pixel shift" in loaded["encoder"]["resize"]
    assert (place / "a.png").stat().st_size > 5000
    assert "FID infinity: " in done.stdout and "KID standard error: " in done.stdout


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that fails says on stderr."""
    capsys.readouterr()
    assert evaluator.main(words) == 2
    return capsys.readouterr().err


def test_help_and_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluator.main(["--help"])
    assert stopped.value.code == 0 and "compare" in capsys.readouterr().out
    assert "error: a.json cannot be read" in refusal(capsys, "compare", "a.json", "b.json")
    assert "there is no file 'x.npz'" in refusal(capsys, "x.npz", "y.npz", "--features", "npz")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # before any work
    told = refusal(capsys, "x.npz", "y.npz", "--plot", "a.png")
    assert told == "error: --plot needs matplotlib: pip install matplotlib\n"
    for error in (TimeoutError("2 shards did not come"), PermissionError(13, "Permission denied", "x.npz")):
        monkeypatch.setattr(evaluator, "_score", lambda arguments, error=error: (_ for _ in ()).throw(error))
        assert refusal(capsys, "x.npz", "y.npz") == f"error: {error}\n"


@pytest.mark.parametrize(
    ("names", "rank", "size", "words"),
    [
        ("RANK WORLD_SIZE", "1", "2", "process 1 of 2, as RANK=1 and WORLD_SIZE=2 say: process 0 prints the scores"),
        ("PMI_RANK PMI_SIZE", "0", "3", "as PMI_RANK=0 and PMI_SIZE=3 say: it waits for the shares of 2 more"),
        ("RANK WORLD_SIZE", "", "", ""),
        ("RANK WORLD_SIZE", "0", "two", "WORLD_SIZE is 'two'"),
        ("RANK WORLD_SIZE", "7", "2", "RANK=7 and WORLD_SIZE=2 disagree"),
    ],
)
def test_says_which_variables_make_it_one_of_several(
    names: str,
    rank: str,
    size: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launchers, "_FIRST_REPORTS_S", 0)
    for name, value in zip(names.split(), (rank, size)):
        monkeypatch.setenv(name, value)
    given = [str(tmp_path / "x.npz"), "--weights", "w.pb"]
    for command in (
        [*given[:1], *given],
        ["reference", *given, "--image_size", "8", "--out", str(tmp_path / "out.npz")],
    ):
        first = refusal(capsys, *command).splitlines()[0]
        assert words in first and first.startswith("process") == words.startswith(("process", "as PMI"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--json folder", "--json folder: is a folder"),
        ("--json nowhere/a.json", "--json nowhere/a.json: there is no folder"),
        ("--json ref.npz", "--json ref.npz: would replace a file that is read"),
        ("--plot folder", "--plot folder: is a folder"),
        ("--plot a.mp3", "--plot a.mp3: a picture cannot be of the kind 'mp3'"),
        ("--shard_dir ref.npz", "is a file; give a folder"),
        ("--shard_dir ref.npz/below", "is a file; give a folder"),
        ("--device gpu", "--device gpu: cannot be used here"),
        ("--device cuda:99", "--device cuda:99: cannot be used here"),
    ],
)
def test_what_cannot_be_written_or_used_is_refused_before_the_work(
    options: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    np.savez("ref.npz", np.random.default_rng(0).standard_normal((9, 4)))
    assert evaluator.main(["ref.npz", "ref.npz", "--features", "npz", *options.split()]) == 2
    told = capsys.readouterr()
    assert words in told.err and len(told.err.splitlines()) == 1 and "activations" not in told.out
    if options.startswith(("--json", "--shard_dir")):
        options, words = options.replace("--json", "--out"), words.replace("--json", "--out")
        out = "" if "--out" in options else "--out out.npz"
        assert words in refusal(capsys, *f"reference ref.npz --image_size 8 {options} {out}".split())


def test_a_file_wins_over_a_command_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    with open("compare", "wb") as file:
        np.savez(file, features=rows)
    assert evaluator.main(["compare", "compare", "--features", "npz"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("FD npz: ") and printed[-3:-1] == ["Precision: 1.0", "Recall: 1.0"]


def test_runs_as_a_module_from_elsewhere(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "evaluations", "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage: evaluator.py" in done.stdout


def test_selftest_passes_here_and_would_notice() -> None:
    for check in selftest._metric_checks(torch.device("cpu")):
        assert check.passed, check.line()
    assert not selftest.Check("x", 1.0, 1.1, 1e-3).passed
    assert selftest.Check("x", 1.0, 1.1, 1e-3).line().startswith("FAIL x: 1.0, expected 1.1")


def test_selftest_has_the_recorded_weights(plain_net) -> None:
    ours = selftest.synthetic_network().state_dict()
    theirs = plain_net.state_dict()
    assert ours.keys() == theirs.keys() and all(bool((ours[name] == theirs[name]).all()) for name in ours)
