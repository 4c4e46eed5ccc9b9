"""The same images by many settings of sampler, steps and guidance: what a setting calls, how long it takes, and a picture of all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime import storage
from ..weights.load import Loaded
from .chains import Chain
from .features import write_features
from .guiding import Guided
from .writers import write_grid

Row = dict[str, Any]  # a setting and what is known of its images, as in sweep.json


def row_of(name: str, setting: Mapping[str, Any], guided: Guided, chain: Chain) -> Row:
    """A row with the calls of classifiers, and of all other networks together, per image. ValueError where no denoiser can be made."""
    guided.on(chain.process)
    calls = guided.calls(chain.levels())
    classifiers = calls.pop("classifier", 0) + calls.pop("classifier_x0", 0)
    return {"name": name, **setting, "calls": sum(calls.values()), "classifier_calls": classifiers}


def make(rows: Sequence[Row], makers: Sequence[Callable[[], tuple[str, int]]], path: str, write: bool) -> None:
    """Make the images of all settings in turn; adds to each row its npz and the seconds per image.

    A maker makes what is missing of a setting's images; it returns their npz and how many it made. Where that is none, the time is the
    one that an earlier call has left at `path`. `write`: whether this process writes that file, after each setting.
    """
    before = read_rows(path)
    for row, maker in zip(rows, makers):
        began = time.perf_counter()
        row["samples"], made = maker()
        seconds = (time.perf_counter() - began) / made if made else before.get(row["name"], {}).get("seconds_per_image")
        row["seconds_per_image"] = seconds and float(f"{seconds:.3g}")
        if write:
            write_rows(path, rows)


def read_rows(path: str) -> dict[str, Row]:
    """The rows of a sweep.json by name; none if there is no such file. ValueError if it is damaged."""
    try:
        stored = json.loads(storage.read_bytes(path)) if storage.exists(path) else {"settings": []}
        return {row["name"]: row for row in stored["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the file of a sweep ({error}); remove it, the images beside it stay") from None


def write_rows(path: str, rows: Sequence[Row], **more: Any) -> None:
    """Write a sweep.json."""
    storage.write_json_atomic(path, {**more, "settings": rows})


def features_of(
    rows: Sequence[Row], classifier: Loaded, data_dir: str, out: str
) -> tuple[str, list[str], list[np.ndarray | None]]:
    """Write a classifier's features of real images and of each setting's samples; returns the files, and which samples it calls rightly."""
    real, files = storage.join(out, "features.npz"), [storage.join(out, row["name"], "features.npz") for row in rows]
    write_features(classifier, data_dir, real)
    return real, files, [write_features(classifier, row["samples"], file) for row, file in zip(rows, files)]


def write_pictures(rows: Sequence[Row], path: str, columns: int = 10) -> None:
    """One PNG with a line for each setting: its name, and the first images. A column shows one noise and label under all settings."""
    images = []
    for row in rows:
        with np.load(row["samples"], allow_pickle=False) as held:
            images.append(held["arr_0"][:columns])
    write_grid(path, np.concatenate(images), [row["name"] for row in rows], columns=len(images[0]), smooth=True)


def write_picture(row: Row, path: str, count: int = 60, columns: int = 10) -> None:
    """One PNG of the first images of a setting, with their labels; small ones are enlarged with bicubic interpolation."""
    with np.load(row["samples"], allow_pickle=False) as held:
        images, labels = held["arr_0"][:count], held.get("arr_1")
    write_grid(path, images, None if labels is None else list(map(str, labels[:count])), columns=columns, smooth=True)
