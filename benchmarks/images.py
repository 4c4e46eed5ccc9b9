"""Images per second of the loader: from packed arrays and from JPEG files, against decoding them plainly."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from .timing import Ratio, compare


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Smooth random JPEG pictures of a usual size."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for k in range(count):
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (size[1], size[0], 3))
        pixels = np.clip(np.asarray(picture).astype(np.int16) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k % 2}_{k:05d}.jpg", quality=90)


def loader(*, rounds: int, count: int, image_size: int = 64, batch: int = 16) -> list[Ratio]:
    """A batch of uint8 images: packed against files, and files against reading, cropping and scaling in plain PIL."""
    from PIL import Image

    from guided_diffusion.data.images import center_crop
    from guided_diffusion.data.listing import list_records
    from guided_diffusion.data.loader import make_batches
    from guided_diffusion.data.packed import pack

    with tempfile.TemporaryDirectory() as folder:
        files, packed = Path(folder) / "files", Path(folder) / "packed"
        files.mkdir()
        write_pictures(files, count)
        pack(list_records(str(files)), str(packed), image_size)
        options = {"image_size": image_size, "batch_size": batch}
        from_files = make_batches(list_records(str(files)), **options)  # type: ignore[arg-type]
        from_packed = make_batches(list_records(str(packed)), **options)  # type: ignore[arg-type]
        paths = sorted(files.iterdir())
        place = iter(range(10**9))

        def plain() -> np.ndarray:
            pixels = []
            for _ in range(batch):
                with open(paths[next(place) % count], "rb") as file:
                    image = Image.open(file)
                    image.load()
                array = center_crop(np.asarray(image.convert("RGB")), image_size)
                pixels.append(np.transpose(array.astype(np.float32) / 127.5 - 1, [2, 0, 1]))
            return np.stack(pixels)

        what = f"batch of {batch} at {image_size} px"
        rows = [
            compare(f"{what}, from files", lambda: next(from_files), plain, against="plain decoding", rounds=rounds),
            compare(f"{what}, packed", lambda: next(from_packed), plain, against="plain decoding", rounds=rounds),
        ]
        for batches in (from_files, from_packed):
            close = getattr(batches, "close", None)
            if close is not None:
                close()
    from dataclasses import replace

    return [replace(row, note=f"{batch / row.ours_seconds:.0f} images/s") for row in rows]
