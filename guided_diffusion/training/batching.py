"""Batches of training: cutting them into microbatches, moving them to the device, and timing the loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

POSITIONS = "positions"
_MUCH_WAITING = 0.2  # share of time spent waiting for data, above which a hint is due
_log = logging.getLogger(__name__)


def _fields(batch: Any) -> dict[str, Any]:
    if hasattr(batch, "_asdict"):
        return batch._asdict()
    if isinstance(batch, Mapping):
        return dict(batch)
    raise ValueError(f"a batch is a {type(batch).__name__}; it must be a NamedTuple or a dict of tensors")


def _map_fields(batch: Any, change: Callable[[str, Any], Any]) -> Any:
    changed = {name: change(name, value) for name, value in _fields(batch).items()}
    return type(batch)(**changed) if hasattr(batch, "_asdict") else changed


def length(batch: Any) -> int:
    """How many examples a batch has: the first dimension of its tensors."""
    for value in _fields(batch).values():
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise ValueError("a batch without tensors cannot be trained on")


def split(batch: Any, size: int) -> Iterator[Any]:
    """Microbatches of at most `size` examples, 0 = the whole batch. Fields without a batch axis are repeated in each."""
    total = length(batch)
    size = size if 0 < size < total else total
    for start in range(0, total, size):

        def cut(_: str, value: Any, part: slice = slice(start, start + size)) -> Any:
            return value[part] if isinstance(value, Tensor) and value.dim() and value.shape[0] == total else value

        yield _map_fields(batch, cut)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on `device`: by its own `to_device`, which may also finish it (flips, float images), or by tensor.

    `positions` stay on the CPU, where they become the seeds of random generators (`Streams`).
    """
    if hasattr(batch, "to_device"):
        return batch.to_device(device)

    def move(name: str, value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != POSITIONS else value

    return _map_fields(batch, move)


def positions(batch: Any, rank: int, size: int) -> Tensor:
    """Indices in the global batch, int64 `[B]` on the CPU: the field `positions`, else `local index * size + rank`."""
    stored = _fields(batch).get(POSITIONS)
    return torch.arange(length(batch)) * size + rank if stored is None else stored.cpu()


class Feed:
    """The batches of a loop: an iterable, or a function `first step -> iterable`, called for the first batch."""

    def __init__(self, batches: Iterable[Any] | Callable[[int], Iterable[Any]]) -> None:
        self._make = batches if callable(batches) else None
        self._source: Any = None if callable(batches) else batches
        self._iterator: Iterator[Any] | None = None

    @property
    def unreadable(self) -> float:
        """How many images could not be read so far, where the source counts them."""
        return getattr(self._source, "skipped", 0)

    def next(self, step: int, clock: Clock) -> Any:
        """The batch of a step, None at the end of the data; ValueError if the batch belongs to another step."""
        if self._iterator is None:
            if self._make is not None:
                self._source = self._make(step)
            self._iterator = iter(self._source)
        with clock.waiting(self._source):
            batch = next(self._iterator, None)
        expected = getattr(batch, "step", None)
        if expected is not None and int(expected) != step:
            raise ValueError(
                f"the next batch belongs to step {int(expected)}, but training is at step {step}: "
                "start the batches at the restored step, or pass a function of the first step"
            )
        return batch

    def restart(self) -> None:
        """Let the next call of `next` create the iterator anew."""
        self._iterator = None

    def close(self) -> None:
        """End the data workers if this feed created their source; `next` would create it again."""
        if self._make is not None:
            self._iterator = None
            if hasattr(self._source, "close"):
                self._source.close()


class Clock:
    """Images per second, share of time spent waiting for data, and a progress bar with the time left.

    Times are taken on the host. Over a log interval they are right, because writing a log row waits for the device.
    """

    def __init__(self, bar: bool, done: int, target: int | None) -> None:
        self._bar: Any = None
        if bar:
            from tqdm import tqdm

            self._bar = tqdm(initial=done, total=target, unit="step", dynamic_ncols=True)
        self._begin = self._start = time.perf_counter()
        self._images = 0
        self._waited = self._paused = 0.0
        self._waits_in_a_row = 0
        self._hinted = False

    def count(self, images: int) -> None:
        """One step over `images` examples is done."""
        self._images += images
        if self._bar is not None:
            self._bar.update()

    @contextlib.contextmanager
    def waiting(self, source: Any) -> Iterator[None]:
        """Count the `with` block as waiting for data, or the growth of the source's own total `wait_seconds`."""
        start, before = time.perf_counter(), getattr(source, "wait_seconds", None)
        yield
        after = getattr(source, "wait_seconds", None)
        self._waited += after - before if before is not None and after is not None else time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Exclude the `with` block (callbacks, copying for a save) from training time. Waits for the device first."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self, loss: float | None) -> dict[str, float]:
        """Log columns for the time since the last call ("seconds": since the loop began); updates the bar's numbers.

        Logs a hint against waiting for data once per run, at the third interval in a row with much of it: in the first ones,
        workers start.
        """
        now = time.perf_counter()
        spent = max(now - self._start - self._paused, 1e-9)
        rate, share = self._images / spent, min(self._waited / spent, 1.0)
        self._start, self._images, self._waited, self._paused = now, 0, 0.0, 0.0
        if self._bar is not None:
            shown = {"img/s": f"{rate:.1f}", **({} if loss is None else {"loss": f"{loss:.4g}"})}
            self._bar.set_postfix(shown, refresh=False)
        self._waits_in_a_row = self._waits_in_a_row + 1 if share > _MUCH_WAITING else 0
        if self._waits_in_a_row >= 3 and not self._hinted:
            self._hinted = True
            _log.info(
                f"hint: {share:.0%} of the time is spent waiting for images. More --workers, or `guided-diffusion data pack` "
                "(decode and crop once, map into memory), would make training faster"
            )
        return {"images_per_second": rate, "data_wait_share": share, "seconds": now - self._begin}

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()
