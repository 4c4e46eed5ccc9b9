"""What every set of images offers, wherever it comes from. Everything reaches the network as uint8 [N, H, W, 3]."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .statistics import Stored

MAX_BATCH_BYTES = 1 << 25  # of images that wait to be resized, however many were asked for


class ImageSource:
    """Images in a fixed order; the base of all kinds of input."""

    conversion = ""
    """What decides about the pixels beside the content (a declared value range, a crop): part of their identity."""

    def __init__(self, name: str, count: int | None) -> None:
        self.name = name
        self.count = count
        """How many images; None while that is not known (batches as they are made)."""
        self.notes: list[str] = []
        """How pixels were converted, for the report."""

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
        """int64 [N] class of each image, or None. ValueError for labels that are no classes: read them only if needed."""
        return None

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number, where classes are numbered by name within this set; else none."""
        return ()

    def want_labels(self) -> None:
        """Labels will be needed: refuse bad ones now, before the images are read."""
        self.labels()

    def statistics(self) -> Stored | None:
        """Precomputed statistics that come with the images; ValueError for damaged ones."""
        return None

    def sha256(self) -> str:
        """Identity of the content: of the file, or of the names and contents of all members in order."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Remember a conversion for the report, once."""
        if text not in self.notes:
            self.notes.append(text)
