"""Asked to stop: SIGTERM and SIGUSR1 set a flag; the ranks agree on it between two steps, save once, and leave with a code of their own.

Slurm sends the signal before a time limit (`#SBATCH --signal=USR1@120`), cloud machines before they are taken back. Exit code 85
(`REQUEUE_EXIT_CODE`) says: stopped early, everything saved, start me again. See docs/clusters.md.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from .world import REQUEUE_EXIT_CODE as REQUEUE_EXIT_CODE
from .world import World

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
