"""load(path) through real files: bit-equal to the network built by flags, whatever wrote the file; damage and attacks told."""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TWINS, enter_as_released, filled, outputs

import guided_diffusion as gd
from guided_diffusion import build
from guided_diffusion.weights import convert
from guided_diffusion.weights.files import load_weights, read_metadata, read_weights
from guided_diffusion.weights.runs import save_run

KIND, FLAGS = TWINS["256x256_diffusion_uncond"]


def typed(flags: dict[str, Any]) -> dict[str, Any]:
    """What a user of 2021 types, but for the parts that this package adds."""
    return {name: value for name, value in flags.items() if name != "num_classes"}


def reloaded(content: Any, path: Path, flags: dict[str, Any] = FLAGS, **options: Any) -> gd.Loaded:
    """`content` saved as a plain file, and loaded with typed flags."""
    torch.save(content, path)
    return gd.load(str(path), flags=typed(flags), **options)


@pytest.mark.parametrize("name", TWINS)
def test_twins_load_bit_equal_by_flags_by_folder_and_by_safetensors(name: str, tmp_path: Path) -> None:
    kind, flags = TWINS[name]
    before = filled(kind, flags)
    expected = outputs(before)
    assert expected.abs().max() > 0.1

    bare = reloaded(before.net.state_dict(), tmp_path / "bare.pt", flags)
    gd.save(before, str(tmp_path / "run"))
    run = gd.load(str(tmp_path / "run"))
    convert.save_file(before, str(tmp_path / "one.safetensors"), "safetensors")
    one = gd.load(str(tmp_path / "one.safetensors"))
    for after in (bare, run, one):
        assert after.kind == kind and after.config.model.multipliers == before.config.model.multipliers
        assert torch.equal(outputs(after), expected)
        assert torch.equal(after.process.alpha_bar, before.process.alpha_bar) or kind == "classifier"
        assert torch.equal(after.process.time, before.process.time)
        assert not after.net.training and not any(p.requires_grad for p in after.net.parameters())
    assert run.config == one.config == before.config


@pytest.mark.parametrize("name", ["64x64_diffusion", "128x128_diffusion", "64_256_upsampler", "256x256_classifier"])
def test_a_released_layout_loads_without_a_flag(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A small twin stands for the released file: its layout is entered as the released one, with the twin's own flags."""
    kind, flags = TWINS[name]
    before = filled(kind, flags)
    flags = {**gd.presets.PRESETS[name].flags, **flags, "attention_resolutions": "8"}
    enter_as_released(monkeypatch, name, kind, flags, before)
    torch.save(before.net.state_dict(), tmp_path / f"{name}.pt")
    after = gd.load(str(tmp_path / f"{name}.pt"))
    assert not caplog.messages
    assert torch.equal(outputs(after), outputs(before))
    (tmp_path / f"{name}.pt").rename(tmp_path / "mine.pt")
    assert torch.equal(outputs(gd.load(str(tmp_path / "mine.pt"))), outputs(before))
    assert "is taken for it" in caplog.text


def test_attention_kept_as_2d_convolutions_is_squeezed(tmp_path: Path) -> None:
    """As in the consistency models' code, whose attention convolves images and not rows."""
    kind, flags = TWINS["64x64_diffusion"]
    before = filled(kind, flags)
    ends = ("qkv.weight", "proj_out.weight")
    state = {k: v.unsqueeze(-1) if k.endswith(ends) else v for k, v in before.net.state_dict().items()}
    assert sum(v.dim() == 4 and k.endswith(ends) for k, v in state.items()) > 4
    assert torch.equal(outputs(reloaded(state, tmp_path / "cm.pt", flags)), outputs(before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    before = filled(KIND, FLAGS)
    after = reloaded({k: v.to(dtype) for k, v in before.net.state_dict().items()}, tmp_path / "half.pt")
    assert {p.dtype for p in after.net.parameters()} == {torch.float32}
    before.net.load_state_dict({k: v.to(dtype).float() for k, v in before.net.state_dict().items()})
    assert torch.equal(outputs(after), outputs(before))


def shifted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other weights of the same network, to be told from the first."""
    return {name: value + 0.01 for name, value in state.items()}


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "ddp": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "stacked": lambda s: prefixed(s, "module._orig_mod.model."),
    "unet": lambda s: prefixed(s, "unet."),
    "latent diffusion": lambda s: {"state_dict": {**prefixed(s, "model.diffusion_model."), "betas": torch.zeros(3)}},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "lightning": lambda s: {"state_dict": prefixed(s, "net."), "optimizer_states": [{"state": {}}], "callbacks": {}},
    "with an optimizer of the same names": lambda s: {"model": s, "optimizer": {"state": shifted(s)}},
    "with flags": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, name="x")},
    "one level more": lambda s: {"checkpoint": {"model_state_dict": prefixed(s, "module.")}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_files_load(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = filled(KIND, FLAGS)
    after = reloaded(WRAPPED[name](before.net.state_dict()), tmp_path / "wrapped.pt")
    assert torch.equal(outputs(after), outputs(before)) and after.weights == ""
    assert any("which is left out" in text for text in caplog.messages)


@pytest.mark.parametrize("name", ["ddp", "compiled", "state_dict"])
def test_a_save_of_a_run_that_was_saved_again_loads(name: str, tmp_path: Path) -> None:
    before = filled(KIND, FLAGS)
    gd.save(before, str(tmp_path))
    (weights,) = tmp_path.glob("model*.pt")
    torch.save(WRAPPED[name](before.net.state_dict()), weights)
    assert torch.equal(outputs(gd.load(str(weights))), outputs(before))


BOTH: dict[str, Callable[[Any, Any], Any]] = {  # (raw, averaged) -> what a trainer saves
    "DiT": lambda raw, ema: {"model": raw, "ema": ema, "opt": {}, "args": argparse.Namespace(lr=1)},
    "timm": lambda raw, ema: {"model": raw, "model_ema": ema},
    "swapped": lambda raw, ema: {"ema_model": prefixed(ema, "module."), "state_dict": prefixed(raw, "module.")},
    "flat": lambda raw, ema: {"state_dict": {**prefixed(raw, "model."), **prefixed(ema, "model_ema.")}},
    "beside plain names": lambda raw, ema: {**raw, **prefixed(ema, "ema.")},
    "with a rate": lambda raw, ema: {"net": raw, "ema_0.9999": ema},
    "lucidrains": lambda raw, ema: {
        "model": prefixed(raw, "model."),
        "ema": {**prefixed(raw, "online_model.model."), **prefixed(ema, "ema_model.model."), "step": torch.tensor(3)},
    },
}


@pytest.mark.parametrize("name", BOTH)
def test_of_raw_and_averaged_weights_the_choice_is_told(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = filled(KIND, FLAGS).net.state_dict()
    ema = shifted(raw)
    for which, expected in (("", ema), ("ema", ema), ("model", raw)):
        caplog.clear()
        found = reloaded(BOTH[name](raw, ema), tmp_path / "both.pt", weights=which)
        assert all(torch.equal(value, expected[key]) for key, value in found.net.state_dict().items()), which
        assert found.weights == (which or "ema")
        assert "EMA weights" in caplog.text and "raw weights" in caplog.text
        assert ("--weights model" in caplog.text) == (not which)


def test_averaged_weights_alone_are_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, path = filled(KIND, FLAGS), tmp_path / "a.pt"
    for content in ({"ema": before.net.state_dict()}, {"model_ema": before.net.state_dict(), "step": 7}):
        caplog.clear()
        assert torch.equal(outputs(reloaded(content, path)), outputs(before))
        assert "EMA weights only" in caplog.text
        with pytest.raises(ValueError, match="--weights is 'model', but .*a.pt holds EMA weights only"):
            reloaded(content, path, weights="model")


def test_several_networks_of_one_kind_are_refused_and_unreadable_averages_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, path = filled(KIND, FLAGS).net.state_dict(), str(tmp_path / "a.pt")
    torch.save({"ema_0.999": state, "ema_0.9999": state}, path)
    with pytest.raises(ValueError, match="several networks, 'ema_0.999', 'ema_0.9999'"):
        load_weights(path)
    torch.save({"model": state, "ema": {"shadow_params": list(state.values())}}, path)
    caplog.clear()
    assert load_weights(path).keys() == state.keys()
    assert "ema cannot be read" in caplog.text
    with pytest.raises(ValueError, match="holds raw weights only"):
        read_weights(path, which="ema")


def test_weights_of_a_run_folder_are_chosen(tmp_path: Path) -> None:
    network = filled(*TWINS["256x256_diffusion"])
    raw, ema = network.net.state_dict(), shifted(network.net.state_dict())
    save_run(str(tmp_path), step=9, model=raw, ema={"0.9": ema}, config=network.config.to_dict(), kind="diffusion")
    for which, expected in (("", ema), ("ema", ema), ("model", raw)):
        found = gd.load(str(tmp_path), weights=which).net.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(ValueError, match=r"--weights is 'ema', but .*model000009.pt holds the other kind"):
        gd.load(str(tmp_path / "model000009.pt"), weights="ema")
    with pytest.raises(ValueError, match=r"--weights is 'raw'; it must be one of '', 'ema', 'model'"):
        gd.load(str(tmp_path), weights="raw")
    save_run(str(tmp_path), step=10, model=raw, config=network.config.to_dict(), kind="diffusion")
    with pytest.raises(ValueError, match="kept no EMA weights"):
        gd.load(str(tmp_path), weights="ema")


def test_the_network_takes_the_mapped_file_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    before = filled(*TWINS["256x256_diffusion"])
    gd.save(before, str(tmp_path))
    path = tmp_path / "model000000.pt"
    content = path.read_bytes()
    after = gd.load(str(tmp_path))
    parameters = list(after.net.parameters())
    assert not any(p.is_meta for p in parameters) and not any(p.requires_grad for p in parameters)
    # One storage per saved tensor or fewer: nothing was copied out of the mapping.
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    assert sum(sizes.values()) <= 1.01 * path.stat().st_size
    with torch.no_grad():
        parameters[0].add_(1)
    assert path.read_bytes() == content


class Around(torch.nn.Module):
    """A U-Net within a network of one's own: its names have a prefix, as those of a wrapper would."""

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        self.module = build.build_model(gd.ModelConfig.from_flags(FLAGS), gd.DiffusionConfig(learn_sigma=True))
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.scale * self.module(x, time)


def test_a_network_around_a_unet_keeps_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gd.ARCHITECTURES, "around", Around)
    before = filled("diffusion", {"image_size": 16, "architecture": "around", "learn_sigma": True})
    gd.save(before, str(tmp_path / "run"))
    convert.save_file(before, str(tmp_path / "one.safetensors"), "safetensors")
    for path in ("run", "one.safetensors"):
        after = gd.load(str(tmp_path / path))
        assert after.config == before.config and torch.equal(outputs(after), outputs(before))
    monkeypatch.delitem(gd.ARCHITECTURES, "around")
    with pytest.raises(ValueError, match="--architecture is 'around'; it must be one of unet"):
        gd.load(str(tmp_path / "run"))


def test_a_file_of_another_kind_is_refused_in_words(tmp_path: Path) -> None:
    upsampler = filled(*TWINS["64_256_upsampler"])
    gd.save(upsampler, str(tmp_path))
    with pytest.raises(ValueError, match="is an upsampler; a diffusion model is needed here"):
        gd.load(str(tmp_path), kind="diffusion", flags={"num_channels": 3})


def test_flags_that_deny_a_file_of_ours_are_told_with_the_line_that_works(tmp_path: Path) -> None:
    kind, flags = TWINS["256x256_diffusion"]
    gd.save(filled(kind, flags), str(tmp_path))
    with pytest.raises(ValueError, match="the file has attention at 8; you asked for 16, 8.*--attention_resolutions 8"):
        gd.load(str(tmp_path), flags={"attention_resolutions": "16,8"})
    both = r"num_res_blocks 2; you asked for 3; the file has learn_sigma True; you asked for False.*--num_res_blocks 2 --learn_sigma True"
    with pytest.raises(ValueError, match=both):
        gd.load(str(tmp_path), flags={"num_res_blocks": 3, "learn_sigma": False})
    same = {"attention_resolutions": " 8", "channel_mult": "1, 2", "num_heads": 1, "num_classes": 0, "dropout": 0.3}
    after = gd.load(str(tmp_path), flags={**same, "timestep_respacing": "10"})
    assert after.config.model.dropout == 0.3 and len(after.process) == 10  # type: ignore[union-attr]


def test_other_shapes_than_the_configuration_says(tmp_path: Path) -> None:
    """A run whose weights were exchanged for another network's."""
    before = filled(*TWINS["256x256_diffusion"])
    gd.save(before, str(tmp_path))
    other = filled(*TWINS["128x128_diffusion"]).net.state_dict()
    torch.save({k: v for k, v in other.items() if "label" not in k}, tmp_path / "model000000.pt")
    with pytest.raises(ValueError, match=r"model000000.pt is of another network: 1 tensors missing \(first: label_emb"):
        gd.load(str(tmp_path / "model000000.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Damage and attacks


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not be printed",))


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        gd.load(str(path))
    assert path.name in str(caught.value) and len(str(caught.value)) < 600


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    archive(tmp_path / "bomb.pt", {"data.pkl": bytes(50_000_000), "version": b"3\n"}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    refused(tmp_path / "bomb.pt", "compressed archive")


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """A bomb without compression: many names for the same bytes."""
    archive(tmp_path / "one.pt", {"data.pkl": bytes(100_000)})
    content = (tmp_path / "one.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.pt") as file:
        start = file.start_dir
    end = content.rindex(b"PK\x05\x06")
    entry = content[start:end]
    many = content[:start] + entry * 50
    many += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 50, 50, 50 * len(entry), start, 0)
    (tmp_path / "overlap.pt").write_bytes(many)
    refused(tmp_path / "overlap.pt", "unpack to 5,000,000")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"time_embed.0.weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "wide.pt")
    refused(tmp_path / "wide.pt", "but holds fewer")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"time_embed.0.weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": Evil()}))
    legacy = io.BytesIO()
    torch.save({"a": Evil()}, legacy, _use_new_zipfile_serialization=False)
    (tmp_path / "legacy.pt").write_bytes(legacy.getvalue())
    for name in ("evil", "old", "legacy"):
        refused(tmp_path / f"{name}.pt", "run code|pickle")
    assert "must not" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.pt", b"", "empty"),
        ("noise.pt", b"\x93NUMPY not weights", "not a file of weights"),
        ("lfs.pt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("page.pt", b"<!DOCTYPE html><html>", "web page"),
        ("cut.pt", b"PK\x03\x04 half a file", "cut short"),
        ("cut.safetensors", b"1234", "larger than the file"),
    ],
)
def test_a_file_of_something_else_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words)


def test_an_optimizer_no_file_and_a_folder_are_no_weights(tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, tmp_path / "opt000001.pt")
    refused(tmp_path / "opt000001.pt", "not weights by name")
    for path, words in ((tmp_path / "absent.pt", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=words):
            load_weights(str(path))


def test_a_legacy_file_that_claims_too_much(tmp_path: Path) -> None:
    """The format before zip archives notes sizes in a pickle; a file that lies about them is cut short."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "short.pt").write_bytes(buffer.getvalue()[:-2000])
    refused(tmp_path / "short.pt", "cannot be read")


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 4096, -1, -100])
def test_truncated_files_of_every_form(keep: int, tmp_path: Path) -> None:
    before = filled(KIND, FLAGS)
    convert.save_file(before, str(tmp_path / "a.safetensors"), "safetensors")
    torch.save(before.net.state_dict(), tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:keep])
        refused(tmp_path / name, "cannot be read")


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


@pytest.mark.parametrize(
    "content",
    [
        safetensors(b"{}", 1 << 60),
        safetensors(b"{}", 3),
        safetensors(b"[1, 2]"),
        safetensors(b"{" * 60_000),
        safetensors(b'{"a":' * 20_000),
        safetensors(b'{"__metadata__": {"guided_diffusion": 3}}'),
        safetensors(b'{"__metadata__": ["guided_diffusion"]}'),
        safetensors(b"\xff\xfe"),
    ],
)
def test_malformed_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    refused(tmp_path / "bad.safetensors", "header")


@pytest.mark.parametrize(
    "told", ["", "[]", "{}", '{"kind": "cat", "config": {}}', '{"kind": "diffusion", "config": {"model": {"legs": 4}}}']
)
def test_a_configuration_that_cannot_be_read(told: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"guided_diffusion": told})
    refused(tmp_path / "odd.safetensors", "carries a configuration that cannot be read")


def test_foreign_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    assert read_metadata(str(tmp_path / "foreign.safetensors")) == {"format": "pt"}
    with pytest.raises(ValueError, match="begins with conv.weight"):
        gd.load(str(tmp_path / "foreign.safetensors"))
    before = filled(KIND, FLAGS)
    save_file(before.net.state_dict(), tmp_path / "bare.safetensors")
    after = gd.load(str(tmp_path / "bare.safetensors"), flags=typed(FLAGS))
    assert torch.equal(outputs(after), outputs(before))
