"""Other encoders, with a stand-in for the transformers package."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluations.encoders import CallableEncoder, make_encoder
from evaluations.inputs import open_images
from evaluations.settings import Settings
from guided_diffusion.runtime.launchers import Place

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)


class Probe(torch.nn.Module):
    """Remembers what it was given; answers with channel means."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=32)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        self.seen = pixel_values
        means = pixel_values.mean((2, 3))
        return SimpleNamespace(last_hidden_state=torch.stack([means, 9 * means], 1), image_embeds=means)


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    model = Probe()
    model.missing = []

    def from_pretrained(path: str, local_files_only: bool, output_loading_info: bool) -> object:
        assert local_files_only and output_loading_info
        return model, {"missing_keys": model.missing}

    loader = SimpleNamespace(from_pretrained=from_pretrained)
    fake = SimpleNamespace(AutoModel=loader, CLIPVisionModelWithProjection=loader)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return model


def test_dinov2_takes_the_class_token_of_normalised_images(tmp_path: Path, probe: Probe) -> None:
    encoder = make_encoder(Settings(features=f"dinov2:{tmp_path}"), torch.device("cpu"))
    found = encoder.encode(open_images(IMAGES), Settings(), Place())
    assert found.pool.shape == (5, 3) and found.spatial is None and probe.seen.shape == (5, 3, 224, 224)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found.pool, (IMAGES.mean((1, 2)) / 255 - mean) / std, atol=0.02)
    assert (
        len(encoder.receipt(Settings())["weights_sha256"]) == 64 and "224x224" in encoder.receipt(Settings())["resize"]
    )


def test_clip_gives_directions(tmp_path: Path, probe: Probe) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    encoder = make_encoder(Settings(features=f"clip:{tmp_path}"), torch.device("cpu"))
    found = encoder.encode(open_images(IMAGES), Settings(), Place())
    assert probe.seen.shape == (5, 3, 32, 32)
    np.testing.assert_allclose(np.linalg.norm(found.pool, axis=1), 1, rtol=1e-6)


def test_another_model_or_half_a_model_is_refused(tmp_path: Path, probe: Probe) -> None:
    """transformers would fill in random weights with a warning, and the score would look like one."""
    with pytest.raises(ValueError, match="holds a model of type 'dinov2'; --features clip takes"):
        make_encoder(Settings(features=f"clip:{tmp_path}"), torch.device("cpu"))
    probe.missing = ["layernorm.weight"]
    with pytest.raises(ValueError, match=r"lacks weights of the model, first \['layernorm.weight'\]"):
        make_encoder(Settings(features=f"dinov2:{tmp_path}"), torch.device("cpu"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name its model_type"):
        make_encoder(Settings(features=f"dinov2:{tmp_path}"), torch.device("cpu"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        make_encoder(Settings(features=f"clip:{tmp_path}"), torch.device("cpu"))


def test_a_callable_must_give_one_row_per_image() -> None:
    encoder = CallableEncoder("broken", lambda images: images.float().mean())
    with pytest.raises(ValueError, match=r"broken gave features of shape \(\) for 5 images"):
        encoder.encode(open_images(IMAGES), Settings(), Place())
