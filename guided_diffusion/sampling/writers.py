"""Images to files: an npz written part by part, and an overview picture."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence

import numpy as np

from ..runtime import storage

# Small images are enlarged to about this many pixels in the overview picture.
_TILE = 64


def write_npz(path: str, parts: Iterable[np.ndarray], shape: Sequence[int], labels: np.ndarray | None = None) -> None:
    """Write `arr_0` (uint8 parts joined along the first axis, `shape` in all) and, where given, `arr_1` (labels, int64).

    Holds one part in memory at a time. The file appears complete or not at all. ValueError unless parts add up to `shape`.
    """
    with storage.atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for part in parts:
                if part.shape[1:] != tuple(shape[1:]) or part.dtype != np.uint8:
                    raise ValueError(f"a part of {path} is {part.dtype} {part.shape}; wanted uint8 [*, {shape[1:]}]")
                member.write(np.ascontiguousarray(part).data)
                written += len(part)
            if written != shape[0]:
                raise ValueError(f"{path} got {written} images instead of {shape[0]}")
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)


def class_captions(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """The class name of each label, or its number if the class has no name."""
    return [class_names[k] if k < len(class_names) else str(k) for k in labels.tolist()]


def write_grid(
    path: str,
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    smooth: bool = False,
) -> None:
    """Write images (uint8 `[N, H, W, C]`, C of 1 or 3, N > 0) side by side as one PNG, each with its caption below.

    Images of other channel counts show their first one. With as many captions as lines, each is that of a line. `smooth`: small images
    are enlarged with bicubic interpolation, else pixel by pixel.
    """
    from PIL import Image, ImageDraw

    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    factor = max(1, _TILE // max(height, width))
    tile_height, tile_width = height * factor, width * factor
    line = 12 if captions else 0
    per_line = columns if captions and len(captions) == rows else 1
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    picture = Image.new("RGB", (columns * (tile_width + 2) + 2, rows * (tile_height + line + 2) + 2), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for k, pixels in enumerate(images):
        tile = Image.fromarray(pixels if channels == 3 else pixels[..., 0]).convert("RGB")
        x, y = 2 + k % columns * (tile_width + 2), 2 + k // columns * (tile_height + line + 2)
        picture.paste(tile.resize((tile_width, tile_height), method), (x, y))
        if captions and k % per_line == 0:
            text = captions[k // per_line][: max(1, per_line * tile_width // 6)]
            draw.text((x, y + tile_height), text, fill=(0, 0, 0))
    with storage.atomic_write(path) as file:
        picture.save(file, format="PNG")
