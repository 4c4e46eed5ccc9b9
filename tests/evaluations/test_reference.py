from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations import reference, statistics
from evaluations.features import extract
from evaluations.inputs import open_images


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth shapes and noise, not square."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / rng.uniform(3, 30) + columns / rng.uniform(3, 30) + rng.uniform(0, 6)) for _ in range(3)]
    return np.clip(120 + 80 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (97, 131), (300, 201)])
def test_crop_follows_the_published_steps(shape: tuple[int, int]) -> None:
    """Written once more, step by step, without a loop."""
    size, picture = 32, Image.fromarray(photograph(*shape, seed=1))
    halvings = int(np.floor(np.log2(min(shape) / size)))
    for _ in range(halvings):
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    ratio = size / min(picture.size)
    whole = np.asarray(picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.BICUBIC))
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    expected = whole[top : top + size, left : left + size]
    np.testing.assert_array_equal(
        reference.center_crop(np.asarray(Image.fromarray(photograph(*shape, seed=1))), size), expected
    )


@pytest.mark.slow
def test_reference_of_a_folder(tmp_path: Path, net) -> None:
    for number in range(5):
        folder = tmp_path / "data" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(40 + number, 50, number)).save(folder / f"{number}.png")
    receipt = reference.make_reference(
        str(tmp_path / "data"), tmp_path / "ref.npz", image_size=16, net=net, keep=3, seed=1
    )
    with np.load(tmp_path / "ref.npz") as made:
        assert set(made.files) == {"arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s", "receipt"}
        assert made["arr_0"].shape == (3, 16, 16, 3) and made["arr_0"].dtype == np.uint8
        assert made["mu"].shape == (2048,) and made["sigma_s"].shape == (2023, 2023)
        assert json.loads(made["receipt"].tobytes()) == receipt
        labels, kept, mu, sigma = made["arr_1"], made["arr_0"], made["mu"], made["sigma"]
    source = reference.CroppedImages(open_images(str(tmp_path / "data")), 16)
    everything = np.concatenate(list(source.batches(2)))
    chosen = np.sort(np.random.default_rng(1).choice(5, 3, replace=False))
    np.testing.assert_array_equal(kept, everything[chosen])
    assert labels.tolist() == source.labels()[chosen].tolist()
    expected = statistics.from_features(extract(everything, net).pool)
    np.testing.assert_array_equal(mu, expected.mu)
    np.testing.assert_array_equal(sigma, expected.sigma)
    assert receipt["images"] == 5 and receipt["preparation"] == ["centre crop to 16x16: box halving, then bicubic"]
    assert open_images(str(tmp_path / "ref.npz")).statistics() is not None


def test_mistakes(tmp_path: Path, net) -> None:
    with pytest.raises(ValueError, match="image_size is 0"):
        reference.make_reference(np.zeros((2, 4, 4, 3), np.uint8) + 9, tmp_path / "r.npz", image_size=0, net=net)
    for wrong in ({"keep": 0}, {"keep": -1}, {"seed": -1}):  # known before an image is encoded
        with pytest.raises(ValueError, match="they must be at least 1 and 0"):
            reference.make_reference(tmp_path / "nowhere", tmp_path / "x.npz", image_size=8, net=net, **wrong)
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        reference.make_reference(np.zeros((1, 4, 4, 3), np.uint8) + 9, tmp_path / "r.npz", image_size=4, net=net)
