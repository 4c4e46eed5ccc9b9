"""Records -> endless batches, whose content depends only on (seed, step, position in the batch).

It does not depend on the number of processes or workers, nor on where the run was interrupted: the image at step `s`, position `p` of the
global batch is number `g = s * batch_size + p` of an endless walk; epoch `g // len(records)` visits every record once, in the order
`order(seed, epoch)`. Crop and flip draw from a generator seeded by (seed, epoch, record). To resume, start at another step.
"""

from __future__ import annotations

import functools
import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..runtime import signals, streams
from . import images
from .images import Size
from .listing import Records
from .sources import open_source

_MAX_REPLACEMENTS = 100  # unreadable images in a row before "skip" gives up: then the whole data set is broken


class Batch(NamedTuple):
    """One process's part of a global batch."""

    images: Tensor  # uint8 [B, H, W, C]
    labels: Tensor | None  # int64 [B]
    positions: Tensor  # int64 [B], the position of each example in the global batch
    step: int
    flips: Tensor | None = None  # bool [B]: the examples that `to_device` mirrors
    low_res_size: Size = 0  # size of the low-resolution copies that `to_device` adds for an upsampler; 0 = none

    def to_device(self, device: torch.device) -> FinishedBatch:
        """The batch on `device`, as a loss takes it. `positions` stay in main memory, where they seed generators."""
        moved = [None if t is None else t.to(device, non_blocking=True) for t in (self.images, self.labels, self.flips)]
        pixels, labels, flips = moved
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


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of `count` records in an epoch, int64.

    Drawn by numpy's legacy generator, whose numbers never change between versions: a run resumed years later sees the same order.
    """
    key = streams.key_of(seed, streams.DATA, epoch)
    state = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
    return state.permutation(count).astype(np.int64)


Index = tuple[int, list[tuple[int, int]]]  # a step, and (epoch, record) of each example of this process


def _indices(
    count: int, batch_size: int, rank: int, size: int, seed: int, shuffle: bool, start_step: int, start_image: int
) -> Iterator[Index]:
    """Endless: for each step, the records that this process reads out of `count`."""
    orders: dict[int, np.ndarray] = {}
    for step in itertools.count(start_step):
        begin = start_image + (step - start_step) * batch_size
        walk = [divmod(g, count) for g in range(begin + rank, begin + batch_size, size)]
        for epoch in {walk[0][0], walk[-1][0]} - orders.keys():  # at most two: a batch is no larger than the data
            orders[epoch] = order(seed, epoch, count) if shuffle else np.arange(count)
        orders = {epoch: permutation for epoch, permutation in orders.items() if epoch >= walk[0][0]}
        yield step, [(epoch, int(orders[epoch][position])) for epoch, position in walk]


# What a worker returns: batch or None, errors of skipped images, error as text (torch would wrap an exception in a traceback).
_Fetched = tuple[Batch | None, list[str], str]


class _Examples(Dataset[_Fetched]):
    """Decodes and augments images, in the worker processes. It holds the paths as one array of bytes and not as strings.

    (Reading a Python string in a forked process copies its page, so a list of paths would slowly take its memory once per worker.)
    """

    def __init__(
        self,
        records: Records,
        positions: Tensor,
        *,
        image_size: Size,
        channels: int,
        crop: str,
        flip: bool,
        seed: int,
        skip_unreadable: bool,
    ) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in records.paths]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._paths = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._labels = records.labels
        self._source = open_source(records.kind, records.root)
        self._positions, self._image_size, self._channels = positions, image_size, channels
        self._crop, self._flip, self._seed = crop, flip, seed
        self._skip_unreadable = skip_unreadable

    def __getitem__(self, index: Index) -> _Fetched:
        step, addresses = index
        skipped: list[str] = []
        try:
            examples = [self._example(epoch, record, skipped) for epoch, record in addresses]
        except ValueError as error:
            return None, skipped, str(error)
        pixels, flips, records = zip(*examples)
        labels = None if self._labels is None else torch.from_numpy(self._labels[list(records)])
        mirrored = torch.tensor(flips) if self._flip else None
        return Batch(torch.from_numpy(np.stack(pixels)), labels, self._positions, step, mirrored), skipped, ""

    def _example(self, epoch: int, record: int, skipped: list[str]) -> tuple[np.ndarray, bool, int]:
        """(cropped image, whether to mirror it, record that was read): with `skip_unreadable` the next record that can be read.

        The random draws depend on the seed, the epoch and the record asked for only.
        """
        key, count = streams.key_of(self._seed, streams.DATA, epoch, record), len(self._ends) - 1
        for _ in range(min(_MAX_REPLACEMENTS, count)):
            path = self._paths[self._ends[record] : self._ends[record + 1]].tobytes()
            try:
                image = self._source.read(path.decode("utf-8", "surrogateescape"), self._channels)
                rng = random.Random(key)
                if self._crop == "random":
                    return images.random_crop(image, self._image_size, rng), rng.random() < 0.5, record
                return images.center_crop(image, self._image_size), rng.random() < 0.5, record
            except ValueError as error:
                if not self._skip_unreadable:
                    raise
                skipped.append(str(error))
                record = (record + 1) % count
        raise ValueError(f"{len(skipped)} images in a row cannot be read; the first: {skipped[0]}")


class Batches(Iterator[Batch]):
    """The endless iterator of `make_batches`, with counters for the training log."""

    def __init__(
        self, examples: _Examples, indices: Callable[[], Iterator[Index]], workers: int, low_res_size: Size
    ) -> None:
        self._examples, self._indices, self._workers, self._low_res_size = examples, indices, workers, low_res_size
        self._fetched: Iterator[_Fetched] | None = None
        self.wait_seconds = 0.0  # time spent in next(), while the device waits for data
        self.skipped = 0  # unreadable images met, an example counted each time it was replaced

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self._fetched is None:
            loader: DataLoader[_Fetched] = DataLoader(
                self._examples,
                sampler=self._indices(),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=4 if self._workers else None,
                worker_init_fn=_start_worker,
                pin_memory=torch.cuda.is_available(),
                # Else DataLoader would draw a seed from torch's global generator.
                generator=torch.Generator().manual_seed(0),
            )
            self._fetched = iter(loader)
        batch, skipped, error = next(self._fetched)
        self.wait_seconds += time.perf_counter() - started
        before, self.skipped = self.skipped, self.skipped + len(skipped)
        if len(str(self.skipped)) > len(str(before)) or (skipped and not before):  # at 1, 10, 100, ...
            text = f"{self.skipped} times an unreadable image was replaced by another; the latest: {skipped[-1]}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        if batch is None:
            self.close()
            raise ValueError(f"{error}; remove or repair it, or continue past such files with on_error='skip'")
        return batch._replace(low_res_size=self._low_res_size)

    def close(self) -> None:
        """Stop the workers; a later `next()` begins again at the first step."""
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

    `start_image`: the index `g` (see above) of the first image of `start_step`, None = `start_step * batch_size`; another value lets a
    run continue with another batch size. `crop`: "center" or "random" (80 to 100 % of the shorter side). `flip`: mark half of the
    examples in `.flips`; `Batch.to_device` mirrors them. `workers`: processes that decode;
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
    positions = torch.arange(rank, batch_size, size)
    options: dict[str, Any] = {"image_size": image_size, "channels": channels, "crop": crop, "flip": flip, "seed": seed}
    examples = _Examples(records, positions, skip_unreadable=on_error == "skip", **options)
    indices = functools.partial(_indices, len(records), batch_size, rank, size, seed, shuffle, start_step, start)
    return Batches(examples, indices, workers, low_res_size)


def _start_worker(worker: int) -> None:
    signals.leave_to_parent()


def _check_sizes(records: Records, image_size: images.Size, batch_size: int, processes: int, crop: str) -> None:
    """ValueError if the records are too few for a batch, or were packed too small for the crop."""
    source, count, batch = records.root or "the data", len(records), f"batch_size={batch_size} (over all processes)"
    if batch_size < 1 or batch_size % processes:
        raise ValueError(f"{batch}: must be a positive multiple of {processes} processes")
    if batch_size > count:
        remedy = f"lower it to at most {count // processes * processes}, or add images"
        raise ValueError(f"{batch} is larger than the {count} images of {source}; {remedy}")
    height, width = images.height_width(image_size)
    # Packed images are cropped already: a larger crop would have to enlarge them, and so blur them.
    least = (height, width) if crop == "center" else images.largest_cover((height, width))
    stored = records.stored_size or least
    if stored[0] < least[0] or stored[1] < least[1]:
        needs = f"crop={crop!r} at {height}x{width} needs at least {least[0]}x{least[1]}; pack the source at that size"
        raise ValueError(f"{source}: packed at {stored[0]}x{stored[1]}, but {needs}")
