"""Asked to stop: SIGTERM and SIGUSR1 set a flag; the ranks agree on it between two steps, save once, and leave with a code of their own.

Slurm sends the signal before a time limit (`#SBATCH --signal=USR1@120`), cloud machines before they are taken back. Exit code 85
(`REQUEUE_EXIT_CODE`) says: stopped early, everything saved, start me again. See docs/clusters.md.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import torch

from .world import REQUEUE_EXIT_CODE as REQUEUE_EXIT_CODE
from .world import World

AGREE_S = 2.0
"""About how often several processes ask each other whether to stop; each time costs one wait for the device."""

# Names, because Windows has no SIGUSR1
DEFAULT_SIGNALS = ("SIGTERM", "SIGUSR1")


class Stop:
    """A flag that signals set. Use it as a context manager: the handlers that were there before come back afterwards.

    Workers that a data loader forks inherit the handlers, and so live through a first signal that Slurm sends to every process of a step.
    A second signal of the same kind gets the handler from before, so that an impatient second SIGTERM still ends the process.
    Outside the main thread Python allows no handlers; the flag can then only be set by `request`.
    """

    def __init__(self, signals: Sequence[str] = DEFAULT_SIGNALS) -> None:
        unknown = [name for name in signals if not name.startswith("SIG")]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no signal; name them like {DEFAULT_SIGNALS}")
        self.reason: str | None = None
        self._names = [name for name in signals if hasattr(signal, name)]
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True once this process was asked to stop. Other ranks may not have been: see `agreed`."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Set the flag without a signal (a time budget, say)."""
        if self.reason is None:
            self.reason = reason

    def agreed(self, world: World) -> bool:
        """True on every rank if any rank was asked. A collective: all ranks call it at the same steps."""
        stop = world.any_true(self.requested, "agreement to stop")
        if stop:
            self.request("another rank was asked to stop")
        return stop

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in self._names:
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(f"received {signal.Signals(number).name}")
        signal.signal(number, self._before.get(number, signal.SIG_DFL))


class Agreement:
    """At which steps the processes ask each other whether to stop: steps that all know without talking, about `AGREE_S` apart."""

    def __init__(self, world: World, stop: Stop | None) -> None:
        self._world, self._stop = world, stop
        self._next: int | None = None
        self._asked = (0, 0.0)

    def due(self, step: int) -> bool:
        """Whether this is such a step, the same answer on all processes."""
        return self._world.size == 1 or self._next is None or step >= self._next

    def stop(self, step: int) -> bool:
        """Whether anybody was asked to stop. A collective, for steps that are due."""
        requested = self._stop is not None and self._stop.requested
        if self._world.size == 1:
            return requested
        now, (asked_step, asked_at) = time.monotonic(), self._asked
        pace = (now - asked_at) / max(1, step - asked_step) if self._next is not None else AGREE_S
        told = torch.tensor([float(requested), pace], device=self._world.device)
        count, pace = self._world.all_reduce_sum_(told, "agreement to stop").tolist()
        self._next = step + min(100, max(1, int(AGREE_S * self._world.size / max(pace, 1e-6))))
        self._asked = (step, now)
        if count and self._stop is not None:
            self._stop.request("another rank was asked to stop")
        return bool(count)
