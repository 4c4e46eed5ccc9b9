"""Images cropped once and kept as plain uint8 arrays that loaders map into memory: no decoding while training.

A packed folder holds

* `images-00000.npy`, ... uint8 `[n, H, W, C]`, readable by `numpy.load(..., mmap_mode="r")`;
* `labels.npy`, int64 `[N]`, if the source had labels;
* `names.txt`, the source of each row, one per line;
* `packed.json`, written last: counts, SHA-256 of every file, class names, and `preprocessing`, which names how the images were cropped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..runtime import storage
from . import images
from .listing import Records, list_records
from .sources import open_source
from .sources.arrays import PACKED_INDEX, read_packed_index
from .sources.source import Progress


def pack(
    records: Records,
    out_dir: str | os.PathLike[str],
    image_size: images.Size,
    *,
    channels: int = 3,
    workers: int = 4,
    shard_bytes: int = 1 << 28,
    on_error: str = "raise",
    progress: Progress = None,
) -> Records:
    """Write `records`, center-cropped to `image_size`, to the new folder `out_dir`, and list what was written.

    The rows are bit for bit what a loader makes of the source with `crop="center"`. `workers` threads decode; `on_error="skip"` leaves
    unreadable images out (`skipped` in the index names them). `progress(n)` is called when n more images are done. An interrupted pack
    leaves no `packed.json`; remove the folder and start again.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: must be 'raise' or 'skip'")
    if workers < 1 or shard_bytes < 1:
        raise ValueError(f"workers={workers}, shard_bytes={shard_bytes}: must be positive")
    height, width = images.height_width(image_size)
    crop_id = images.preprocessing_id(image_size, channels)
    out = os.fspath(out_dir)
    storage.makedirs(out)
    if storage.listdir(out):
        raise ValueError(f"{out!r}: is not empty; give a new folder, so that packed data never mixes with other files")

    skipped: list[str] = []
    kept: list[int] = []
    shards: list[dict[str, Any]] = []
    source = open_source(records.kind, records.root)

    def cropped() -> Iterator[np.ndarray]:
        """The cropped images that can be read; appends their indices to `kept`, and the errors of others to `skipped`."""
        crop = lambda image: images.center_crop(images.as_array(image, channels), image_size)  # noqa: E731
        for k, result in enumerate(source.each(records.paths, crop, workers, progress)):
            if not isinstance(result, ValueError):
                kept.append(k)
                yield result
            elif on_error == "skip":
                skipped.append(str(result))
            else:
                raise ValueError(f"{result}; remove or repair it, or leave such files out with on_error='skip'")

    rows, per_shard = cropped(), max(1, shard_bytes // (height * width * channels))
    # Read and written one shard at a time, so that main memory never holds more.
    while block := list(islice(rows, per_shard)):
        name = f"images-{len(shards):05d}.npy"
        shards.append({**_save(out, name, np.stack(block)), "count": len(block)})
    if not kept:
        raise ValueError(f"none of the {len(records)} images of {records.root!r} can be read; the first: {skipped[0]}")

    names = "".join(f"{source.describe(records.paths[k])}\n" for k in kept)
    storage.write_bytes_atomic(storage.join(out, "names.txt"), names.encode("utf-8", "surrogateescape"))
    labels = None if records.labels is None else _save(out, "labels.npy", records.labels[kept])
    index = {
        "format": 1,
        "count": len(kept),
        "shape": [height, width, channels],
        "preprocessing": crop_id,
        "source_preprocessing": records.preprocessing,
        "shards": shards,
        "labels": labels,
        "class_names": list(records.class_names),
        "label_source": records.label_source,
        "skipped": skipped,
    }
    storage.write_json_atomic(storage.join(out, PACKED_INDEX), index)
    return list_records(out)


def _save(folder: str, name: str, array: np.ndarray) -> dict[str, Any]:
    """Write an array; return its entry in the index."""
    path, array = storage.join(folder, name), np.ascontiguousarray(array)
    with storage.atomic_write(path) as file:  # numpy.save would hide the cause of an error, such as a full disk
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    return {"file": name, "sha256": storage.sha256_of(path)}


def verify(folder: str | os.PathLike[str], progress: Progress = None) -> list[str]:
    """Compare every array file of a packed folder with its checksum; returns an error for each that differs or is missing."""
    root = os.fspath(folder)
    index = read_packed_index(root)
    errors = []
    for entry in filter(None, [*index["shards"], index["labels"]]):
        path = storage.join(root, entry["file"])
        if not storage.exists(path):
            errors.append(f"{path}: missing")
        elif storage.sha256_of(path) != entry["sha256"]:
            errors.append(f"{path}: changed since it was packed (SHA-256 differs)")
        if progress is not None:
            progress(entry.get("count", 0))
    return errors
