"""The presets against the recorded flags of the released checkpoints."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from guided_diffusion.config import flatten
from guided_diffusion.weights import released as presets

RECORDED = Path(__file__).parents[1] / "golden" / "checkpoint_layouts.json.gz"


def test_there_are_fifteen_and_each_has_an_address() -> None:
    assert len(presets.PRESETS) == 15
    assert all(p.url.startswith("https://") and p.url.endswith(f"/{p.name}.pt") for p in presets.PRESETS.values())
    assert {p.classifier for p in presets.PRESETS.values()} - {""} <= set(presets.PRESETS)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_flags_are_the_recorded_ones(name: str) -> None:
    preset = presets.PRESETS[name]
    recorded = json.loads(gzip.decompress(RECORDED.read_bytes()))[name]
    ours = flatten({"model": preset.model.to_dict(), "diffusion": preset.diffusion.to_dict()})
    assert recorded["kind"] == preset.kind
    differing = {k: (v, ours[k]) for k, v in recorded["flags"].items() if ours[k] != v}
    differing.pop("use_fp16", None)  # arithmetic is a choice of the one who samples
    assert differing == {}


def test_unknown_name_lists_the_names() -> None:
    assert presets.get("lsun_cat.pt") is presets.PRESETS["lsun_cat"]
    with pytest.raises(ValueError, match="lsun_cow.*lsun_bedroom"):
        presets.get("lsun_cow")


def test_best_figures_stand_first() -> None:
    """The paper's main result for each size, by which a reproduction is judged."""
    best = {name: presets.get(name).recipes[0] for name in ("128x128_diffusion", "256x256_diffusion")}
    assert best["128x128_diffusion"].scale == 0.5 and best["128x128_diffusion"].expected.fid == 2.97
    assert best["256x256_diffusion"].scale == 1.0 and best["256x256_diffusion"].expected.fid == 4.59
