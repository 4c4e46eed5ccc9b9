"""How much fits into a device's memory, found out by trying before the work begins, never in the middle of it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

Attempt = Callable[[int], object]


def fits(attempt: Attempt, size: int) -> bool:
    """Whether `attempt(size)` ends without running out of the device's memory; what it left there is given back."""
    try:
        attempt(size)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def largest_that_fits(attempt: Attempt, limit: int) -> int:
    """The largest power of two up to `limit`, or `limit` itself, for which `attempt` fits; 0 if not even 1 does."""
    found, size = 0, 1
    while found < limit and fits(attempt, size):
        found, size = size, min(2 * size, limit)
    return found
