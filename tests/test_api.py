"""The public names, loaded on first touch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import guided_diffusion as gd

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "load save ModelConfig ClassifierConfig SuperResConfig DiffusionConfig DataConfig TrainConfig SampleConfig presets "
    "build_model build_classifier build_process Process make_process respace space_timesteps Denoised make_denoiser guidance "
    "ancestral ddim heun dpm_solver last Trainer generate ARCHITECTURES SCHEDULES SOURCES WEIGHTS"
).split()


def test_import_loads_neither_torch_nor_mpi() -> None:
    code = "import sys, guided_diffusion; print([m for m in ('torch', 'numpy', 'mpi4py', 'blobfile', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_name_is_served(name: str) -> None:
    assert getattr(gd, name) is not None
    assert name in dir(gd)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gd.nothing


@pytest.mark.parametrize("first", ["import guided_diffusion.respace", "pass"])
def test_respace_is_module_and_function_whatever_came_first(first: str) -> None:
    code = (
        f"{first}\nimport guided_diffusion as gd\nfrom guided_diffusion import respace\n"
        "assert len(gd.respace(gd.make_process([0.1] * 4), [0, 2])) == 2\nassert respace.SpacedDiffusion"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_copy_under_another_package_works(tmp_path: Path) -> None:
    """Many programs carry the package below their own; only relative imports allow that."""
    (tmp_path / "extern").mkdir()
    (tmp_path / "extern" / "guided_diffusion").symlink_to(ROOT / "guided_diffusion")
    code = (
        "import sys, extern.guided_diffusion.script_util as s\n"
        "assert 'guided_diffusion' not in sys.modules\ns.create_gaussian_diffusion()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


def test_respace_needs_no_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the 2021 modules deleted the public name still answers."""
    import guided_diffusion
    from guided_diffusion.diffusion import process

    monkeypatch.delitem(vars(guided_diffusion), "respace", raising=False)
    monkeypatch.setitem(sys.modules, "guided_diffusion.respace", None)
    assert guided_diffusion.respace is process.respace
    monkeypatch.delitem(vars(guided_diffusion), "respace", raising=False)
