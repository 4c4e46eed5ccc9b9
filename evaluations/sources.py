"""The interface of all sets of images, and sets of encoded pictures: folders, zip files, tars and all else that training reads.

Pictures are listed and decoded by the code that training uses. Every set gives uint8 batches [N, H, W, 3].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from guided_diffusion.data.images import as_array
from guided_diffusion.data.labels import Labels
from guided_diffusion.data.sources import list_source

from .statistics import Stored

_MIXED = "images of different sizes: each is resized to 299x299 from its own size"
MAX_BATCH_BYTES = 1 << 25  # a batch of large images holds fewer than batch_size of them


class ImageSource:
    """Images in a fixed order; the base of all kinds of input."""

    conversion = ""
    """What else the pixels depend on besides the stored content (a declared value range, a crop), for the key of shards."""

    def __init__(self, name: str, count: int | None) -> None:
        self.name = name
        self.count = count
        """Number of images; None while it is unknown (an iterable that has not been read to its end)."""
        self.notes: list[str] = []
        """Notes for the report about conversions and the format."""

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(H, W, 3) after conversion; None when sizes differ or are not known yet."""
        return None

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """uint8 [n, H, W, 3] with 1 <= n <= batch_size, images [start, stop) in order, one size per batch.

        Large images come in smaller batches, so that a batch or two need little memory.
        """
        return iter(())

    def labels(self) -> np.ndarray | None:
        """int64 [N] class of each image, or None. ValueError for invalid labels, so call it only if labels are needed."""
        return None

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number, if this set numbers its classes in the order of names; else ()."""
        return ()

    def want_labels(self) -> None:
        """Announce that labels will be needed; ValueError for invalid ones now, before the images are read."""
        self.labels()

    def statistics(self) -> Stored | None:
        """Precomputed statistics that come with the images; ValueError for damaged ones."""
        return None

    def sha256(self) -> str:
        """Hash of the content: of the file, or of names and contents of all members in order."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Add a note for the report, unless it is there already."""
        if text not in self.notes:
            self.notes.append(text)


class PictureSource(ImageSource):
    """Encoded pictures, with the order and the classes that training would use."""

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
