"""A path -> records: which images there are, in a fixed order, and the class of each.

The order is that of the 2021 release (the names of each folder sorted, a folder's images where its name stands), so class numbers
made from file-name prefixes agree with checkpoints trained then.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..runtime import storage
from ..runtime.streams import TRAIN, key_of
from . import labels as tables
from . import sources


@dataclass(frozen=True, eq=False)
class Records:
    """Images in a fixed order. A path opens as a file if `kind` is "files"; else it is an address for `sources.open_source`."""

    paths: tuple[str, ...]
    labels: np.ndarray | None = None  # int64 [len(paths)], each in 0 .. len(class_names) - 1
    class_names: tuple[str, ...] = ()
    label_source: str = "none"  # "folders", "prefix", "none", or the table they were read from
    kind: str = "files"  # a key of `sources.SOURCES`
    root: str = ""
    preprocessing: str = ""  # what was done to the images already; see images.preprocessing_id
    stored_size: tuple[int, int] | None = None  # (height, width) of packed images
    empty_folders: tuple[str, ...] = ()  # beside the class folders, but without an image
    left_out: str = ""  # a sentence about the files that are not read

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.paths):
            raise ValueError(f"{len(self.labels)} labels for {len(self.paths)} images")

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, places: slice | Sequence[int]) -> Records:
        """Some of the records; classes keep their numbers."""
        paths = self.paths[places] if isinstance(places, slice) else tuple(self.paths[k] for k in places)
        labels = None if self.labels is None else self.labels[places]
        return replace(self, paths=paths, labels=labels)

    def digest(self) -> str:
        """SHA-256 of names (relative to the root), order and labels: equal on two machines if both list the same records."""
        digest, cut = hashlib.sha256(), len(self.root) if self.kind == "files" else 0
        for path in self.paths:
            name = path[cut:] if path.startswith(self.root) else path
            digest.update(name.replace(os.sep, "/").encode("utf-8", "surrogateescape") + b"\0")
        if self.labels is not None:
            digest.update(self.labels.tobytes() + "\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def require_labels(self) -> np.ndarray:
        """The labels, int64 `[N]`; ValueError with the ways to give them where there are none, and for a class folder without images."""
        if self.labels is None:
            needs = f"a class-conditional run needs labels and {len(self)} images have none"
            remedy = "put the images in one folder per class, start their names with 'class_', or give a csv/json file of path,label"
            raise ValueError(f"{self.root or 'these records'}: {needs}; {remedy}")
        if self.empty_folders:
            held = f"{len(self.empty_folders)} class folders hold no images{tables.first(self.empty_folders)}"
            raise ValueError(f"{self.root}: {held}; put images into them or remove them")
        return self.labels


def list_records(root: str | os.PathLike[str], *, labels: str = "auto") -> Records:
    """List the images below `root`: a folder, packed data, a zip, WebDataset tars (one, a pattern or a folder), or an LSUN lmdb.

    `labels`: "folders" (sub-folder names), "prefix" (text before the first `_` of a file name), "none", the path of a csv or json
    table, or "auto": the source's own labels (dataset.json, packed labels), else folders, else prefixes, else none. The result's
    `label_source` says which it was. ValueError if there are no images.
    """
    source = sources.list_source(storage.expand(root))
    found = source.labels(labels)
    empty = _empty_folders(source) if found.source == "folders" and source.kind == "files" else ()
    about = {name: getattr(source, name) for name in ("kind", "root", "preprocessing", "stored_size", "left_out")}
    return Records(source.paths, *found, **about, empty_folders=empty)


def _empty_folders(source: sources.Source) -> tuple[str, ...]:
    """Folders in the root that hold no image at any depth, and broken links; hidden ones are skipped."""
    with_images = {name.split("/")[0] for name in source.names}
    others = [name for name in storage.listdir(source.root) if name not in with_images and not name.startswith(".")]
    paths = {name: storage.join(source.root, name) for name in others}
    is_broken = lambda path: os.path.islink(path) and not os.path.exists(path)  # noqa: E731
    return tuple(name for name, path in paths.items() if is_broken(path) or storage.isdir(path))


def split_records(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """(training, validation) records: `fraction` of the records, drawn by `seed` but at least one, are held out for validation."""
    count = len(records)
    order = np.random.RandomState(key_of(seed, TRAIN) & 0xFFFFFFFF).permutation(count)
    val_count = max(1, round(count * fraction))
    return records.take(sorted(order[val_count:].tolist())), records.take(sorted(order[:val_count].tolist()))
