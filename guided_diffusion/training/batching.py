"""Cutting batches, moving them, and timing the loop around them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

POSITIONS = "positions"
_MUCH_WAITING = 0.2  # share of the time
_log = logging.getLogger(__name__)


def _items(batch: Any) -> dict[str, Any]:
    if hasattr(batch, "_asdict"):
        return batch._asdict()
    if isinstance(batch, Mapping):
        return dict(batch)
    raise ValueError(f"a batch is a {type(batch).__name__}; it must be a NamedTuple or a dict of tensors")


def _map(batch: Any, change: Callable[[str, Any], Any]) -> Any:
    changed = {name: change(name, value) for name, value in _items(batch).items()}
    return type(batch)(**changed) if hasattr(batch, "_asdict") else changed


def length(batch: Any) -> int:
    """How many examples a batch has: the first dimension of its tensors."""
    for value in _items(batch).values():
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise ValueError("a batch without tensors cannot be trained on")


def split(batch: Any, size: int) -> Iterator[Any]:
    """Consecutive pieces of at most `size` examples, 0 = the whole batch; what is not a tensor of examples stays as it is."""
    total = length(batch)
    size = size if 0 < size < total else total
    for start in range(0, total, size):

        def cut(_: str, value: Any, part: slice = slice(start, start + size)) -> Any:
            return value[part] if isinstance(value, Tensor) and value.dim() and value.shape[0] == total else value

        yield _map(batch, cut)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on `device`: by its own method `to_device`, which may finish it there (flips, float images), else tensor by tensor.

    `positions` stay in main memory: they address generators there.
    """
    if hasattr(batch, "to_device"):
        return batch.to_device(device)

    def move(name: str, value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != POSITIONS else value

    return _map(batch, move)


def positions(batch: Any, rank: int, size: int) -> Tensor:
    """Each example's place in the global batch, int64 `[B]` in main memory; without the field, dealt out in turn."""
    places = _items(batch).get(POSITIONS)
    return torch.arange(length(batch)) * size + rank if places is None else places.cpu()


class Feed:
    """The batches of a loop: an iterable, or a function of the first step that returns one, made when the first batch is wanted."""

    def __init__(self, batches: Iterable[Any] | Callable[[int], Iterable[Any]]) -> None:
        self._make = batches if callable(batches) else None
        self._source: Any = None if callable(batches) else batches
        self._iterator: Iterator[Any] | None = None

    @property
    def unreadable(self) -> float:
        """How many images could not be read so far, where the source counts them."""
        return getattr(self._source, "skipped", 0)

    def next(self, step: int, clock: Clock) -> Any:
        """The batch of a step, None at the end of the data; ValueError if the data stands at another step."""
        if self._iterator is None:
            if self._make is not None:
                self._source = self._make(step)
            self._iterator = iter(self._source)
        with clock.waiting(self._source):
            batch = next(self._iterator, None)
        expected = getattr(batch, "step", None)
        if expected is not None and int(expected) != step:
            raise ValueError(
                f"the data stands at step {int(expected)}, training at {step}: "
                "start the batches at the restored step, or pass a function of the first step"
            )
        return batch

    def restart(self) -> None:
        """Begin anew with the next batch."""
        self._iterator = None

    def close(self) -> None:
        """End the processes that read images, where this feed has made them: the next batch makes them anew."""
        if self._make is not None:
            self._iterator = None
            if hasattr(self._source, "close"):
                self._source.close()


class Clock:
    """Images per second, share of time spent waiting for data, and a progress bar with the time left.

    Times are the host's; they are right over an interval because a log line waits for the device.
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
        """Time spent in the body is waiting for data; a source that knows better says so by `wait_seconds`."""
        start, before = time.perf_counter(), getattr(source, "wait_seconds", None)
        yield
        after = getattr(source, "wait_seconds", None)
        self._waited += after - before if before is not None and after is not None else time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Time spent in the body (callbacks, copying for a save) is not training time. Steps under way are awaited first."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self, loss: float | None) -> dict[str, float]:
        """Figures since the last call ("seconds" since the loop began), shown beside the bar with the loss.

        Says what helps against waiting for data: once in a run, at the third interval in a row with much of it (the first ones
        start workers).
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
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()
