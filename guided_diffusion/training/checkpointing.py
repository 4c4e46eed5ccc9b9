"""Which blocks of a network recompute in backward, so that training fits into memory at the least extra work.

Legend: a pass goes through the blocks forward and then backward in reverse order. At any moment of it, the blocks that
are over in forward and not yet reached in backward hold what they keep; everything else that is alive then does not
depend on which blocks recompute: a block at work needs its activations, kept or recomputed. So memory at a moment is a
measured number plus the sum of what the blocks before it keep, and the choice is a knapsack with one limit per moment.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """Bytes as a straight line over the number of examples in a pass."""

    fixed: float
    each: float

    def at(self, examples: int) -> float:
        return max(0.0, self.fixed + self.each * examples)


@dataclass(frozen=True)
class Block:
    """One block that can recompute."""

    name: str
    saving: Line
    """Bytes that it does not keep if it recomputes: its own activations without its input, which stays."""
    work: float
    """What recomputing costs, per example, in any unit (here: floating point operations)."""


@dataclass(frozen=True)
class Moment:
    """A moment of a pass in which every block recomputes."""

    before: int
    """How many blocks, in forward order, are over in forward and not yet reached in backward."""
    alive: Line
    """Bytes alive that the pass took for itself."""
    gradients: float = 0.0
    """Of them, bytes of weights' gradients from earlier in this pass (those of an earlier one are not in `alive`)."""


@dataclass(frozen=True)
class Needs:
    """What a forward and backward pass needs, as measured. `blocks` in forward order."""

    blocks: tuple[Block, ...]
    moments: tuple[Moment, ...]
    kept_anyway: Line = Line(0, 0)
    """Bytes kept for backward whichever blocks recompute: their inputs, and what is outside of them."""
    gradients: float = 0.0
    """Bytes of the gradients of all weights."""
    hidden: float = 0.0
    """Bytes that the device takes besides tensors: scratch space of operations, gaps between allocations."""
    operations: float = 0.0
    """Of a whole forward pass, per example; in the unit of `Block.work`."""

    def kept(self, examples: int, recompute: Collection[str] = ()) -> float:
        """Bytes kept for backward at the end of a forward pass."""
        own = [block.saving.at(examples) for block in self.blocks if block.name not in recompute]
        return self.kept_anyway.at(examples) + sum(own)

    def peak(self, examples: int, recompute: Collection[str] = (), *, more: bool = False) -> float:
        """The most bytes that a pass takes. `more`: it is not the first one, so all gradients are there already."""
        before = [0.0]
        for block in self.blocks:
            before.append(before[-1] + (0.0 if block.name in recompute else block.saving.at(examples)))
        return max((m + before[k] for k, m in enumerate(self.levels(examples, more=more))), default=0.0)

    def levels(self, examples: int, *, more: bool = False) -> list[float]:
        """The most bytes taken with 0, 1, 2 ... blocks before, in a pass in which every block recomputes."""
        highest = [self.hidden] * (len(self.blocks) + 1)
        for moment in self.moments:
            extra = self.gradients - moment.gradients if more else 0.0
            level = moment.alive.at(examples) + extra + self.hidden
            highest[moment.before] = max(highest[moment.before], level)
        return highest

    def extra_work(self, recompute: Collection[str]) -> float:
        """Part of a step's work that recomputing adds; a backward pass is twice the work of a forward pass."""
        again = sum(block.work for block in self.blocks if block.name in recompute)
        return again / (3 * self.operations) if self.operations else 0.0


def choose(needs: Needs, examples: int, room: float, *, more: bool = False) -> frozenset[str] | None:
    """The blocks that recompute so that a pass over `examples` stays within `room` bytes; None if it does not even if all do.

    Greedy: the block with the most work per byte is the first to keep its activations, and each that still finds room
    follows. With one limit that is within one block's work of the best choice. With a limit per moment it is within one
    block for each limit that is reached: limits on the first 1, 2, ... blocks are nested, for which taking parts of blocks
    in this order is the exact optimum, and whole blocks differ from it only where a limit cuts one in two: in a UNet in
    one to three places, the start of the backward pass first of all.
    """
    levels = needs.levels(examples, more=more)
    if max(levels, default=0.0) > room:
        return None
    savings = [block.saving.at(examples) for block in needs.blocks]
    recompute = {block.name for block in needs.blocks}
    free = [room - level for level in levels]  # by the number of blocks before
    for k in sorted(range(len(savings)), key=lambda k: (-_ratio(needs.blocks[k].work, savings[k]), k)):
        if savings[k] <= min(free[k + 1 :]):
            recompute.discard(needs.blocks[k].name)
            free[k + 1 :] = [left - savings[k] for left in free[k + 1 :]]
    return frozenset(recompute)


def _ratio(work: float, saving: float) -> float:
    return work / saving if saving > 0 else float("inf")
