"""When one rank fails, end all ranks within seconds and print the reason.

A collective whose partner has died may wait for ever: over NCCL nothing notices, and `mpiexec` does not kill for a plain non-zero exit.
So a failing rank writes its reason (a death note) to the TCPStore of the job, and a thread in every rank polls that key.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, NoReturn

POLL_S = 0.5
GRACE_S = 30.0  # between the timeouts of the backend and of the watch, so that only one of them reports
DEATH_NOTE = "guided_diffusion/death"
BEAT = "guided_diffusion/beat"
BEAT_S = 2.0  # how often a rank writes its heartbeat to the store
SILENCE_S = 60.0  # without a heartbeat for so long a rank counts as dead; imports and compilations take less


@dataclass
class Context:
    """What this rank is doing now: the mutable part of a `World`, for error messages and the watching thread."""

    rank: int = 0
    size: int = 1
    step: int | None = None
    operation: str | None = None
    since: float = 0.0
    patience_s: float = 600.0
    silence_s: float = SILENCE_S
    pending: list[tuple[str, float, Any]] = field(default_factory=list)  # (operation, start, work) of NCCL collectives
    store: Any = None
    watch: Watch | None = None

    def where(self) -> str:
        """`rank 1 of 4, step 1200`."""
        step = "" if self.step is None else f", step {self.step}"
        return f"rank {self.rank} of {self.size}{step}"

    def overdue(self) -> tuple[str, float] | None:
        """The operation that has been waiting for longer than `patience_s`, and for how long (seconds)."""
        now = time.monotonic()
        self.pending[:] = [entry for entry in self.pending if not entry[2].is_completed()]
        waits = [(name, now - since) for name, since, _ in self.pending]
        if self.operation is not None:
            waits.append((self.operation, now - self.since))
        late = [wait for wait in waits if wait[1] > self.patience_s]
        return max(late, key=lambda wait: wait[1]) if late else None


class Watch(threading.Thread):
    """Ends this process when another rank has left a note or lost its heartbeat, or an operation here exceeds `patience_s`."""

    def __init__(self, context: Context, store: Any) -> None:
        super().__init__(name="guided-diffusion-watch", daemon=True)
        self._context, self._store = context, store
        self._stopped = threading.Event()
        self._rounds = 0
        self._beats: dict[int, tuple[bytes, int]] = {}  # rank -> its last beat, rounds since then
        self._write_heartbeat()  # before the process group is made: rank 0 may read it from then on

    def run(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                note = self._store.get(DEATH_NOTE).decode() if self._store.check([DEATH_NOTE]) else None
                self._rounds += 1
                if self._rounds % round(BEAT_S / POLL_S) == 0:
                    self._write_heartbeat()
                    if self._context.rank == 0:
                        self._find_silent_ranks()
            except RuntimeError:
                # The host of the store has ended before the last barrier. Give the main thread time to fail first: the error of
                # a collective says more. Over NCCL it may wait for ever instead.
                if self._stopped.wait(10 * POLL_S):
                    return
                leave(
                    f"[{self._context.where()}] ends because the process that hosts the store (rank 0, or torchrun) has gone\n"
                )
            if note is not None and not note.startswith(f"{self._context.rank}\n"):
                # The collective that waits for the dead rank usually fails in the main thread too: give that error time to be
                # reported first.
                if self._stopped.wait(4 * POLL_S):
                    return
                reason = note.partition("\n")[2]
                leave(f"[{self._context.where()}] ends because {reason}\n")
            late = self._context.overdue()
            if late is not None:
                operation, waited = late
                print(timeout_message(self._context, operation, waited), file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                post_note(self._context, f"{self._context.where()} waited {waited:.0f} s for {operation}")
                leave("", after=self._context)

    def _write_heartbeat(self) -> None:
        self._store.set(f"{BEAT}/{self._context.rank}", str(self._rounds))

    def _find_silent_ranks(self) -> None:
        """Find ranks that were killed and left no note (by the out-of-memory killer, say), and end the job.

        Counted in rounds and not in seconds, so that suspending and resuming the whole job raises no alarm.
        """
        others = range(1, self._context.size)
        for rank, beat in zip(others, self._store.multi_get([f"{BEAT}/{rank}" for rank in others])):
            last_beat, silent = self._beats.get(rank, (b"", 0))
            silent = silent + 1 if beat == last_beat else 0
            self._beats[rank] = (beat, silent)
            if silent * BEAT_S > self._context.silence_s:
                reason = f"rank {rank} gave no sign of life for {silent * BEAT_S:.0f} s: killed (out of memory?), stopped, or cut off"
                print(f"[{self._context.where()}] ends because {reason}", file=sys.stderr, flush=True)
                post_note(self._context, reason)
                leave("", after=self._context)

    def stop(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self:
            self.join(timeout=5 * POLL_S)


def timeout_message(context: Context, operation: str, waited: float) -> str:
    """The error message for a collective that some rank has not joined in time."""
    return (
        f"[{context.where()}] {operation} got no answer for {waited:.0f} s. Some rank did not join: look at the other ranks' output for "
        "a traceback or for another step or operation. If every rank waits here, the network is at fault: try NCCL_P2P_DISABLE=1, "
        "NCCL_DEBUG=INFO, or name the interface in NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME."
    )


def post_note(context: Context, reason: str) -> str | None:
    """Write to the store why this rank ends. If another rank's note is there already, it stays, and its reason is returned; else None.

    Print first, and then call `leave` with `after`: the launcher may kill this rank as soon as another one has read the note and ended.
    """
    if context.store is None:
        return None
    note = f"{context.rank}\n{reason}"
    try:
        first = context.store.compare_set(DEATH_NOTE, "", note).decode()
    except RuntimeError:
        return None  # the store's host is gone: the others know already
    return None if first == note else first.partition("\n")[2]


def leave(message: str, code: int = 1, *, after: Context | None = None) -> NoReturn:
    """Write `message` to stderr and exit: at once or, with `after`, once the other ranks have had time to read the note and to report.

    Without Python's clean-up: after a lost rank it can hang or abort in gloo, NCCL and MPI.
    """
    sys.stderr.write(message)
    sys.stderr.flush()
    sys.stdout.flush()
    if after is not None and after.store is not None:
        # Rank 0 waits longest, because it may host the store.
        time.sleep((3 if after.rank == 0 else 2) * POLL_S)
    os._exit(code)


def die(context: Context, error: BaseException) -> NoReturn:
    """Print `error`'s traceback, each line marked with the rank, tell the others and end with a non-zero code."""
    prefix = f"[{context.where()}] "
    if isinstance(error, KeyboardInterrupt):  # Ctrl-C reaches every rank; one line is enough
        earlier = post_note(context, "interrupted")
        leave("" if earlier == "interrupted" else f"{prefix}interrupted\n", 130, after=context)
    text = "".join(traceback.format_exception(error))
    sys.stderr.write("".join(prefix + line for line in text.splitlines(keepends=True)))
    sys.stderr.flush()
    earlier = post_note(context, f"{context.where()} failed: {type(error).__name__}: {error}")
    leave(f"{prefix}ends because {earlier}\n" if earlier else "", 1, after=context)
