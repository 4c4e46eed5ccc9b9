"""Records -> endless batches, whose content is a function of (seed, step, place in the batch) and of nothing else.

Not of the number of processes, the number of workers, or where the run was interrupted: the picture at step `s`, position `p` of the
global batch is number `g = s * batch_size + p` of an endless walk; epoch `g // len(records)` visits every record once, in the order
`order(seed, epoch)`. Crop and flip draw from a generator addressed by (seed, epoch, record). To resume, start at another step.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..runtime import signals, streams
from . import images
from .listing import Records
from .sources import Reader

_MAX_REPLACEMENTS = 100  # unreadable pictures in a row before "skip" gives up: then the data is broken, not a file
_REMEMBERED = 20


class Batch(NamedTuple):
    """One process's part of a global batch."""

    images: Tensor  # uint8 [B, H, W, C]
    labels: Tensor | None  # int64 [B]
    positions: Tensor  # int64 [B], the place of each example in the global batch
    step: int
    flips: Tensor | None = None  # bool [B]: which examples are to be mirrored, for `images.to_float` on the device


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


class _Plan(Sampler[list[tuple[int, Place]]]):
    """Endless: for each step the (step, place) of every example of this process."""

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int,
        size: int,
        seed: int,
        start_step: int,
        shuffle: bool,
        start_image: int | None = None,
    ) -> None:
        self.count, self.batch_size, self.rank, self.size = count, batch_size, rank, size
        self.seed, self.start_step, self.shuffle = seed, start_step, shuffle
        self.start_image = start_step * batch_size if start_image is None else start_image

    def __iter__(self) -> Iterator[list[tuple[int, Place]]]:
        orders: dict[int, np.ndarray] = {}
        step = self.start_step
        while True:
            begin = self.start_image + (step - self.start_step) * self.batch_size
            walk = range(begin + self.rank, begin + self.batch_size, self.size)
            first, last = walk[0] // self.count, walk[-1] // self.count
            if last not in orders:  # a batch reaches into two epochs at most, being no larger than the data
                orders = {epoch: orders[epoch] if epoch in orders else self._order(epoch) for epoch in {first, last}}
            yield [(step, Place(g // self.count, int(orders[g // self.count][g % self.count]))) for g in walk]
            step += 1

    def _order(self, epoch: int) -> np.ndarray:
        return order(self.seed, epoch, self.count) if self.shuffle else np.arange(self.count)


class _Fetched(NamedTuple):
    """What a worker hands back. An error travels as text: torch would wrap an exception in a page of traceback."""

    images: Tensor | None
    labels: Tensor | None
    flips: Tensor | None
    step: int
    skipped: list[str]
    error: str


class _Pictures(Dataset[Any]):
    """Decodes and augments; runs in the workers, so it holds plain arrays instead of a million strings.

    (Touching a Python string in a forked process copies its page; a list of them slowly multiplies memory by the number of workers.)
    """

    def __init__(
        self,
        records: Records,
        image_size: images.Size,
        channels: int,
        crop: str,
        flip: bool,
        seed: int,
        skip_unreadable: bool,
    ) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in records.paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._paths = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._labels = records.labels
        self._reader = Reader(records.kind, records.root)
        self._image_size, self._channels, self._crop, self._flip = image_size, channels, crop, flip
        self._seed, self._skip_unreadable = seed, skip_unreadable

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
            return _Fetched(None, None, None, wanted[0][0], skipped, str(error))
        pictures = torch.from_numpy(np.stack([picture for picture, _, _ in found]))
        flips = torch.tensor([flip for _, flip, _ in found]) if self._flip else None
        labels = None if self._labels is None else torch.from_numpy(self._labels[[record for _, _, record in found]])
        return _Fetched(pictures, labels, flips, wanted[0][0], skipped, "")

    def _example(self, place: Place, skipped: list[str]) -> tuple[np.ndarray, bool, int]:
        """The picture at a place, or, skipping, of the next record that can be read (in the order of the listing); whether to
        mirror it; and which record it is."""
        record = place.record
        for _ in range(min(_MAX_REPLACEMENTS, len(self))):
            try:
                return *self._augmented(self._reader.read(self._path(record), self._channels), place), record
            except ValueError as error:  # noqa: PERF203  decoding costs a thousand times the try
                if not self._skip_unreadable:
                    raise
                skipped.append(str(error))
                record = (record + 1) % len(self)
        raise ValueError(f"{len(skipped)} images in a row cannot be read; the first: {skipped[0]}")

    def _augmented(self, picture: np.ndarray, place: Place) -> tuple[np.ndarray, bool]:
        rng = random.Random(streams.key_of(self._seed, streams.DATA, place.epoch, place.record))
        if self._crop == "random":
            picture = images.random_crop(picture, self._image_size, rng)
        else:
            picture = images.center_crop(picture, self._image_size)
        return picture, self._flip and rng.random() < 0.5


class Batches(Iterator[Batch]):
    """The endless iterator of `make_batches`, with what a training log wants to know about it."""

    def __init__(self, loader: DataLoader[Any], positions: Tensor) -> None:
        self._loader, self._positions = loader, positions
        self._fetched: Iterator[_Fetched] | None = None
        self.wait_seconds = 0.0  # time spent inside next(): what the device waits for the data
        self.skipped = 0  # unreadable pictures met, an example counted each time it was replaced
        self.skipped_examples: list[str] = []  # the first few, with reasons

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self._fetched is None:
            self._fetched = iter(self._loader)
        fetched = next(self._fetched)
        self.wait_seconds += time.perf_counter() - started
        self._count(fetched.skipped)
        if fetched.error:
            self.close()
            raise ValueError(f"{fetched.error}; remove or repair it, or continue past such files with on_error='skip'")
        assert fetched.images is not None
        return Batch(fetched.images, fetched.labels, self._positions, fetched.step, fetched.flips)

    def _count(self, skipped: list[str]) -> None:
        before, self.skipped = self.skipped, self.skipped + len(skipped)
        self.skipped_examples += skipped[: _REMEMBERED - len(self.skipped_examples)]
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
) -> Batches:
    """Endless batches of process `rank` of `size`: positions rank, rank + size, ... of each global batch of `batch_size`.

    `start_image`: the place in the endless walk of the first image of `start_step`, None = `start_step * batch_size`; it matters to a
    run that goes on with another batch size. `crop`: "center" or "random" (80 to 100 % of the shorter side). `flip`: half of the
    examples are to be mirrored; `.flips` says which, and `images.to_float` does it on the device. `workers`: processes that decode;
    0 decodes in this one. `on_error`: "raise" a ValueError that names an unreadable file, or "skip": take the next record in its
    place, and count it in `.skipped`. `.wait_seconds` grows by the time `next()` takes.
    Pinned memory where CUDA is.
    """
    _check(records, image_size, batch_size, rank, size, crop, channels, on_error)
    if workers < 0 or start_step < 0 or (start_image or 0) < 0:
        raise ValueError(f"workers={workers}, start_step={start_step}, start_image={start_image}: must not be negative")
    dataset = _Pictures(records, image_size, channels, crop, flip, seed, on_error == "skip")
    plan = _Plan(len(records), batch_size, rank, size, seed, start_step, shuffle, start_image)
    extra: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _start_worker} if workers else {}
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        # Its own generator, so that making a loader does not move the global one.
        generator=torch.Generator().manual_seed(0),
        **extra,
    )
    return Batches(loader, torch.arange(rank, batch_size, size))


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _start_worker(worker: int) -> None:
    signals.leave_to_parent()


def _check(
    records: Records,
    image_size: images.Size,
    batch_size: int,
    rank: int,
    size: int,
    crop: str,
    channels: int,
    on_error: str,
) -> None:
    where = records.root or "the data"
    if crop not in ("center", "random"):
        raise ValueError(f"crop={crop!r}: must be 'center' or 'random'")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: must be 'raise' or 'skip'")
    if channels not in images.MODES:
        raise ValueError(f"channels={channels}: must be one of {sorted(images.MODES)}")
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank}: must be in 0..{size - 1} for {size} processes")
    if batch_size < 1 or batch_size % size:
        raise ValueError(
            f"batch_size={batch_size} (over all processes): must be a positive multiple of {size} processes"
        )
    if batch_size > len(records):
        raise ValueError(
            f"batch_size={batch_size} (over all processes) is larger than the {len(records)} images of {where}; lower it to at most "
            f"{len(records) // size * size}, or add images"
        )
    height, width = images.height_width(image_size)
    if records.stored_size is not None:
        # Packed pictures have lost what lies outside of them: a crop that wants more would be blown up, silently blurred.
        least = (height, width) if crop == "center" else images.largest_cover((height, width))
        if records.stored_size[0] < least[0] or records.stored_size[1] < least[1]:
            raise ValueError(
                f"{where}: packed at {records.stored_size[0]}x{records.stored_size[1]}, but crop={crop!r} at {height}x{width} needs at "
                f"least {least[0]}x{least[1]}; pack the source at that size"
            )
