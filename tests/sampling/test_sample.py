"""`gd.sample` is the commands' way in one call: the same images; what it cannot do it refuses in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import BASE, CRITIC, filled

import guided_diffusion as gd
from guided_diffusion.cli.main import main
from guided_diffusion.config import SampleConfig
from guided_diffusion.diffusion.samplers import SAMPLERS

LARGE = {**{name: value for name, value in BASE.items() if name != "image_size"}, "large_size": 8, "small_size": 4}
PLAIN = {**BASE, "class_cond": False, "num_classes": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    kinds = {"base": ("diffusion", BASE), "plain": ("diffusion", PLAIN), "large": ("super_resolution", LARGE)}
    for name, (kind, flags) in {**kinds, "classifier": ("classifier", CRITIC)}.items():
        gd.save(filled(kind, flags), str(root / name))
    return root


@pytest.fixture(scope="module")
def loaded(models: Path) -> dict[str, Any]:
    return {path.name: gd.load(str(path)) for path in models.iterdir()}


def commanded(words: str, out: Path) -> np.ndarray:
    assert main([*words.split(), "--seed", "7", "--batch_size", "2", "--device", "cpu", "--out", str(out)]) == 0
    with np.load(next(out.glob("samples_*.npz"))) as found:
        return np.asarray(found["arr_0"])


def test_the_command_s_images(models: Path, loaded: dict[str, Any], tmp_path: Path) -> None:
    words = (
        f"sample --model_path {models}/base --classifier_path {models}/classifier --classifier_scale 3 --sampler ddim "
    )
    words += "--eta 0.5 --timestep_respacing 4 --num_samples 5 --classes 1,3 --labels balanced"
    guidance = gd.classifier(loaded["classifier"], scale=3.0)
    options: dict[str, Any] = {"sampler": "ddim", "eta": 0.5, "steps": 4, "seed": 7, "batch_size": 2}
    images = gd.sample(loaded["base"], labels=[1, 3, 1, 3, 1], guidance=guidance, **options)
    assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(images, commanded(words, tmp_path))
    assert not np.array_equal(images, gd.sample(loaded["base"], labels=[1, 3, 1, 3, 1], **options))


def test_the_command_s_large_images(models: Path, loaded: dict[str, Any], tmp_path: Path) -> None:
    small = np.random.RandomState(0).randint(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "small.npz", small, np.array([2, 0, 1]))
    words = f"upsample --model_path {models}/large --base_samples {tmp_path}/small.npz --timestep_respacing ddim5"
    images = gd.sample(loaded["large"], labels=[2, 0, 1], low_res=small, steps="ddim5", seed=7, batch_size=2)
    np.testing.assert_array_equal(images, commanded(words, tmp_path / "out"))


def test_models_without_classes(models: Path, loaded: dict[str, Any], tmp_path: Path) -> None:
    images = gd.sample(loaded["plain"], num_images=3, steps=3, seed=7, batch_size=2)
    np.testing.assert_array_equal(
        images, commanded(f"sample --model_path {models}/plain --timestep_respacing 3 --num_samples 3", tmp_path)
    )


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("base", {"num_images": 2}, "labels is missing"),
        ("plain", {"labels": [1]}, "labels is given, but this model takes no labels"),
        ("plain", {}, "num_images is missing"),
        ("large", {"labels": [1]}, "low_res is missing"),
        ("base", {"labels": [1, 4]}, r"there are the classes 0 to 3"),
        ("base", {"labels": [1], "sampler": "euler"}, "sampler is 'euler'; it must be one of ancestral, ddim"),
    ],
)
def test_mistakes_are_named(loaded: dict[str, Any], model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gd.sample(loaded[model], **options)


def test_a_classifier_of_other_images_is_refused(loaded: dict[str, Any]) -> None:
    other = filled("classifier", {**CRITIC, "num_classes": 9})
    with pytest.raises(ValueError, match="differ in number of classes"):
        gd.sample(loaded["base"], labels=[1], guidance=gd.classifier(other))
    with pytest.raises(ValueError, match="must be a finite number"):
        gd.classifier(other, scale=float("nan"))


def test_flag_and_room_offer_the_same_samplers() -> None:
    choices = SampleConfig.__dataclass_fields__["sampler"].metadata["choices"]
    assert [name for name in choices if name] == list(SAMPLERS)
