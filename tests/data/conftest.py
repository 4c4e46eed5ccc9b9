"""Real photographs and small folders of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Writer = Callable[..., Path]


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Two photographs, uint8 [427, 640, 3], and a scan of a digit, uint8 [8, 8, 3]."""
    datasets = pytest.importorskip("sklearn.datasets")
    digit = (datasets.load_digits().images[7] * 15.9).astype(np.uint8)
    return [*datasets.load_sample_images().images, np.repeat(digit[..., None], 3, axis=2)]


@pytest.fixture
def write_pictures(tmp_path: Path) -> Writer:
    """Write one small random picture per name into a folder and return the folder."""

    def write(*names: str, folder: str = "pictures", mode: str = "RGB") -> Path:
        root = tmp_path / folder
        for k, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (9 + k % 4, 12 + k % 3, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
            pixels = np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels.squeeze()).save(path)
        root.mkdir(exist_ok=True)
        return root

    return write
