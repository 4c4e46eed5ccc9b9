"""Stopping early on a signal: it sets a flag; between two steps the ranks agree on it, save once, and exit with a code of its own.

Slurm sends SIGUSR1 before a time limit (`#SBATCH --signal=USR1@120`), clouds SIGTERM before they preempt a machine, a closed terminal
SIGHUP. Exit code 85 (`REQUEUE_EXIT_CODE`) says: stopped early, everything saved, start me again. Ctrl-C (SIGINT) does the same and ends
with 130: a person does not want to be started again. See docs/clusters.md.

Signals often go to every process of a job. Worker processes ignore them, and their parent decides: see `leave_to_parent`.
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
"""Seconds between two steps at which the ranks ask each other whether to stop; each time the host waits for the device."""

# Names, because Windows has neither SIGUSR1 nor SIGHUP
DEFAULT_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP")
TRAINING_SIGNALS = (*DEFAULT_SIGNALS, "SIGINT")
# `nohup`, and shells that start a command in the background, make it ignore these signals: they stay ignored.
_MAY_BE_IGNORED = ("SIGHUP", "SIGINT")
# Repetitions within so many seconds are one request: `timeout` and launchers signal a process and then its whole process group.
_ONE_REQUEST_S = {"SIGINT": 0.2}
_ONE_REQUEST_BY_PROGRAMS_S = 3.0


class Stop:
    """A flag that signals set. Use it as a context manager: on exit the earlier handlers are restored.

    A second signal of the same kind goes to the earlier handler if the program had set one; else it ends the process at once.
    Outside the main thread Python allows no handlers; the flag can then only be set by `request`.
    """

    def __init__(self, signals: Sequence[str] = DEFAULT_SIGNALS) -> None:
        unknown = [name for name in signals if not name.startswith("SIG")]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no signal; name them like {DEFAULT_SIGNALS}")
        self.reason: str | None = None
        self.interrupted = False
        """Whether the reason is Ctrl-C, on this or another rank: a person stopped the job, not a scheduler."""
        self.quiet = False
        """Print nothing on Ctrl-C: set on all ranks but rank 0, as the terminal signals every rank."""
        self._names = [name for name in signals if hasattr(signal, name)]
        self._earlier: dict[int, Any] = {}  # signal number -> the handler before ours
        self._received: dict[int, float] = {}  # signal number -> time of the first signal

    @property
    def exit_code(self) -> int:
        """The exit code of a command that stopped early."""
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
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._earlier = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        since = self._received.setdefault(number, now)
        if since != now:
            if now - since > _ONE_REQUEST_S.get(name, _ONE_REQUEST_BY_PROGRAMS_S):
                before = self._earlier.get(number) or signal.SIG_DFL  # None: a handler that Python did not install
                # Python's own SIGINT handler raises KeyboardInterrupt, whose clean-up waits for a save that is being written.
                signal.signal(number, signal.SIG_DFL if before is signal.default_int_handler else before)
                os.kill(os.getpid(), number)
            return
        self.request(f"received {name}")
        silence_closed_streams()
        if name == "SIGINT":
            self.interrupted = True
            if not self.quiet:  # os.write: the signal may have come while Python's buffered stderr was in use
                with contextlib.suppress(OSError):
                    os.write(2, b"\ninterrupted: ends after this step, with everything saved; once more ends at once\n")


def leave_to_parent() -> None:
    """Call it in a worker process: from then on it ends only on a SIGTERM of its parent, or when the parent has ended.

    A scheduler, `timeout` or a terminal signals every process of a job. A worker that such a signal killed would end the main process with
    an error before it has saved. (Where the sender of a signal is unknown, on macOS and Windows, any SIGTERM ends the worker.)
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
                time.sleep(_PARENT_POLL_S)
                continue
            sent = signal.sigtimedwait(numbers, _PARENT_POLL_S)
            if sent is not None and sent.si_signo == signal.SIGTERM and sent.si_pid in parents:
                break
        os._exit(0)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


_PARENT_POLL_S = 0.5


class Agreement:
    """Decides at which steps the ranks ask each other whether to stop: about `AGREE_S` apart, and without communication the same on all."""

    def __init__(self, world: World, stop: Stop) -> None:
        self._world, self._stop = world, stop
        self._next = 0  # the next step at which they ask
        self._last: tuple[int, float] | None = None  # step and time when they last asked

    def due(self, step: int) -> bool:
        """Whether the ranks ask each other at this step; all ranks get the same answer."""
        return self._world.size == 1 or step >= self._next

    def stop(self, step: int) -> bool:
        """Whether any rank was asked to stop. A collective: call it at the steps that are `due`."""
        stop, world, now = self._stop, self._world, time.monotonic()
        if world.size == 1:
            return stop.requested
        pace = AGREE_S  # seconds per step; this value, before it was measured, makes them ask again at the next step
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
