"""The learning rate as a pure function of the number of updates done, so that nothing about it needs saving."""

from __future__ import annotations


def learning_rate(step: int, base: float, *, anneal_steps: int = 0, warmup_steps: int = 0) -> float:
    """The rate for the update that follows `step` completed ones.

    Linear decay from `base` at step 0 to 0 at `anneal_steps` (0 = none), times a linear warm-up that reaches 1 at the
    `warmup_steps`-th update (0 = none). Past `anneal_steps` the rate stays 0.
    """
    if step < 0:
        raise ValueError(f"step is {step}; it counts completed updates and starts at 0")
    rate = base
    if anneal_steps > 0:
        rate *= max(0.0, 1.0 - step / anneal_steps)
    if warmup_steps > 0:
        rate *= min(1.0, (step + 1) / warmup_steps)
    return rate


def stop_step(*limits: int | None) -> int | None:
    """The smallest positive limit in updates, or None (train without end) when every limit is 0 or None."""
    given = [limit for limit in limits if limit]
    if any(limit < 0 for limit in given):
        raise ValueError(f"a limit on the number of steps is negative: {given}; use 0 for no limit")
    return min(given, default=None)
