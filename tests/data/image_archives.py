"""Folders, zips and tars of small images, for the tests of this folder."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.data.listing import Records, list_records
from guided_diffusion.data.sources import open_source

Member = tuple[str, bytes]


def picture(k: int) -> bytes:
    """A png that is 20 k all over."""
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 20 * k, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def pixels(records: Records) -> list[np.ndarray]:
    source = open_source(records.kind, records.root)
    return [source.read(path) for path in records.paths]


def grey_levels(path: Path | str) -> list[int]:
    """Which pictures were listed, in order."""
    return [int(image[0, 0, 0]) // 20 for image in pixels(list_records(path, labels="none"))]


def make_zip(path: Path, members: Sequence[Member]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name  # as it is: the module would tidy it
            archive.writestr(info, content)
    return path


def make_tar(path: Path, members: Sequence[Member], links: Sequence[tuple[str, str, bytes]] = ()) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


def make_folder(path: Path, members: Sequence[Member]) -> Path:
    for name, content in members:
        target = path / name.replace("\\", "/").lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return path


MAKERS: dict[str, Callable[..., Path]] = {"a.zip": make_zip, "a.tar": make_tar, "a": make_folder}
CLASSES = [(f"{c}/{k}.png", picture(k)) for k, c in enumerate(("cat", "dog", "cat", "dog"))]
