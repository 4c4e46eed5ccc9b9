"""A time by which all must have ended: what would not be done by then is left out, and said to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Task(NamedTuple):
    """One measurement of a part: what it is called, how long it should take, and what gives its rows and figures."""

    name: str
    seconds: float
    call: Callable[[], Any]


class Budget:
    """Seconds from now on. What is expected of a task is corrected by what those before it took, against expectation."""

    def __init__(self, seconds: float = float("inf"), now: Callable[[], float] = time.monotonic) -> None:
        if seconds <= 0:
            raise ValueError(f"a budget of {seconds} s leaves nothing to measure in; give a positive number of seconds")
        self._now, self._end = now, now() + seconds
        self._expected = self._taken = 0.0
        self.left_out: dict[str, str] = {}
        """Why each task that was not run was not."""

    def left(self) -> float:
        """Seconds that remain; negative when they are over."""
        return self._end - self._now()

    def slowness(self) -> float:
        """How many times longer than expected tasks took so far, at least half."""
        return max(0.5, self._taken / self._expected) if self._expected else 1.0

    def run(self, task: Task) -> Any:
        """The task's result, or None where it is left out because it would end too late."""
        expected, left = task.seconds * self.slowness(), self.left()
        if left <= 0 or expected > left:
            self.left_out[task.name] = f"{expected:.0f} s expected, {max(0.0, left):.0f} s left"
            return None
        begin = self._now()
        try:
            return task.call()
        finally:
            if task.seconds:
                self._expected += task.seconds
                self._taken += self._now() - begin
