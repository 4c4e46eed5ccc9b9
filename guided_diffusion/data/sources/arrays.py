"""Packed data: arrays of cropped images that are mapped into memory. `data/packed.py` writes them and describes the files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from ...runtime import storage
from ..labels import NONE, Labels
from .source import Read, Source

PACKED_INDEX = "packed.json"
_KEYS = {"format", "preprocessing", "class_names", "label_source", "skipped"}


def read_packed_index(root: str) -> dict[str, Any]:
    """The index of packed data; ValueError if it is another file, or of a version this code does not know."""
    path = storage.join(root, PACKED_INDEX)
    try:
        index: dict[str, Any] = json.loads(storage.read_bytes(path))
        version = index.get("format", 1)
        if version == 1:  # check now that all keys which are read later exist
            _, _, _ = (range(side) for side in index["shape"])
            _, _ = range(index["count"]), itemgetter(*_KEYS)(index)
            for entry in index["shards"][:]:  # a list
                itemgetter("file", "count", "sha256")(entry)
            if index["labels"] is not None:
                itemgetter("file", "sha256")(index["labels"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        known = "not the index of packed data that `data pack` writes"
        raise ValueError(f"{path}: {known} ({type(error).__name__}: {str(error)[:200]}); give another folder") from None
    if version != 1:
        raise ValueError(f"{root!r}: packed data of format {version!r}; this version reads format 1: pack it again")
    if storage.is_remote(root):
        raise ValueError(f"{root!r}: packed data is memory-mapped; copy it to a local disk first")
    return index


class Packed(Source):
    """The address of an image is its row, counted through all files."""

    kind, marker = "packed", PACKED_INDEX
    all_images = threads_share = True
    fatal = (OSError, EOFError)  # the file holds thousands of images, not one

    @cached_property
    def _index(self) -> dict[str, Any]:
        return read_packed_index(self.root)

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        height, width, _ = self._index["shape"]
        self.preprocessing, self.stored_size = self._index["preprocessing"], (height, width)
        return {str(row): str(row) for row in range(int(self._index["count"]))}

    def own_labels(self) -> Labels:
        if self._index["labels"] is None:
            return NONE
        path, count = os.path.join(self.root, self._index["labels"]["file"]), len(self.names)
        try:
            numbers = np.load(path, allow_pickle=False)
            if numbers.shape != (count,) or numbers.dtype.kind not in "iu":
                raise ValueError(f"{numbers.dtype} of shape {numbers.shape}; must be {count} whole numbers")
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; pack the data again") from None
        return Labels(numbers, tuple(self._index["class_names"]), self._index["label_source"])

    def open(self) -> Read:
        shards = self._index["shards"]
        begins = np.cumsum([0, *(shard["count"] for shard in shards)])[:-1]
        arrays: dict[int, np.ndarray] = {}

        def read(address: str) -> np.ndarray:
            row = int(address)
            k = int(np.searchsorted(begins, row, side="right")) - 1
            if k not in arrays:
                arrays[k] = np.load(os.path.join(self.root, shards[k]["file"]), mmap_mode="r", allow_pickle=False)
            return np.array(arrays[k][row - begins[k]])

        return read
