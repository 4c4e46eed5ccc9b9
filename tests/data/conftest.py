"""Real photographs and small folders of pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Writer = Callable[..., Path]


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Two photographs, uint8 [427, 640, 3], and a scan of a digit, uint8 [8, 8, 3]."""
    found = importlib.util.find_spec("sklearn")  # its files are enough; to import it takes seconds
    if found is None or not found.origin:
        pytest.skip("needs scikit-learn's sample images")
    folder = Path(found.origin).parent / "datasets"
    photographs = [np.asarray(Image.open(folder / "images" / name)) for name in ("china.jpg", "flower.jpg")]
    digit = np.loadtxt(folder / "data" / "digits.csv.gz", delimiter=",", max_rows=8)[7, :64].reshape(8, 8)
    return [*photographs, np.repeat((digit * 15.9).astype(np.uint8)[..., None], 3, axis=2)]


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
