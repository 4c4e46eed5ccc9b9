"""Pictures as image sources: folders, zip files, tars and whatever else training reads, listed and decoded by the same code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from guided_diffusion.data.images import as_array
from guided_diffusion.data.labels import Labels
from guided_diffusion.data.sources import list_source

from .sources import MAX_BATCH_BYTES, ImageSource

_MIXED = "images of different sizes: each is resized to 299x299 from its own size"


class PictureSource(ImageSource):
    """Encoded pictures in the order in which training lists them, with the classes that it would take."""

    def __init__(self, name: str) -> None:
        self._listed = list_source(name)
        super().__init__(name, len(self._listed.paths))
        if self._listed.left_out:
            self.note(self._listed.left_out)
        if any(name.lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif")) for name in self._listed.names):
            self.note("JPEG files: compression artefacts move scores; compare with PNG or npz only with care")

    @cached_property
    def shape(self) -> tuple[int, int, int] | None:
        packed = self._listed.stored_size
        sizes = iter([packed]) if packed else (self._listed.size(path) for path in self._listed.paths)
        first = next(sizes)
        if all(size == first for size in sizes):
            return (*first, 3)
        self.note(_MIXED)
        return None

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        pending: list[np.ndarray] = []
        for path in self._listed.paths[start:stop]:
            image = self._decode(path)
            if pending and pending[0].shape != image.shape:
                self.note(_MIXED)
                yield np.stack(pending)
                pending = []
            pending.append(image)
            if len(pending) == batch_size or len(pending) * image.nbytes >= MAX_BATCH_BYTES:
                yield np.stack(pending)
                pending = []
        if pending:
            yield np.stack(pending)

    def _decode(self, path: str) -> np.ndarray:
        if self._listed.kind == "packed":
            return self._listed.read(path)
        with self._listed.opened(path) as picture:
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                self.note("images with transparency: it is dropped, as in training")
            elif picture.mode in ("L", "1") or picture.mode.startswith("I"):
                self.note("grey images: the one channel is used for red, green and blue")
            elif picture.mode != "RGB":
                self.note(f"images in mode {picture.mode}: converted to RGB")
            return as_array(picture, 3)

    def labels(self) -> np.ndarray | None:
        return self._labels.numbers

    def class_names(self) -> tuple[str, ...]:
        return self._labels.class_names

    @cached_property
    def _labels(self) -> Labels:
        return self._listed.labels()

    def sha256(self) -> str:
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for name, path in zip(self._listed.names, self._listed.paths):
            content = hashlib.sha256(self._listed.encoded(path)).hexdigest()
            digest.update(f"{len(name)}:{name} {content}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
