"""Asked to stop: a signal sets a flag; the ranks agree on it between two steps, save once, and leave with a code of their own.

Slurm sends SIGUSR1 before a time limit (`#SBATCH --signal=USR1@120`), cloud machines SIGTERM before they are taken back, a closed terminal
SIGHUP. Exit code 85 (`REQUEUE_EXIT_CODE`) says: stopped early, everything saved, start me again. Ctrl-C (SIGINT) does the same and ends
with 130: a person does not want to be started again. See docs/clusters.md.

Signals often go to every process of a job. Those that a process of ours starts leave them to it: see `leave_to_parent`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch

from .log import silence_closed_streams
from .world import REQUEUE_EXIT_CODE as REQUEUE_EXIT_CODE
from .world import World

AGREE_S = 2.0
"""About how often several processes ask each other whether to stop; each time costs one wait for the device."""

# Names, because Windows has neither SIGUSR1 nor SIGHUP
DEFAULT_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP")
TRAINING_SIGNALS = (*DEFAULT_SIGNALS, "SIGINT")
# `nohup` and shells that start a command in the background have these ignored for it, and mean it.
_MAY_BE_IGNORED = ("SIGHUP", "SIGINT")
# Repetitions within so many seconds are one request: `timeout` and launchers send a signal to a process and to its whole group.
_ONE_REQUEST_S = {"SIGINT": 0.2}
_ONE_REQUEST_BY_PROGRAMS_S = 3.0


class Stop:
    """A flag that signals set. Use it as a context manager: the handlers that were there before come back afterwards.

    A later signal of the same kind ends the process at once (SIGINT), or gets the handler from before, so that an impatient second SIGTERM
    ends it too. Outside the main thread Python allows no handlers; the flag can then only be set by `request`.
    """

    def __init__(self, signals: Sequence[str] = DEFAULT_SIGNALS) -> None:
        unknown = [name for name in signals if not name.startswith("SIG")]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no signal; name them like {DEFAULT_SIGNALS}")
        self.reason: str | None = None
        self.interrupted = False
        """Whether it was Ctrl-C, here or on another rank: a person and no scheduler."""
        self.quiet = False
        """Say nothing on Ctrl-C: set on all ranks but the main one, as all hear it."""
        self._names = [name for name in signals if hasattr(signal, name)]
        self._before: dict[int, Any] = {}
        self._since: dict[int, float] = {}

    @property
    def exit_code(self) -> int:
        """What a command that stopped early ends with."""
        return 130 if self.interrupted else REQUEUE_EXIT_CODE

    @property
    def requested(self) -> bool:
        """True once this process was asked to stop. Other ranks may not have been: see `Agreement`."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Set the flag without a signal (a time budget, say)."""
        if self.reason is None:
            self.reason = reason

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in self._names:
                number = getattr(signal, name)
                if name in _MAY_BE_IGNORED and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        since = self._since.setdefault(number, now)
        if since != now:
            if now - since > _ONE_REQUEST_S.get(name, _ONE_REQUEST_BY_PROGRAMS_S):
                before = self._before.get(number) or signal.SIG_DFL  # None: a handler that Python did not install
                # Python's own handler would unwind, and wait for a save on the way.
                signal.signal(number, signal.SIG_DFL if before is signal.default_int_handler else before)
                os.kill(os.getpid(), number)
            return
        self.request(f"received {name}")
        silence_closed_streams()
        if name == "SIGINT":
            self.interrupted = True
            if not self.quiet:  # past Python's buffers, which the signal may have found in use
                with contextlib.suppress(OSError):
                    os.write(2, b"\ninterrupted: ends after this step, with everything saved; once more ends at once\n")


def leave_to_parent() -> None:
    """Call it in a process that works for another one of ours: it ends when that one says so or is gone, and not before.

    A scheduler, `timeout` or a terminal signals every process of a job. One that died of it would end the main one with an error, before
    it has saved; and a main process that is killed must leave nothing behind.
    """
    started_by = multiprocessing.parent_process()
    parents = {os.getppid(), started_by.pid if started_by is not None else None}
    numbers = [getattr(signal, name) for name in TRAINING_SIGNALS if hasattr(signal, name)]
    sender_is_known = hasattr(signal, "sigtimedwait")  # not on macOS and Windows
    if sender_is_known:
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    else:
        for number in numbers:
            if number != signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)

    def end_with_parent(parent: int = os.getppid()) -> None:
        while os.getppid() == parent:
            if not sender_is_known:
                time.sleep(_LOOK_S)
                continue
            sent = signal.sigtimedwait(numbers, _LOOK_S)
            if sent is not None and sent.si_signo == signal.SIGTERM and sent.si_pid in parents:
                break
        os._exit(0)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


_LOOK_S = 0.5


class Agreement:
    """At which steps the processes ask each other whether to stop: steps that all know without talking, about `AGREE_S` apart."""

    def __init__(self, world: World, stop: Stop) -> None:
        self._world, self._stop = world, stop
        self._next = 0  # the first step from which on they ask again
        self._last: tuple[int, float] | None = None  # step and time of the last question

    def due(self, step: int) -> bool:
        """Whether this is such a step, the same answer on all processes."""
        return self._world.size == 1 or step >= self._next

    def stop(self, step: int) -> bool:
        """Whether anybody was asked to stop. A collective, for steps that are due."""
        stop, world, now = self._stop, self._world, time.monotonic()
        if world.size == 1:
            return stop.requested
        pace = AGREE_S  # seconds per step; unknown at first
        if self._last is not None:
            pace = (now - self._last[1]) / max(1, step - self._last[0])
        sums = torch.tensor([float(stop.requested), float(stop.interrupted), pace], device=world.device)
        requests, interrupts, paces = world.all_reduce_sum_(sums, "agreement to stop").tolist()
        self._next = step + min(100, max(1, int(AGREE_S * world.size / max(paces, 1e-6))))
        self._last = (step, now)
        if requests:
            stop.request("another rank was asked to stop")
            stop.interrupted = bool(interrupts)
        return bool(requests)
