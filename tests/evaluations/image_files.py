"""Image sets written in every readable kind of file, for the tests of reading."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluations.inputs import open_images


def all_of(source, batch_size: int = 3, **where) -> np.ndarray:
    return np.concatenate(list(open_images(source).batches(batch_size, **where)))


def store(images: np.ndarray, kind: str, folder: Path):
    """Save the images in one of the readable kinds and return what to open."""
    path = folder / f"images.{kind}"
    if kind == "npz":
        np.savez(path, images, np.arange(len(images)))
    elif kind in ("deflated", "fortran", "fortran deflated"):
        path = folder / f"{kind.replace(' ', '_')}.npz"
        save = np.savez_compressed if "deflated" in kind else np.savez
        save(path, np.asfortranarray(images) if "fortran" in kind else images)
    elif kind.startswith("npy"):
        path = folder / "images.npy"
        with open(path, "wb") as file:
            np.lib.format.write_array(file, images, version=(2, 0) if kind == "npy 2.0" else None)
    elif kind == "folder":
        path = folder / "pictures"
        for i, image in enumerate(images):
            (path / f"sub{i // 4}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / f"sub{i // 4}" / f"{i:03d}.png")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for i in reversed(range(len(images))):
                archive.writestr(f"a/{i:03d}.png", encoded(images[i]))
    elif kind == "tar":
        path = folder / "shard-{000..001}.tar"
        for shard in range(2):
            with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as archive:
                for i in range(shard * 4, min(shard * 4 + 4, len(images))):
                    add(archive, f"{i:03d}.png", encoded(images[i]))
                    add(archive, f"{i:03d}.cls", str(i).encode())
    elif kind == "list":
        return [images[:2], torch.from_numpy(images[2:6]), images[6:]]
    elif kind == "array":
        return images
    return str(path)


def encoded(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
