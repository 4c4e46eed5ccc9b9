"""Pictures as image sources: folders, zip files and tar shards (WebDataset), decoded with Pillow one by one."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from .inputs import ImageSource
from .npy import MAX_DEFLATE_RATIO

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
MAX_FILE_BYTES = 1 << 28
MAX_PIXELS = 1 << 26
_MIXED = "images of different sizes: each is resized to 299x299 from its own size"


class PictureSource(ImageSource):
    """Encoded pictures in a fixed order; subclasses list and read them.

    Classes are the names of the folders that hold the pictures, numbered in sorted order.
    """

    def __init__(self, name: str, members: list[str], skipped: int) -> None:
        if not members:
            raise ValueError(f"{name} holds no images (looked for {', '.join(sorted(SUFFIXES))})")
        super().__init__(name, len(members))
        self.members = members
        self._shape: tuple[int, int, int] | None = None
        self._scanned = False
        self._sha256 = ""
        if skipped:
            self.tell(f"{skipped} files that are not images were left out")
        if any(_suffix(member) in (".jpg", ".jpeg") for member in members):
            self.tell("JPEG files: compression artefacts move scores; compare with PNG or npz only with care")

    def read(self, index: int) -> bytes:
        """The encoded bytes of one picture."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int, int] | None:
        if not self._scanned:
            first: tuple[int, int] | None = None
            same = True
            for index in range(len(self.members)):
                size = self._header(index)
                first = first or size
                if size != first:
                    same = False
                    self.tell(_MIXED)
                    break
            assert first is not None
            self._shape = (first[1], first[0], 3) if same else None
            self._scanned = True
        return self._shape

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        pending: list[np.ndarray] = []
        for index in range(start, min(stop if stop is not None else len(self.members), len(self.members))):
            image = self._decode(index)
            if pending and pending[0].shape != image.shape:
                self.tell(_MIXED)
                yield np.stack(pending)
                pending = []
            pending.append(image)
            if len(pending) == batch_size:
                yield np.stack(pending)
                pending = []
        if pending:
            yield np.stack(pending)

    def _header(self, index: int) -> tuple[int, int]:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.read(index))) as picture:
                return picture.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.members[index]} in {self.name} cannot be read as an image: {error}") from error

    def _decode(self, index: int) -> np.ndarray:
        from PIL import Image

        name = f"{self.members[index]} in {self.name}"
        try:
            with Image.open(io.BytesIO(self.read(index))) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"{picture.width}x{picture.height} pixels, at most {MAX_PIXELS} in all")
                mode = picture.mode
                if mode.startswith(("I", "F")):
                    raise ValueError(f"mode {mode}: more than 8 bits per channel; convert it to 8 bits first")
                if mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                    self.tell("images with transparency: it is dropped, as the 2021 data loader does")
                elif mode in ("L", "1"):
                    self.tell("grey images: the one channel is used for red, green and blue")
                elif mode != "RGB":
                    self.tell(f"images in mode {mode}: converted to RGB")
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} cannot be read as an image: {error}") from error

    def labels(self) -> np.ndarray | None:
        folders = [str(PurePosixPath(member).parent) for member in self.members]
        names = sorted(set(folders))
        if len(names) < 2:
            return None
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[folder] for folder in folders], np.int64)

    def sha256(self) -> str:
        if not self._sha256:
            digest = hashlib.sha256()
            for index, member in enumerate(self.members):
                content = hashlib.sha256(self.read(index)).hexdigest()
                digest.update(f"{len(member)}:{member} {content}\n".encode("utf-8", "surrogateescape"))
            self._sha256 = digest.hexdigest()
        return self._sha256


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _hidden(name: str) -> bool:
    return any(part == "__MACOSX" or part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)


class FolderSource(PictureSource):
    """All pictures below a folder, sorted by path."""

    def __init__(self, name: str) -> None:
        self._root = Path(name)
        names = []
        for folder, _, files in os.walk(name):
            names += [(Path(folder) / file).relative_to(name).as_posix() for file in files]
        names = [found for found in names if not _hidden(found)]
        members = sorted(found for found in names if _suffix(found) in SUFFIXES)
        super().__init__(name, members, len(names) - len(members))

    def read(self, index: int) -> bytes:
        path = self._root / self.members[index]
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()


class ZipSource(PictureSource):
    """All pictures of a zip file, sorted by path."""

    def __init__(self, name: str) -> None:
        with zipfile.ZipFile(name) as archive:
            found = [info for info in archive.infolist() if not info.is_dir() and not _hidden(info.filename)]
        self._infos = {info.filename: info for info in found if _suffix(info.filename) in SUFFIXES}
        for info in self._infos.values():
            if info.flag_bits & 1:
                raise ValueError(f"{info.filename} in {name} is encrypted")
            if info.file_size > min(MAX_FILE_BYTES, info.compress_size * MAX_DEFLATE_RATIO + 64):
                raise ValueError(f"{info.filename} in {name} claims {info.file_size} bytes, which is too much")
        self._archive: zipfile.ZipFile | None = None
        super().__init__(name, sorted(self._infos), len(found) - len(self._infos))

    def read(self, index: int) -> bytes:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.name)
        info = self._infos[self.members[index]]
        try:
            with self._archive.open(info) as file:
                return file.read(info.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{info.filename} in {self.name} is damaged: {error}") from error


class TarSource(PictureSource):
    """Pictures in tar shards, in the order in which they are stored; `.cls` members beside them are labels."""

    def __init__(self, name: str, shards: list[str]) -> None:
        self._places: list[tuple[str, int, int]] = []
        members, skipped = [], 0
        classes: dict[tuple[str, str], tuple[str, int, int]] = {}
        for shard in shards:
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        if not member.isfile() or _hidden(member.name):
                            continue
                        place = (shard, member.offset_data, member.size)
                        if member.issparse() or member.size > MAX_FILE_BYTES:
                            raise ValueError(
                                f"{member.name} in {shard} is sparse or larger than {MAX_FILE_BYTES} bytes"
                            )
                        if member.offset_data + member.size > os.path.getsize(shard):
                            raise ValueError(f"{member.name} in {shard} is cut off")
                        if _suffix(member.name) in SUFFIXES:
                            members.append(member.name)
                            self._places.append(place)
                        elif member.name.endswith(".cls"):
                            classes[shard, member.name.removesuffix(".cls")] = place
                        else:
                            skipped += 1
            except (tarfile.TarError, EOFError, OSError) as error:
                raise ValueError(
                    f"{shard} is no readable tar file (compressed ones: unpack to .tar): {error}"
                ) from error
        self._classes = [classes.get((place[0], _key(member))) for member, place in zip(members, self._places)]
        super().__init__(name, members, skipped)

    def read(self, index: int) -> bytes:
        return _piece(*self._places[index])

    def labels(self) -> np.ndarray | None:
        if all(place is None for place in self._classes):
            return super().labels()
        labels = []
        for member, place in zip(self.members, self._classes):
            if place is None:
                raise ValueError(f"{member} in {self.name} has no .cls label where others have one")
            text = _piece(*place[:2], min(place[2], 32)).strip()
            if not text.isdigit():
                raise ValueError(f"the label of {member} in {self.name} is {text!r}, expected a whole number")
            labels.append(int(text))
        return np.array(labels, np.int64)


def _key(member: str) -> str:
    """WebDataset key: the path up to the first dot of the file name."""
    path = PurePosixPath(member)
    return str(path.with_name(path.name.split(".")[0]))


def _piece(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
