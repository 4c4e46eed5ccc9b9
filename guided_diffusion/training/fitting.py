"""How many examples one forward and backward pass takes, and which blocks recompute in it: found before the first step."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch

from ..runtime import memory
from ..runtime.fitting import fits, halved_until_it_fits
from . import batching
from .checkpointing import Needs, choose
from .measuring import blocks_of, measured, pass_alone, set_recomputing, set_recomputing_norms, twins

if TYPE_CHECKING:
    from .trainer import Trainer

GB = 2**30
_SHARE_OF_FREE = 0.95  # of a device's free memory; the rest is for what allocators round up
_SURELY = 0.7  # of the limit: below it, what is foreseen is right without a trial
_STEADY = 0.97  # of the limit: main memory differs by some percent from step to step

_NOT_EVEN_ONE = (
    "not even one example at a time fits into this device's memory; --checkpoint all (or --use_checkpoint True) and "
    "--precision bf16 need less of it"
)


def fitting_microbatch(trainer: Trainer, batch: Any) -> int:
    """The largest of the whole `batch`, half, a quarter ... of it that trains without running out of memory, on all processes.

    Each attempt is a forward and a backward pass with room kept for the optimizer's moments; weights, averages and what is
    logged stay as they are. Raises ValueError where not even one example fits.
    """
    found = halved_until_it_fits(lambda count: _try(trainer, batch, count), batching.length(batch))
    found = int(trainer.world.all_gather_cat(torch.tensor([found], device=trainer.device), name="microbatch").min())
    if not found:
        raise ValueError(_NOT_EVEN_ONE)
    return found


def fit_checkpointing(
    trainer: Trainer, batch: Any, *, limit_gb: float = 0.0, shrink: bool = False, norms: bool = True
) -> str:
    """Let as few blocks recompute in backward as memory allows, all processes the same ones; returns what was done, in a line.

    Where not everything can be kept, first all blocks recompute their norms, which costs next to nothing; where that is not
    enough, some recompute as a whole. Without `norms` there is only the latter, as for a network that will be compiled.

    `limit_gb`: GB (2^30 bytes) that this process may use: on a GPU its tensors, on the CPU the whole process; 0 = what
    is free. Real passes prove the choice, and more blocks follow where they take too much. `shrink`: where it does not
    fit even if all blocks recompute, take half the microbatch, a quarter ... (sets `trainer.microbatch`). Weights and what
    is logged stay as they are. Call it before the network is compiled. ValueError where nothing fits.
    """
    search = _Search(trainer, batch, limit_gb, norms)
    size = min(trainer.microbatch or search.whole, search.whole)
    found = halved_until_it_fits(search.attempt, size) if shrink else size * fits(search.attempt, size)
    if not found:
        raise ValueError(search.complaint(1 if shrink else size))
    if found < size:
        trainer.microbatch = found
    return search.told(found)


class _Search:
    """The choice of blocks for a number of examples, proven by real passes."""

    def __init__(self, trainer: Trainer, batch: Any, limit_gb: float, norms: bool) -> None:
        device = trainer.device
        self.trainer, self.batch, self.limit_gb = trainer, batch, limit_gb
        self.whole = batching.length(batch)
        self.blocks = frozenset(blocks_of(trainer.net))
        if not self.blocks:
            raise ValueError(
                f"--checkpoint auto: {type(trainer.net).__name__} has no blocks that can recompute (modules with use_checkpoint)"
            )
        self.chosen: frozenset[str] = frozenset()
        self.beyond = 0.0  # bytes by which the real passes took more than was foreseen
        self.may_use_norms, self.norms = norms, False  # whether norms may be recomputed, and are
        set_recomputing_norms(trainer.net, False)
        self._measure()
        if device.type == "cpu" and self._bytes(self.whole, self.chosen) > _SURELY * self.limit:
            memory.give_back_at_once(device)
            self._measure()
        self.keeping = self.needs  # of passes in which nothing is recomputed

    def _measure(self) -> None:
        """Find what a pass needs and what there is, the same on all processes."""
        trainer, world, device = self.trainer, self.trainer.world, self.trainer.device
        found: Needs | None = None
        with contextlib.suppress(torch.OutOfMemoryError):
            found = measured(trainer, self.batch)
        if world.any_true(found is None, name="measured?") or found is None:
            raise ValueError(_NOT_EVEN_ONE)
        self.needs: Needs = world.broadcast_object(found, name="needs of a pass")
        memory.give_back(device)
        used = memory.used(device)
        share = _SHARE_OF_FREE / (world.local_size if device.type == "cpu" else 1)
        limit = self.limit_gb * GB or used + memory.free(device) * share
        used += _to_come(trainer)
        steady = _STEADY if device.type == "cpu" else 1.0
        rows = world.all_gather_object((limit * steady - used, limit, used), name="free memory")
        self.room, self.limit, self.used = min(rows)
        # A GPU says itself when there is no more, unless less was allowed.
        self.allowed = self.room + self.used if device.type == "cpu" or self.limit_gb else math.inf

    def attempt(self, count: int) -> None:
        """Choose for `count` examples; raises OutOfMemoryError, on all processes, where no choice fits."""
        room, on_cpu = self.room, self.trainer.device.type == "cpu"
        self.beyond = 0.0
        while True:
            chosen = choose(self.needs, count, room, more=count < self.whole)
            if chosen != frozenset() and self._turn_to_norms():
                room = self.room
                continue
            self.chosen = self.blocks if chosen is None else chosen
            set_recomputing(self.trainer.net, self.chosen)
            # Main memory that runs out ends the process without a word, so there nothing is tried that cannot fit or surely does.
            if on_cpu and self._bytes(count, self.chosen) - self.needs.hidden > self.allowed:
                raise torch.OutOfMemoryError("more than there is")
            if on_cpu and self._bytes(count, self.chosen) < _SURELY * self.limit:
                self.beyond = 0.0  # what an earlier choice took too much says nothing of this one
                return
            peak = self._tried(count)
            self.beyond = peak - self._bytes(count, self.chosen)
            if peak < math.inf and peak <= self.allowed:
                return
            if self.chosen == self.blocks:
                raise torch.OutOfMemoryError("all blocks recompute")
            foreseen = min(room, self._peak(count, self.chosen))
            room = foreseen - (peak - self.allowed) if peak < math.inf else 0.95 * foreseen

    def _turn_to_norms(self) -> bool:
        """Recompute norms from now on, and measure anew. False where that is so already, or cannot be."""
        if self.norms or not self.may_use_norms or not set_recomputing_norms(self.trainer.net, True):
            return False
        self.norms, self.beyond = True, 0.0
        self._measure()
        return True

    def _tried(self, count: int) -> float:
        """The most bytes in use in real passes, of all processes; infinity where one of them ran out of memory."""
        peaks = [math.inf]

        def attempt(count: int) -> None:
            peaks[:] = [_try(self.trainer, self.batch, count)]

        fits(attempt, count)
        memory.give_back(self.trainer.device)
        extra = _to_come(self.trainer) - _moments(self.trainer)
        return max(self.trainer.world.all_gather_object(peaks[0] + extra, name="does it fit?"))

    def _bytes(self, count: int, recompute: frozenset[str]) -> float:
        return self.used + self._peak(count, recompute)

    def _peak(self, count: int, recompute: frozenset[str], needs: Needs | None = None) -> float:
        return (needs or self.needs).peak(count, recompute, more=count < self.whole)

    def told(self, count: int) -> str:
        """What was chosen, in a line."""
        size = "" if count == self.whole else f"; {count} images per forward and backward pass"
        now = (self._bytes(count, self.chosen) + self.beyond) / GB
        if not self.chosen and not self.norms:
            return f"--checkpoint auto: no block has to recompute; {now:.2f} GB of {self.limit / GB:.2f} GB{size}"
        without = now + (self._peak(count, frozenset(), self.keeping) - self._peak(count, self.chosen)) / GB
        what = ["the norms of all blocks"] * self.norms
        what += [f"{len(self.chosen)} of {len(self.blocks)} blocks" + " as a whole" * self.norms] * bool(self.chosen)
        return (
            f"--checkpoint auto: {' and '.join(what)} recompute; {now:.2f} GB instead of {without:.2f} GB, "
            f"of {self.limit / GB:.2f} GB; {self.needs.extra_work(self.chosen):.0%} more work{size}"
        )

    def complaint(self, count: int) -> str:
        """What is missing, and what helps."""
        remedy = "give a smaller --batch_size, --microbatch auto (finds how many fit) or --precision bf16"
        if count == 1 or self.used >= self.limit:  # fewer images at a time would not help
            remedy = "take --precision bf16, --shard_optimizer True on several processes, or fewer --num_channels"
        ran_out = self.beyond == math.inf
        need = self._bytes(count, self.blocks) + (0.0 if ran_out else max(0.0, self.beyond))
        there = f"{self.limit / GB:.2f} GB"
        if ran_out:
            there += " (a real pass ran out of them)"
        elif self.allowed < self.limit:
            there += f", of which {1 - _STEADY:.0%} stay free"
        return (
            f"--checkpoint auto: even if all {len(self.blocks)} blocks recompute, {count} image{'s' * (count > 1)} at a time need "
            f"{need / GB:.2f} GB, {self.used / GB:.2f} GB of it whatever their number, and there are {there}; "
            f"{'raise --memory_limit_gb, or ' if self.limit_gb else ''}{remedy}"
        )


def _try(trainer: Trainer, batch: Any, count: int) -> int:
    """Two times what a step does in passes over `count` examples; returns the most bytes in use.

    Gradients of earlier passes are there if the batch takes several.
    """
    trainer.net.train()
    memory.restart_peak(trainer.device)
    # Filled, so that main memory is really taken.
    moments = torch.zeros(_moments(trainer), dtype=torch.uint8, device=trainer.device).fill_(1)
    with twins(trainer.net) as weights:
        for _ in range(2):
            for _ in range(2 if count < batching.length(batch) else 1):
                pass_alone(trainer, batch, count)
            for weight in weights:
                weight.grad = None
    del moments
    return memory.peak(trainer.device)


def _moments(trainer: Trainer) -> int:
    """Bytes of the optimizer's moments, where it has not made them yet: two numbers per weight."""
    inner: Any = getattr(trainer.optimizer, "optim", trainer.optimizer)
    sharers = trainer.world.size if inner is not trainer.optimizer else 1
    return 0 if inner.state else -(-2 * sum(p.nbytes for p in trainer.params) // sharers)


def _to_come(trainer: Trainer) -> int:
    """Bytes that training will take besides those of its passes: moments, and on the CPU the copy that a save is written from."""
    moments = _moments(trainer)
    if trainer.device.type != "cpu" or trainer.checkpoints is None:
        return moments
    averages = sum(copy.nbytes for copies in trainer.ema.copies.values() for copy in copies)
    weights = sum(p.nbytes for p in trainer.params)
    return moments + 3 * weights + averages
