"""Each network its own number format: `--precision` for both, `--classifier_precision` for the classifier alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import BASE, CRITIC, filled

import guided_diffusion as gd
from guided_diffusion.cli.main import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    gd.save(filled("diffusion", BASE), str(root / "base"))
    gd.save(filled("classifier", CRITIC), str(root / "critic"))
    return root


@pytest.mark.parametrize(
    ("flags", "formats"),
    [
        ("", (torch.float32, torch.float32)),
        ("--precision bf16", (torch.bfloat16, torch.bfloat16)),
        ("--classifier_precision bf16", (torch.float32, torch.bfloat16)),
        ("--precision bf16 --classifier_precision fp32", (torch.bfloat16, torch.float32)),
    ],
)
def test_formats(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, formats: Any) -> None:
    from guided_diffusion.weights import load as loading

    used: dict[str, torch.dtype] = {}
    load = loading.load

    def spy(path: str, **options: Any) -> Any:
        found = load(path, **options)
        used[found.kind] = found.net.dtype
        return found

    monkeypatch.setattr(loading, "load", spy)
    words = f"sample --model_path {models}/base --classifier_path {models}/critic --timestep_respacing 3 --device cpu"
    words += f" --num_samples 2 --batch_size 2 --grid 0 --out {tmp_path}/out {flags}"
    assert main(words.split()) == 0
    assert (used["diffusion"], used["classifier"]) == formats
    settings = json.loads((tmp_path / "out" / "sampling.json").read_text())["settings"]
    told = [getattr(torch, settings[name]["precision"]) for name in ("model", "classifier")]
    assert told == list(formats)
