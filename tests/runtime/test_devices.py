"""What a device has: memory within the limits of a job, and a compiler, asked for before any work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from guided_diffusion.cli.main import main
from guided_diffusion.runtime import devices
from guided_diffusion.runtime.devices import require_compiler

CPU = torch.device("cpu")


def test_free_memory_ends_at_the_limit_of_every_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job inside a container: the narrower limit holds; files that were read make way."""
    (tmp_path / "own").write_text("12:cpu:/other\n0::/container/job\n")
    for name, most, now, files in (("container", 9000, 5000, 500), ("container/job", "max", 3000, 0)):
        group = tmp_path / "groups" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{now}\n")
        (group / "memory.stat").write_text(f"anon 7\ninactive_file {files}\nactive_file 9\n")
    monkeypatch.setattr(devices, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(devices, "_OWN_GROUP", tmp_path / "own")
    assert devices.available_memory(CPU) == 4500
    (tmp_path / "groups/container/job/memory.max").write_text("3200\n")
    assert devices.available_memory(CPU) == 200
    (tmp_path / "groups/container/job/memory.max").write_text("2900\n")
    assert devices.available_memory(CPU) == 1  # 0 would say: unknown
    (tmp_path / "own").unlink()
    assert devices.available_memory(CPU) > 2**20


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells it otherwise")
def test_memory_of_a_process_is_known_without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    used = devices.used_memory(CPU)
    monkeypatch.setattr(devices, "_line_of", lambda path, name: 0)
    assert devices.used_memory(CPU) > 0.5 * used > 2**22


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
