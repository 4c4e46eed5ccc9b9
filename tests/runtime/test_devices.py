"""What a device has: memory within the limits of a job, a compiler, asked for before any work, and how it multiplies."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

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


def settings() -> list[object]:
    return [getattr(holder, name) for holder, name, _ in devices._products(True)]


@pytest.mark.parametrize("older", [False, True])
def test_float32_products_are_ours_inside_and_the_process_s_again_after(
    older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if older:  # torch before 2.9
        old = SimpleNamespace(allow_tf32=True)
        backends = SimpleNamespace(
            cuda=SimpleNamespace(matmul=old), cudnn=SimpleNamespace(allow_tf32=False), mkldnn=None
        )
        monkeypatch.setattr(torch, "backends", backends)
    elif not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("needs torch 2.9")
    gpu, before = torch.device("cuda"), settings()
    with devices.float32_products():
        assert devices.describe_products(gpu) == "convolutions in TF32, matrix products in float32"
        devices.set_float32_products(tf32=False)
        assert devices.describe_products(gpu) == "convolutions in float32, matrix products in float32"
    assert settings() == before
    for options in ({"tf32": False}, {"deterministic": True}):
        with devices.float32_products(**options):
            assert "TF32" not in devices.describe_products(gpu)
            assert torch.are_deterministic_algorithms_enabled() == ("deterministic" in options)
    assert settings() == before and not torch.are_deterministic_algorithms_enabled()
    assert devices.describe_products(CPU) == "in float32"


def test_a_process_s_own_choice_does_not_reach_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the command's reach the process; the older names can still be read."""
    before = settings()
    torch.set_float32_matmul_precision("medium")
    try:
        assert devices.describe_products(torch.device("cuda")).endswith("products in TF32")
        with devices.float32_products():
            assert devices.describe_products(torch.device("cuda")).endswith("products in float32")
            assert torch.backends.cudnn.allow_tf32
    finally:
        for (holder, name, _), value in zip(devices._products(True), before):
            setattr(holder, name, value)


@pytest.mark.parametrize("own", ["", ":16:8"])
def test_the_environment_is_the_process_s_again_after(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_CACHE_DIR")
    for name in names:
        monkeypatch.setenv(name, own)
        if not own:
            monkeypatch.delenv(name)
    for _ in range(2):
        with pytest.raises(KeyError), devices.float32_products(deterministic=True):
            assert os.environ[names[0]] == (own or ":4096:8")
            raise KeyError
        assert [os.environ.get(name, "") for name in names] == [own, own]
