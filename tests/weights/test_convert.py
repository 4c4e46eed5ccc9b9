"""Weights under other roofs: safetensors and diffusers, each way, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TWINS, filled, outputs

import guided_diffusion as gd
from guided_diffusion.cli.main import main
from guided_diffusion.weights.convert import flags_of_unet2d, join_qkv, save_diffusers, split_qkv

BASE = {
    "image_size": 16, "num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "8", "num_res_blocks": 1,
    "num_head_channels": 16, "learn_sigma": True, "diffusion_steps": 1000, "noise_schedule": "cosine",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "legacy": {"resblock_updown": True},
    "new order": {"resblock_updown": True, "use_new_attention_order": True},
    "classes": {"resblock_updown": True, "class_cond": True, "num_classes": 10},
    "convolutions": {"resblock_updown": False},
    "convolutions, new order, classes": {"use_new_attention_order": True, "class_cond": True, "num_classes": 5},
    "no scale shift": {"use_scale_shift_norm": False, "resblock_updown": True},
    "deep": {"num_res_blocks": 3, "channel_mult": "1,1,2", "attention_resolutions": "8,4", "resblock_updown": True},
    "grey, one variance": {"image_channels": 1, "learn_sigma": False},
    "heads of one width": {"num_head_channels": -1, "num_heads": 4, "attention_resolutions": "8"},
    "no attention but in the middle": {"attention_resolutions": "", "resblock_updown": True},
}


@pytest.mark.parametrize("name", TWINS)
def test_safetensors_and_back_lose_no_bit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = filled(*TWINS[name])
    gd.save(before, str(tmp_path / "run"))
    one, plain = tmp_path / "one.safetensors", tmp_path / "plain.pt"
    assert main(["convert", str(tmp_path / "run"), str(one)]) == 0
    assert "largest output difference on the same input: 0" in capsys.readouterr().out
    assert main(["convert", str(one), str(plain)]) == 0
    assert "largest output difference on the same input: 0" in capsys.readouterr().out
    after, back = gd.load(str(one)), torch.load(plain, weights_only=True)
    assert after.config == before.config
    assert list(back) == list(before.net.state_dict())
    assert all(torch.equal(value, back[key]) for key, value in before.net.state_dict().items())
    assert torch.equal(outputs(after), outputs(before))


def test_the_source_is_named_by_its_hash(tmp_path: Path) -> None:
    before = filled(*TWINS["256x256_diffusion"])
    gd.save(before, str(tmp_path / "run"))
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "one.safetensors")]) == 0
    from guided_diffusion.runtime import storage
    from guided_diffusion.weights.files import read_metadata

    told = json.loads(read_metadata(str(tmp_path / "one.safetensors"))["guided_diffusion"])
    assert told["source_sha256"] == storage.sha256_of(str(tmp_path / "run" / "model000000.pt"))
    assert told["source"] == "model000000.pt" and told["kind"] == "diffusion"
    assert told["config"]["model"]["num_head_channels"] == 16


@pytest.mark.parametrize("name", CASES)
def test_diffusers_computes_the_same_and_back_loses_no_bit(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    before = filled("diffusion", {**BASE, **CASES[name]})
    gd.save(before, str(tmp_path / "run"))
    folder = tmp_path / "theirs"
    assert main(["convert", str(tmp_path / "run"), str(folder), "--to", "diffusers"]) == 0
    measured = float(capsys.readouterr().out.strip().rsplit(": ", 1)[1])
    assert measured < 1e-5

    # As its users read and call it, not through our code.
    theirs = diffusers.UNet2DModel.from_pretrained(str(folder)).eval()
    channels = before.config.model.image_channels
    x = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([1, 3]) if before.config.model.class_cond else None  # type: ignore[union-attr]
    with torch.no_grad():
        out = theirs(x, torch.tensor([7.0, 600.0]), class_labels=y).sample
    expected = outputs(before)
    assert expected.abs().max() > 0.1
    assert float((out - expected).abs().max() / expected.abs().max()) < 1e-5

    assert main(["convert", str(folder), str(tmp_path / "back.safetensors")]) == 0
    back = gd.load(str(tmp_path / "back.safetensors"))
    assert back.config == before.config
    assert all(torch.equal(value, back.net.state_dict()[key]) for key, value in before.net.state_dict().items())


@pytest.mark.parametrize("name", ["legacy", "convolutions", "classes", "grey, one variance"])
def test_a_folder_that_only_diffusers_wrote(name: str, tmp_path: Path) -> None:
    """Without the note that our converter leaves: flags come from their configuration, the schedule from the command."""
    pytest.importorskip("diffusers")
    before = filled("diffusion", {**BASE, **CASES[name], "noise_schedule": "linear"})
    save_diffusers(before, str(tmp_path / "theirs"))
    (tmp_path / "theirs" / "guided_diffusion.json").unlink()
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "back.safetensors")]) == 0
    back = gd.load(str(tmp_path / "back.safetensors"))
    # Queries, keys and values are kept apart there; here they come back in the legacy order.
    assert torch.allclose(outputs(back), outputs(before), atol=1e-5)
    assert torch.equal(back.process.alpha_bar, before.process.alpha_bar)


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("diffusion", {"channel_mult": "0.5,1"}, "cannot express the first multiplier 0.5"),
        ("diffusion", {"num_head_channels": -1, "num_heads": 2, "attention_resolutions": "16,8"}, "fixes the channels per head"),
        ("super_resolution", {"large_size": 16, "small_size": 8}, "cannot express a super_resolution network"),
    ],
)  # fmt: skip
def test_what_diffusers_cannot_express_is_refused_in_words(
    kind: str, flags: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    gd.save(filled(kind, {**BASE, "num_channels": 64, **flags}), str(tmp_path / "run"))
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "theirs"), "--to", "diffusers"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups=16"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "block SkipDownBlock2D"),
    ],
)
def test_what_ours_cannot_express_is_refused_in_words(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    arguments = {
        "sample_size": 16, "block_out_channels": [32, 64], "layers_per_block": 1, "norm_eps": 1e-5,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8, "downsample_type": "conv", "upsample_type": "conv",
    }  # fmt: skip
    config = dict(diffusers.UNet2DModel(**arguments).config)
    assert flags_of_unet2d({**config, "flip_sin_to_cos": True}, "linear")["num_head_channels"] == 8
    with pytest.raises(ValueError, match=words):
        flags_of_unet2d({**config, "flip_sin_to_cos": True, **change}, "linear")


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_packing_of_queries_keys_values(new_order: bool, heads: int) -> None:
    packed = torch.arange(24 * 5.0).reshape(24, 5)
    q, k, v = split_qkv(packed, heads, new_order)
    assert torch.equal(join_qkv((q, k, v), heads, new_order), packed)
    if not new_order and heads == 2:  # the first head's four queries, keys, values come first
        assert torch.equal(q, torch.cat([packed[0:4], packed[12:16]])) and torch.equal(k[:4], packed[4:8])


def test_a_target_of_no_known_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), str(tmp_path / "x.onnx")]) == 2
    assert "end it in .safetensors or .pt" in capsys.readouterr().err
