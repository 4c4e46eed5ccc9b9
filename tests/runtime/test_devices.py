"""What torch.compile needs is asked for before any work, in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guided_diffusion.cli.main import main
from guided_diffusion.runtime.devices import require_compiler


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(ValueError, match="no-such-compiler.*install"):
        require_compiler(torch.device("cpu"))
    require_compiler(torch.device("cuda"))  # there the compiler of torch's GPU code decides
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no "):
        require_compiler(torch.device("cpu"))
    found = tmp_path / "some-c++"
    found.write_text("#!/bin/sh\n")
    found.chmod(0o755)
    monkeypatch.setenv("CXX", "some-c++")
    require_compiler(torch.device("cpu"))


def test_training_says_so_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "a_0.png")
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    words = f"train --data_dir {data} --out {tmp_path}/run --image_size 8 --device cpu --compile True --max_steps 1"
    assert main(words.split()) != 0
    assert "no-such-compiler" in capsys.readouterr().err
