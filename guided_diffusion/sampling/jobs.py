"""A request for images, and its output folder: part files while sampling, at the end npz, picture and receipt.

Each finished batch is written as a part; a killed job, started again with any number of processes, makes only the missing
images. The npz is put together at the end, one part at a time.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime import storage
from ..runtime.devices import versions
from ..runtime.streams import LABELS, key_of
from . import writers

PARTS, RECEIPT, LOCK, PICTURE = "parts", "sampling.json", "sampling.lock", "samples.png"
FORMAT = 3  # of the receipt; it lists everything that an image depends on. Before 3, noise was drawn in another order
_PART = re.compile(r"^images_(\d+)_(\d+)\.npy$")

Shape = tuple[int, int, int]  # channels, height, width
Conditions = Callable[[Sequence[int]], dict[str, Tensor]]  # image numbers -> inputs of the network, each [B, ...]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelPlan:
    """Which class image `i` gets: a pure function of (seed, i).

    classes   the class numbers to choose from; empty = no labels at all
    balanced  image `i` gets class `i` modulo their number, instead of a random one
    given     image `i` gets label `i` modulo their number; replaces the choice from `classes`
    """

    classes: tuple[int, ...] = ()
    balanced: bool = False
    seed: int = 0
    given: tuple[int, ...] = ()

    @classmethod
    def fixed(cls, labels: Sequence[int] | np.ndarray) -> LabelPlan:
        """Image `i` gets `labels[i]`; with more images than labels, these are repeated."""
        given = tuple(int(label) for label in labels)
        return cls(tuple(sorted(set(given))), given=given)

    def of(self, ids: Sequence[int]) -> np.ndarray | None:
        """Labels of the images `ids`, int64 `[len(ids)]`, or None."""
        if not self.classes:
            return None
        choices = self.given or self.classes
        in_turn = self.balanced or self.given
        indices = ((i if in_turn else key_of(self.seed, LABELS, i)) % len(choices) for i in ids)
        return np.array([choices[k] for k in indices], dtype=np.int64)


@dataclass(frozen=True)
class Request:
    """Images 0 ... num_samples - 1 of `seed`.

    name        differs between the requests of a queue; messages use it
    labels      the classes of the images
    conditions  further inputs of the network, such as low-resolution images
    """

    name: str
    num_samples: int
    seed: int = 0
    labels: LabelPlan = LabelPlan()
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"request {self.name!r} asks for {self.num_samples} images; it must be at least 1")

    def inputs(self, image: int) -> dict[str, Tensor]:
        """The network's inputs for one image besides noise and time, each `[1, ...]`; the label is `y`."""
        inputs = self.conditions([image]) if self.conditions else {}
        labels = self.labels.of([image])
        return inputs if labels is None else {**inputs, "y": torch.from_numpy(labels)}


@dataclass(frozen=True)
class Job:
    """A request, and the folder that its images go to.

    out          folder for npz, picture and receipt
    receipt      what the images depend on (flags, hashes of weights): compared with the receipt on disk when a job resumes
    about        further facts for the receipt on disk; not compared
    config       the flags, for the receipt on disk, so that `--config sampling.json` asks for the same images
    grid         number of images in the picture; 0 = no picture
    class_names  captions of the picture
    """

    request: Request
    out: str
    shape: Shape
    batch_size: int
    receipt: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    grid: int = 64
    class_names: Sequence[str] = ()

    @property
    def npz(self) -> str:
        """Path of the finished file, named as in 2021."""
        channels, height, width = self.shape
        return self.in_folder(f"samples_{self.request.num_samples}x{height}x{width}x{channels}.npz")

    def in_folder(self, name: str) -> str:
        """Path of a file in the job's folder."""
        return storage.join(self.out, name)


def prepare(job: Job) -> list[int] | None:
    """The numbers of the images still to make; None if the npz is finished. For rank 0, which holds the folder's lock.

    ValueError if the folder holds images with other settings, or with a receipt that does not list all settings.
    """
    count, parts_folder, receipt_path = job.request.num_samples, job.in_folder(PARTS), job.in_folder(RECEIPT)
    storage.makedirs(parts_folder)
    storage.remove_unfinished(parts_folder)
    # Only this module's files: the folder may also be that of a training run, which writes its own.
    storage.remove_unfinished(job.out, (RECEIPT, PICTURE, os.path.basename(job.npz)))
    settings, parts, stored = _settings(job), _whole_parts(job), _read_receipt(receipt_path)
    if stored.get("format") != FORMAT and (parts or (stored and storage.exists(job.npz))):
        raise ValueError(
            f"{job.out} holds images, and {receipt_path} does not say all that they depend on (it is of an earlier version, or "
            f"gone). Give another folder, or remove {parts_folder} and {receipt_path} to make them anew"
        )
    finished = {"settings": settings, "num_samples": count, "file": job.npz}
    same = all(stored.get(name) == value for name, value in finished.items())
    if same and storage.exists(job.npz) and storage.size(job.npz) == stored.get("bytes"):
        log.info("%s is there already, with these settings", job.npz)
        for _, _, part in parts:  # of a job that was killed after it wrote the receipt
            storage.remove(part)
        return None
    if parts and stored:
        before, now = _flat(stored.get("settings", {})), _flat(settings)
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if names:
            differing = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
            raise ValueError(
                f"{job.out} holds {len(parts)} parts of a job with other settings: {differing}. "
                f"Give another folder, or remove {parts_folder}"
            )
    _write_receipt(job, {})
    done = np.zeros(count, dtype=bool)
    for first, last, _ in parts:
        done[first : last + 1] = True
    if done.any():
        log.info("%d of %d images are there already; going on with the rest", done.sum(), count)
    return np.flatnonzero(~done).tolist()


def keep(job: Job, first: int, pixels: np.ndarray) -> None:
    """Write finished images from number `first` on, uint8 `[B, H, W, C]`, as one part."""
    name = f"images_{first:08d}_{first + len(pixels) - 1:08d}.npy"
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels), allow_pickle=False)
    storage.write_bytes_atomic(storage.join(job.out, PARTS, name), buffer.getvalue())


def assemble(job: Job) -> None:
    """Write npz and picture from the parts, complete the receipt, then remove the parts. Called on rank 0."""
    count = job.request.num_samples
    parts = [part for part in _parts(job) if part[0] < count]
    channels, height, width = job.shape
    labels = job.request.labels.of(range(count))

    # Parts never overlap: each holds images that were missing. The last may reach beyond a smaller num_samples.
    pixels = (_read_part(path)[: count - first] for first, _, path in parts)
    writers.write_npz(job.npz, pixels, (count, height, width, channels), labels)
    written = job.npz
    if job.grid:
        shown = min(job.grid, count)
        head = [_read_part(path)[: shown - first] for first, _, path in parts if first < shown]
        captions = None if labels is None else writers.class_captions(labels[:shown], job.class_names)
        writers.write_grid(job.in_folder(PICTURE), np.concatenate(head), captions)
        written += f" and {job.in_folder(PICTURE)}"
    _write_receipt(job, {"file": job.npz, "bytes": storage.size(job.npz), "sha256": storage.sha256_of(job.npz)})
    for _, _, path in _parts(job):
        storage.remove(path)
    log.info("wrote %s", written)


def finished_npz(folder: str) -> str:
    """The npz of the last job in `folder`, as its receipt names it; ValueError if it names none."""
    path = storage.join(folder, RECEIPT)
    stored = _read_receipt(path)
    if "file" not in stored:
        raise ValueError(f"{path} names no finished npz; sample into this folder first")
    return storage.join(folder, os.path.basename(stored["file"]))


def class_names_beside(npz: str) -> tuple[str, ...]:
    """The class names in the receipt beside an npz of samples; () without a receipt or if it names another npz."""
    stored = _read_receipt(storage.join(os.path.dirname(npz), RECEIPT))
    same = os.path.basename(str(stored.get("file"))) == os.path.basename(npz)
    names = stored.get("class_names")
    return tuple(names) if same and isinstance(names, list) else ()


def _read_receipt(path: str) -> dict[str, Any]:
    """The contents of a receipt; {} if the file is missing or not a receipt."""
    try:
        stored = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) and isinstance(stored.get("settings", {}), dict) else {}


def _write_receipt(job: Job, more: Mapping[str, Any]) -> None:
    receipt = {
        "format": FORMAT,
        "num_samples": job.request.num_samples,
        "settings": _settings(job),
        "about": dict(job.about),
        "config": dict(job.config),
        "class_names": list(job.class_names),
        "uint8": "((x + 1) * 127.5).clamp(0, 255), truncated",
        "versions": versions(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }
    storage.write_json_atomic(job.in_folder(RECEIPT), receipt)


def _settings(job: Job) -> dict[str, Any]:
    """Everything that an image depends on, as read from JSON; neither the number of images nor the batch size."""
    labels = job.request.labels
    drawn: dict[str, Any] = {"seed": job.request.seed, "classes": list(labels.classes), "balanced": labels.balanced}
    # Where a job begins with images, whether labels are theirs, which may be of the same classes.
    if job.request.conditions and labels.classes and not labels.given:
        drawn["labels"] = "of --classes"
    settings: dict[str, Any] = json.loads(storage.to_json({**job.receipt, **drawn, "shape": list(job.shape)}))
    return settings


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"num_heads": 4}} -> {"model.num_heads": 4}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _parts(job: Job) -> list[tuple[int, int, str]]:
    """The part files, sorted: (number of the first image, of the last image, path)."""
    folder = job.in_folder(PARTS)
    if not storage.isdir(folder):
        return []
    matches = ((m, name) for name in storage.listdir(folder) if (m := _PART.match(name)))
    return sorted((int(m[1]), int(m[2]), storage.join(folder, name)) for m, name in matches)


def _read_part(path: str) -> np.ndarray:
    images: np.ndarray = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    return images


def _whole_parts(job: Job) -> list[tuple[int, int, str]]:
    """`_parts` without those that a failing disk cut short, which are removed. Remote storage is trusted."""
    bytes_per_image, npy_header, whole = int(np.prod(job.shape)), 128, []
    for first, last, path in _parts(job):
        if storage.is_remote(job.out) or storage.size(path) >= npy_header + bytes_per_image * (last - first + 1):
            whole.append((first, last, path))
        else:
            log.info("%s is cut short; its images are made again", path)
            storage.remove(path)
    return whole
