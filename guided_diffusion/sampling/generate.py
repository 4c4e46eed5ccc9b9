"""Seeds -> images -> one npz. Image `i` depends on (seed, i) only: not on the batch size, the processes or interruptions.

Finished images are kept as they come, in a folder of parts; a killed job, started again with any number of processes, makes only what is
missing. The npz is put together at the end, one part at a time.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.samplers import NotFinite, check_finite
from ..runtime import storage
from ..runtime.streams import LABELS, SAMPLE, Streams, key_of
from ..runtime.world import World
from . import writers

PARTS, RECEIPT, LOCK, PICTURE = "parts", "sampling.json", "sampling.lock", "samples.png"
FORMAT = 2  # of the receipt; from 2 on it says all that an image depends on
_PART = re.compile(r"^images_(\d+)_(\d+)\.npy$")

# (noise [B, C, H, W], source of further noise, conditions of the network) -> images in [-1, 1], [B, C, H, W]
Sample = Callable[[Tensor, Callable[[Tensor], Tensor], dict[str, Tensor]], Tensor]


class Interrupted(Exception):
    """Asked to stop; everything finished is on disk, and the same command goes on."""


@dataclass(frozen=True)
class LabelPlan:
    """Which class image `i` gets: a pure function of (seed, i).

    classes   the class numbers to choose from; empty = no labels at all
    balanced  deal the classes out in turn instead of drawing them
    """

    classes: tuple[int, ...] = ()
    balanced: bool = False
    seed: int = 0

    def of(self, ids: Sequence[int]) -> np.ndarray | None:
        """Labels of the images `ids`, int64 `[len(ids)]`, or None."""
        if not self.classes:
            return None
        n = len(self.classes)
        places = (i % n if self.balanced else key_of(self.seed, LABELS, i) % n for i in ids)
        return np.array([self.classes[p] for p in places], dtype=np.int64)


@dataclass(frozen=True)
class Job:
    """What to make and where.

    shape       channels, height, width
    out         folder; the npz, the picture and the receipt come here
    receipt     what the images depend on (flags, hashes of weights): written beside them, compared when a job goes on
    about       what else to write beside them
    config      the flags, written beside them, so that `--config sampling.json` asks for the same images
    to_uint8    images in [-1, 1] `[B, C, H, W]` -> uint8 `[B, H, W, C]`
    conditions  further inputs of the network by image number, such as low-resolution images
    """

    out: str
    num_samples: int
    shape: tuple[int, int, int]
    batch_size: int
    to_uint8: Callable[[Tensor], Tensor]
    seed: int = 0
    labels: LabelPlan = field(default_factory=LabelPlan)
    receipt: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    conditions: Callable[[Sequence[int]], dict[str, Tensor]] | None = None
    grid: int = 64
    class_names: Sequence[str] = ()

    @property
    def npz(self) -> str:
        channels, height, width = self.shape
        return storage.join(self.out, writers.npz_name(self.num_samples, height, width, channels))


def generate(
    sample: Sample,
    job: Job,
    *,
    world: World | None = None,
    tell: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> str:
    """Make `job.num_samples` images and return the path of their npz (`arr_0` uint8 `[N, H, W, C]`, `arr_1` labels).

    Called on every rank. Raises Interrupted after the batch in which `should_stop` became true on any rank, and
    ValueError if the folder holds part of a job with other settings, or another job is at work in it.
    """
    world = world or World()
    lock, todo = _open(job, tell) if world.is_main else (None, None)
    try:
        todo = world.broadcast_object(todo, name="what is left to sample")
        if isinstance(todo, str):
            raise ValueError(todo)
        if todo is not None:
            _make(sample, job, todo, world, tell, should_stop, progress)
    finally:
        if lock is not None:
            lock.release()
    return job.npz


def _make(
    sample: Sample,
    job: Job,
    todo: list[int],
    world: World,
    tell: Callable[[str], None],
    should_stop: Callable[[], bool],
    progress: bool,
) -> None:
    batches = _groups(todo, job.batch_size)
    bar = Progress(job.num_samples - len(todo), job.num_samples, shown=progress and world.is_main)
    for first in range(0, len(batches), world.size):
        round_ = batches[first : first + world.size]
        if world.rank < len(round_):
            make_batch(sample, job, round_[world.rank], world.device)
        bar.advance(sum(map(len, round_)))
        if world.any_true(should_stop(), name="stop sampling?") and first + world.size < len(batches):
            bar.close()
            raise Interrupted(
                f"{bar.done} of {job.num_samples} images are in {job.out}; the same command goes on from there"
            )
    bar.close()
    world.barrier("all images are made")
    if world.is_main:
        assemble(job, tell)
    world.barrier("the npz is written")


def _groups(todo: Sequence[int], size: int) -> list[list[int]]:
    """The images to make, by batch: image `i` always has place `i % size` in batch `i // size`, also when a job goes on.

    So that it sees the same shapes and comes out the same to the last bit, wherever the job was interrupted.
    """
    groups: dict[int, list[int]] = {}
    for i in todo:
        groups.setdefault(i // size, []).append(i)
    return list(groups.values())


def make_batch(sample: Sample, job: Job, ids: Sequence[int], device: torch.device) -> None:
    """Make the images `ids` of one batch and write them.

    The whole batch is computed, also where some of it is there already or beyond the last image: shapes never change.
    """
    start = ids[0] // job.batch_size * job.batch_size
    assert ids[-1] < start + job.batch_size, "images of two batches"
    whole = [min(i, job.num_samples - 1) for i in range(start, start + job.batch_size)]
    streams = Streams(job.seed, SAMPLE, ids=whole, device=device)
    labels = job.labels.of(whole)
    conditions = job.conditions(whole) if job.conditions else {}
    if labels is not None:
        conditions["y"] = torch.from_numpy(labels)
    conditions = {name: value.to(device) for name, value in conditions.items()}
    made = finite(
        lambda: sample(streams.normal(job.shape), streams.randn_like, conditions), lambda row: f"image {whole[row]}"
    )
    pixels = job.to_uint8(made).cpu().numpy()[[i - start for i in ids]]
    keep(job, ids, pixels)


def finite(make: Callable[[], Tensor], name: Callable[[int], str]) -> Tensor:
    """The images [B, ...] that `make` makes. ValueError naming one whose values are not finite; its pixels would be black."""
    try:
        images = make()
        check_finite(images)
    except NotFinite as error:
        raise ValueError(f"{name(error.row)}: {error}") from None
    return images


def keep(job: Job, ids: Sequence[int], pixels: np.ndarray) -> None:
    """Write the finished images `ids`, uint8 `[len(ids), H, W, C]`, as parts, one for each stretch of consecutive numbers."""
    for first, last in _runs(ids):
        name = f"images_{ids[first]:08d}_{ids[last]:08d}.npy"
        writers.write_part(storage.join(job.out, PARTS, name), pixels[first : last + 1])


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of consecutive numbers, as (first place, last place)."""
    starts = [k for k in range(len(ids)) if k == 0 or ids[k] != ids[k - 1] + 1]
    return list(zip(starts, [*[k - 1 for k in starts[1:]], len(ids) - 1]))


def _parts(job: Job) -> list[tuple[int, int, str]]:
    """Finished stretches, sorted: first image, last image, path."""
    folder = storage.join(job.out, PARTS)
    if not storage.isdir(folder):
        return []
    found = ((m, name) for name in storage.listdir(folder) if (m := _PART.match(name)))
    return sorted((int(m[1]), int(m[2]), storage.join(folder, name)) for m, name in found)


def _open(job: Job, tell: Callable[[str], None]) -> tuple[Any, list[int] | str | None]:
    """(lock of the folder, what `prepare` says). On the main rank."""
    try:
        lock = storage.lock_folder(job.out, LOCK)
    except ValueError as error:
        return None, str(error)
    return lock, prepare(job, tell)


def prepare(job: Job, tell: Callable[[str], None]) -> list[int] | str | None:
    """The images still to make; None if the npz is there; or a complaint."""
    folder = storage.join(job.out, PARTS)
    storage.makedirs(folder)
    storage.remove_unfinished(folder)
    # Of our own files only: the folder may be that of a training run, which writes its own.
    storage.remove_unfinished(job.out, (RECEIPT, PICTURE, os.path.basename(job.npz)))
    path, receipt, parts = storage.join(job.out, RECEIPT), _fingerprint(job), _whole_parts(job, tell)
    told = _read_receipt(path)
    if told.get("format") != FORMAT and (parts or (told and storage.exists(job.npz))):
        return (
            f"{job.out} holds images, and {path} does not say all that they depend on (it is of an earlier version, or gone). "
            f"Give another folder, or remove {storage.join(job.out, PARTS)} and {path} to make them anew"
        )
    if _is_done(job, told, receipt):
        tell(f"{job.npz} is there already, with these settings")
        for _, _, left in parts:
            storage.remove(left)
        return None
    if parts and told:
        before, now = _flat(told["settings"]), _flat(receipt)
        differing = [
            f"{k} was {before.get(k)!r} and is {now.get(k)!r}"
            for k in sorted({*before, *now})
            if before.get(k) != now.get(k)
        ]
        if differing:
            return (
                f"{job.out} holds {len(parts)} parts of a job with other settings: {'; '.join(differing)}. "
                f"Give another folder, or remove {storage.join(job.out, PARTS)}"
            )
    _write_receipt(job, {})
    done = np.zeros(job.num_samples, dtype=bool)
    for first, last, _ in parts:
        done[first : last + 1] = True
    if done.any():
        tell(f"{int(done.sum())} of {job.num_samples} images are there already; going on with the rest")
    return np.flatnonzero(~done).tolist()


def _read_receipt(path: str) -> dict[str, Any]:
    """What stands in a receipt; nothing where there is none, or where it is none."""
    try:
        told = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    except ValueError:
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("settings"), dict) else {}


def finished_npz(folder: str) -> str:
    """The npz that the last job in `folder` made. Others may lie beside it. ValueError where the receipt tells of none."""
    told = _read_receipt(storage.join(folder, RECEIPT))
    if "file" not in told:
        raise ValueError(f"{storage.join(folder, RECEIPT)} tells of no finished npz; sample into this folder first")
    return storage.join(folder, os.path.basename(told["file"]))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"num_heads": 4}} -> {"model.num_heads": 4}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _whole_parts(job: Job, tell: Callable[[str], None]) -> list[tuple[int, int, str]]:
    """`_parts` without those that a failing disk cut short; they are removed, to be made again."""
    bytes_each, header, parts = int(np.prod(job.shape)), 128, _parts(job)
    wanted = {part: header + bytes_each * (part[1] - part[0] + 1) for part in parts}
    short = [] if storage.is_remote(job.out) else [part for part in parts if storage.size(part[2]) < wanted[part]]
    for part in short:
        tell(f"{part[2]} is cut short; its images are made again")
        storage.remove(part[2])
    return [part for part in parts if part not in short]


def _is_done(job: Job, told: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    same = (
        told.get("settings") == settings and told.get("num_samples") == job.num_samples and told.get("file") == job.npz
    )
    return same and storage.exists(job.npz) and storage.size(job.npz) == told.get("bytes")


def _fingerprint(job: Job) -> dict[str, Any]:
    """What an image depends on: not the number of images, nor the batch size."""
    settings = {
        **job.receipt,
        "seed": job.seed,
        "shape": list(job.shape),
        "classes": list(job.labels.classes),
        "balanced": job.labels.balanced,
    }
    return json.loads(storage.to_json(settings))


def _write_receipt(job: Job, more: Mapping[str, Any]) -> None:
    from platform import python_version

    told = {
        "format": FORMAT,
        "num_samples": job.num_samples,
        "settings": _fingerprint(job),
        "about": dict(job.about),
        "config": dict(job.config),
        "class_names": list(job.class_names),
        "uint8": "((x + 1) * 127.5).clamp(0, 255), truncated",
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": python_version()},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }
    storage.write_json_atomic(storage.join(job.out, RECEIPT), told)


def assemble(job: Job, tell: Callable[[str], None]) -> None:
    """Put the npz and the picture together from the parts, complete the receipt, and remove the parts. On the main rank."""
    parts = [part for part in _parts(job) if part[0] < job.num_samples]
    channels, height, width = job.shape
    labels = job.labels.of(range(job.num_samples))

    # Parts never overlap: each was made of images that no part had. The last may reach beyond a smaller num_samples.
    pixels = (writers.read_part(path)[: job.num_samples - first] for first, _, path in parts)
    writers.write_npz(job.npz, pixels, (job.num_samples, height, width, channels), labels)
    told = job.npz
    if job.grid:
        count, head = min(job.grid, job.num_samples), []
        for first, _, path in parts:
            if first < count:
                head.append(writers.read_part(path)[: count - first])
        captions = None if labels is None else [_name(int(label), job.class_names) for label in labels[:count]]
        writers.write_grid(storage.join(job.out, PICTURE), np.concatenate(head), captions)
        told += f" and {storage.join(job.out, PICTURE)}"
    _write_receipt(job, {"file": job.npz, "bytes": storage.size(job.npz), "sha256": storage.sha256_of(job.npz)})
    for _, _, path in _parts(job):
        storage.remove(path)
    tell(f"wrote {told}")


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)


class Progress:
    """A bar with images per second; nothing where tqdm is not installed."""

    def __init__(self, done: int, total: int, *, shown: bool) -> None:
        self.done = done
        self._bar: Any = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=done, unit="image", mininterval=1.0, dynamic_ncols=True)

    def advance(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def aside(self, tell: Callable[[str], None], text: str) -> None:
        """Tell something on a line of its own while the bar goes on."""
        if self._bar is not None:
            self._bar.clear()
        tell(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
