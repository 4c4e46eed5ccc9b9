"""Records -> endless batches, whose content is a function of (seed, step, place in the batch) and of nothing else.

Not of the number of processes, the number of workers, or where the run was interrupted: the image at step `s`, position `p` of the
global batch is number `g = s * batch_size + p` of an endless walk; epoch `g // len(records)` visits every record once, in the order
`order(seed, epoch)`. Crop and flip draw from a generator addressed by (seed, epoch, record). To resume, start at another step.
"""

from __future__ import annotations

import functools
import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..runtime import signals, streams
from . import images
from .images import Size
from .listing import Records
from .sources import open_source

_MAX_REPLACEMENTS = 100  # unreadable images in a row before "skip" gives up: then the data is broken, not a file


class Batch(NamedTuple):
    """One process's part of a global batch."""

    images: Tensor  # uint8 [B, H, W, C]
    labels: Tensor | None  # int64 [B]
    positions: Tensor  # int64 [B], the place of each example in the global batch
    step: int
    flips: Tensor | None = None  # bool [B]: which examples are to be mirrored, as `to_device` does
    low_res_size: Size = 0  # of the smaller images that an upsampler is given too; 0 = none

    def to_device(self, device: torch.device) -> FinishedBatch:
        """The batch as a loss takes it, on `device`. `positions` stay in main memory: they address generators there."""
        there = [None if t is None else t.to(device, non_blocking=True) for t in (self.images, self.labels, self.flips)]
        pixels, labels, flips = there
        assert pixels is not None
        x = images.to_float(pixels, flips)
        low_res = images.low_res(x, self.low_res_size) if self.low_res_size else None
        return FinishedBatch(x, labels, self.positions, self.step, low_res)


class FinishedBatch(NamedTuple):
    """A batch on a device: cropped, mirrored and scaled."""

    images: Tensor  # float32 [B, C, H, W] in [-1, 1]
    labels: Tensor | None  # int64 [B]
    positions: Tensor  # int64 [B], in main memory
    step: int
    low_res: Tensor | None = None  # float32 [B, C, h, w]: the images shrunk


class Place(NamedTuple):
    """Which record an example is, and in which epoch: the address of its augmentation."""

    epoch: int
    record: int


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of `count` records in an epoch, int64.

    By the legacy generator of numpy: its numbers are promised never to change, so a run resumed years later sees the same order.
    """
    key = streams.key_of(seed, streams.DATA, epoch)
    state = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
    return state.permutation(count).astype(np.int64)


@dataclass(frozen=True)
class _Plan(Sampler[list[tuple[int, Place]]]):
    """Endless: for each step the (step, place) of every example of this process."""

    count: int  # of records
    batch_size: int
    rank: int
    size: int
    seed: int
    shuffle: bool
    start_step: int
    start_image: int

    def __iter__(self) -> Iterator[list[tuple[int, Place]]]:
        orders: dict[int, np.ndarray] = {}
        for step in itertools.count(self.start_step):
            begin = self.start_image + (step - self.start_step) * self.batch_size
            walk = range(begin + self.rank, begin + self.batch_size, self.size)
            epochs = {walk[0] // self.count, walk[-1] // self.count}  # at most two: a batch is no larger than the data
            orders = {epoch: orders[epoch] if epoch in orders else self._order(epoch) for epoch in epochs}
            yield [(step, Place(g // self.count, int(orders[g // self.count][g % self.count]))) for g in walk]

    def _order(self, epoch: int) -> np.ndarray:
        return order(self.seed, epoch, self.count) if self.shuffle else np.arange(self.count)


_Augment = Callable[[np.ndarray, Place], tuple[np.ndarray, bool | None]]
# What a worker hands back: a batch, why images were skipped, or the text of an error, which torch would wrap in a traceback.
_Fetched = tuple[Batch | None, list[str], str]


class _Examples(Dataset[Any]):
    """Decodes and augments; runs in the workers, so it holds plain arrays instead of a million strings.

    (Touching a Python string in a forked process copies its page; a list of them slowly multiplies memory by the number of workers.)
    """

    def __init__(
        self, records: Records, channels: int, augment: _Augment, positions: Tensor, skip_unreadable: bool
    ) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in records.paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._paths = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._labels = records.labels
        self._source = open_source(records.kind, records.root)
        self._channels, self._augment, self._positions = channels, augment, positions
        self._skip_unreadable = skip_unreadable

    def __len__(self) -> int:
        return len(self._ends)

    def _path(self, record: int) -> str:
        start = int(self._ends[record - 1]) if record else 0
        return self._paths[start : int(self._ends[record])].tobytes().decode("utf-8", "surrogateescape")

    def __getitems__(self, wanted: list[tuple[int, Place]]) -> _Fetched:
        skipped: list[str] = []
        try:
            found = [self._example(place, skipped) for _, place in wanted]
        except ValueError as error:
            return None, skipped, str(error)
        stacked = torch.from_numpy(np.stack([image for image, _, _ in found]))
        flips = None if found[0][1] is None else torch.tensor([flip for _, flip, _ in found])
        labels = None if self._labels is None else torch.from_numpy(self._labels[[record for _, _, record in found]])
        return Batch(stacked, labels, self._positions, wanted[0][0], flips), skipped, ""

    def _example(self, place: Place, skipped: list[str]) -> tuple[np.ndarray, bool | None, int]:
        """The image at a place, or, skipping, of the next record that can be read (in the order of the listing); whether to
        mirror it; and which record it is."""
        record = place.record
        for _ in range(min(_MAX_REPLACEMENTS, len(self))):
            try:
                return *self._augment(self._source.read(self._path(record), self._channels), place), record
            except ValueError as error:  # noqa: PERF203  decoding costs a thousand times the try
                if not self._skip_unreadable:
                    raise
                skipped.append(str(error))
                record = (record + 1) % len(self)
        raise ValueError(f"{len(skipped)} images in a row cannot be read; the first: {skipped[0]}")


def _augmented(
    image_size: images.Size, crop: str, flip: bool, seed: int, image: np.ndarray, place: Place
) -> tuple[np.ndarray, bool | None]:
    """(the window that is cut out, whether to mirror it), drawn at an address, so that nothing else moves the draws."""
    rng = random.Random(streams.key_of(seed, streams.DATA, place.epoch, place.record))
    cut = images.random_crop(image, image_size, rng) if crop == "random" else images.center_crop(image, image_size)
    return cut, rng.random() < 0.5 if flip else None


class Batches(Iterator[Batch]):
    """The endless iterator of `make_batches`, with what a training log wants to know about it."""

    def __init__(self, loader: DataLoader[Any], low_res_size: Size = 0) -> None:
        self._loader, self._low_res_size = loader, low_res_size
        self._fetched: Iterator[_Fetched] | None = None
        self.wait_seconds = 0.0  # time spent inside next(): what the device waits for the data
        self.skipped = 0  # unreadable images met, an example counted each time it was replaced

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self._fetched is None:
            self._fetched = iter(self._loader)
        batch, skipped, error = next(self._fetched)
        self.wait_seconds += time.perf_counter() - started
        self._count(skipped)
        if batch is None:
            self.close()
            raise ValueError(f"{error}; remove or repair it, or continue past such files with on_error='skip'")
        return batch._replace(low_res_size=self._low_res_size)

    def _count(self, skipped: list[str]) -> None:
        before, self.skipped = self.skipped, self.skipped + len(skipped)
        if len(str(self.skipped)) > len(str(before)) or (skipped and not before):  # at 1, 10, 100, ...
            text = f"{self.skipped} times an unreadable image was replaced by another; the latest: {skipped[-1]}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def close(self) -> None:
        """Stop the workers; the next `next()` would begin again at the first step."""
        self._fetched = None


def make_batches(
    records: Records,
    *,
    image_size: images.Size,
    batch_size: int,
    rank: int = 0,
    size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    start_image: int | None = None,
    crop: str = "center",
    flip: bool = True,
    channels: int = 3,
    workers: int = 0,
    on_error: str = "raise",
    shuffle: bool = True,
    low_res_size: Size = 0,
) -> Batches:
    """Endless batches of process `rank` of `size`: positions rank, rank + size, ... of each global batch of `batch_size`.

    `start_image`: the place in the endless walk of the first image of `start_step`, None = `start_step * batch_size`; it matters to a
    run that goes on with another batch size. `crop`: "center" or "random" (80 to 100 % of the shorter side). `flip`: half of the
    examples are to be mirrored; `.flips` says which, and `Batch.to_device` does it. `workers`: processes that decode;
    0 decodes in this one. `on_error`: "raise" a ValueError that names an unreadable file, or "skip": take the next record in its
    place, and count it in `.skipped`. `.wait_seconds` grows by the time `next()` takes.
    `low_res_size`: an upsampler's batches also hold their images shrunk to it. Pinned memory where CUDA is.
    """
    start = start_step * batch_size if start_image is None else start_image
    for name, value, allowed in (("crop", crop, ("center", "random")), ("on_error", on_error, ("raise", "skip"))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be {allowed[0]!r} or {allowed[1]!r}")
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank}: must be in 0..{size - 1} for {size} processes")
    if min(workers, start_step, start) < 0:
        raise ValueError(f"workers={workers}, start_step={start_step}, start_image={start_image}: must not be negative")
    _check_sizes(records, image_size, batch_size, size, crop)
    images.mode_of(channels)
    augment = functools.partial(_augmented, image_size, crop, flip, seed)
    positions = torch.arange(rank, batch_size, size)
    dataset = _Examples(records, channels, augment, positions, on_error == "skip")
    plan = _Plan(len(records), batch_size, rank, size, seed, shuffle, start_step, start)
    extra: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _start_worker} if workers else {}
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        # Its own generator, so that making a loader does not move the global one.
        generator=torch.Generator().manual_seed(0),
        **extra,
    )
    return Batches(loader, low_res_size)


def _unchanged(fetched: Any) -> Any:
    return fetched


def _start_worker(worker: int) -> None:
    signals.leave_to_parent()


def _check_sizes(records: Records, image_size: images.Size, batch_size: int, processes: int, crop: str) -> None:
    """ValueError if the records are too few for a batch, or were packed too small for the crop."""
    where, count = records.root or "the data", len(records)
    if batch_size < 1 or batch_size % processes:
        allowed = f"must be a positive multiple of {processes} processes"
        raise ValueError(f"batch_size={batch_size} (over all processes): {allowed}")
    if batch_size > count:
        remedy = f"lower it to at most {count // processes * processes}, or add images"
        raise ValueError(
            f"batch_size={batch_size} (over all processes) is larger than the {count} images of {where}; {remedy}"
        )
    height, width = images.height_width(image_size)
    # Packed images have lost what lies outside of them: a crop that needs more would be enlarged, and blurred.
    least = (height, width) if crop == "center" else images.largest_cover((height, width))
    stored = records.stored_size or least
    if stored[0] < least[0] or stored[1] < least[1]:
        raise ValueError(
            f"{where}: packed at {stored[0]}x{stored[1]}, but crop={crop!r} at {height}x{width} needs at "
            f"least {least[0]}x{least[1]}; pack the source at that size"
        )
