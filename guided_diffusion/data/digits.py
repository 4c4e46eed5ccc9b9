"""The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships, as image files.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998; CC BY 4.0.
"""

from __future__ import annotations

from pathlib import Path

_HELD_OUT = 5  # every fifth digit is kept from training, for the classifier's validation


def write_digits(folder: Path) -> tuple[str, str]:
    """Write the digits as 8x8 grey PNG files, `train/DIGIT/NNNN.png` and `val/DIGIT/NNNN.png`; returns both folders."""
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the demo's digits come with scikit-learn: pip install 'guided-diffusion[demo]'") from None

    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        split = "val" if index % _HELD_OUT == 0 else "train"
        path = folder / split / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(path)
    return str(folder / "train"), str(folder / "val")
