"""Conversion of stored arrays to uint8 [N, H, W, 3]: layouts, value ranges, and notes about them for the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Bounds = tuple[float, float]
Apply = Callable[[np.ndarray], np.ndarray]


class Conversion(NamedTuple):
    """A function from stored images to uint8 [N, height, width, 3], and notes about the conversion."""

    height: int
    width: int
    apply: Apply
    notes: tuple[str, ...]


def plan(name: str, dtype: np.dtype, shape: tuple[int, ...], bounds: Bounds | None) -> Conversion:
    """Decide the conversion from shape, dtype and, unless that is uint8, the least and greatest of all values.

    ValueError for what cannot be images: a wrong guess, such as [0, 1] read as 0..255, would give a plausible but wrong score.
    """
    if len(shape) == 3:
        layout, (height, width), channels = "NHW", shape[1:], 1
    elif len(shape) == 4 and shape[3] in (1, 3):
        layout, (height, width), channels = "NHWC", shape[1:3], shape[3]
    elif len(shape) == 4 and shape[1] in (1, 3):
        layout, (height, width), channels = "NCHW", shape[2:], shape[1]
    else:
        hint = " (transparency has to be blended into a background first)" if len(shape) == 4 and 4 in shape[1:] else ""
        raise ValueError(f"{name} has shape {shape} and dtype {dtype}, expected [N, H, W, 3] uint8{hint}")
    if height < 1 or width < 1:
        raise ValueError(f"{name} has shape {shape}: images without pixels")
    to_uint8, note = _values(name, dtype, bounds)
    notes = [note] if note else []
    if channels == 1:
        notes.insert(0, "grey images: the one channel is used for red, green and blue")
    if layout == "NCHW":
        notes.insert(0, f"channels come before rows, shape {shape}: read as [N, C, H, W]")

    def apply(images: np.ndarray) -> np.ndarray:
        images = to_uint8(images)
        if layout == "NHW":
            images = images[..., None]
        elif layout == "NCHW":
            images = images.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images if channels == 3 else np.repeat(images, 3, axis=3))

    return Conversion(height, width, apply, tuple(notes))


def refuse_one_image(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """ValueError for the shape [H, W, 3] or [3, H, W], which would be read as H or three grey images."""
    if len(shape) == 3 and (shape[2] <= 4 or shape[0] in (3, 4)):
        raise ValueError(
            f"{name} has shape {shape} and dtype {dtype}: one image without the axis that counts images? "
            "Give many images as [N, H, W, 3] (numpy.stack joins single ones), grey ones as [N, H, W, 1]"
        )


def refuse_binary(name: str, images: np.ndarray) -> None:
    """ValueError for uint8 images of 0 and 1 only: probably floats in [0, 1] that were cast to uint8."""
    if images.dtype == np.uint8 and images.max(initial=0) == 1:
        raise ValueError(
            f"{name} holds only 0 and 1 ({images.dtype}) in its first images: floats in [0, 1] that were cast to "
            "integers? Multiply by 255 before the cast."
        )


def _values(name: str, dtype: np.dtype, bounds: Bounds | None) -> tuple[Apply, str]:
    """A function from stored values to uint8 0..255, and a note about it."""
    if dtype == np.uint8:
        return lambda images: images, ""
    if dtype.kind == "b":
        raise ValueError(f"{name} holds truth values (bool), expected uint8 images 0..255: multiply by 255")
    assert bounds is not None
    low, high = bounds
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} holds values that are not finite (nan or infinity)")
    found = f"{name} holds {dtype.name} from {low:g} to {high:g}"
    if dtype.kind in "iu":
        if low < 0 or high > 255:
            raise ValueError(f"{found}, expected 0..255. Convert the images to uint8 0..255 and save them again.")
        if high <= 1:
            raise ValueError(
                f"{found}: floats in [0, 1] that were cast to integers? Save uint8 images 0..255: multiply by 255 before the cast."
            )
        note = f"{dtype.name} images within 0..255 (from {low:g} to {high:g}): taken as uint8"
        return lambda images: images.astype(np.uint8), note
    if low >= 0 and high <= 1:
        note = f"{dtype.name} images in [0, 1]: taken as round(255 x)"
        return lambda images: np.rint(images.astype(np.float32) * 255).astype(np.uint8), note
    if low >= -1 and high <= 1:
        note = f"{dtype.name} images in [-1, 1]: taken as round(127.5 (x + 1))"
        return lambda images: np.rint((images.astype(np.float32) + 1) * 127.5).astype(np.uint8), note
    raise ValueError(
        f"{found}; expected uint8, or floats in [0, 1] or [-1, 1]. Convert the images to uint8 0..255 and save them again."
    )


def declared_bounds(value_range: Bounds | None, dtype: np.dtype) -> Bounds | None:
    """The bounds that a user declares for floats, else None."""
    if value_range is None or dtype.kind != "f":
        return None
    if tuple(value_range) not in ((0, 1), (-1, 1)):
        raise ValueError(f"value_range is {value_range}, allowed are (0, 1) and (-1, 1)")
    return float(value_range[0]), float(value_range[1])


def check_bounds(name: str, images: np.ndarray, bounds: Bounds | None) -> None:
    """ValueError for values outside the declared bounds."""
    if bounds is not None and not (images.min() >= bounds[0] and images.max() <= bounds[1]):
        raise ValueError(f"{name}: values from {images.min()} to {images.max()} where {bounds} was declared")
