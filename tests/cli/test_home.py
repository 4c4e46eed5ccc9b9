"""`~` reaches the program where no shell has expanded it: it is the home folder everywhere."""

from __future__ import annotations

import json

import pytest

from guided_diffusion.cli import arguments, runs
from guided_diffusion.config import SampleConfig
from guided_diffusion.data.listing import list_records
from guided_diffusion.runtime import storage
from guided_diffusion.training.saver import Checkpoints


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_flags_variables_and_files_of_flags(home, monkeypatch):
    seen: list[list[str]] = []
    runs.guarded(lambda words: seen.append(list(words or [])) or 0, ["--out", "~/a", "--out=~/a", "--classes=1~2"])
    assert seen == [["--out", f"{home}/a", f"--out={home}/a", "--classes=1~2"]]
    monkeypatch.setenv("OPENAI_LOGDIR", "~/logs")
    assert runs.run_folder("", "x") == (f"{home}/logs", "OPENAI_LOGDIR")
    (home / "flags.json").write_text(json.dumps({"model_path": "~/model.pt"}))
    parsed = arguments.parse(["--config", "~/flags.json"], [SampleConfig], program="p", description="")
    assert parsed.flags["model_path"] == f"{home}/model.pt"


def test_python(home):
    storage.write_bytes_atomic("~/deep/file", b"1")
    assert (home / "deep" / "file").read_bytes() == b"1" == storage.read_bytes("~/deep/file")
    assert storage.listdir("~/deep") == ["file"] and storage.join("~", "x") == f"{home}/x"
    checkpoints = Checkpoints("~/run")
    checkpoints.close()
    assert checkpoints.directory == f"{home}/run" and (home / "run").is_dir()
    (home / "photos").mkdir()
    with pytest.raises(ValueError, match=str(home)):
        list_records("~/photos")
