"""The choice of blocks that recompute: against all choices there are, and against what no choice can be better than."""

from __future__ import annotations

import itertools
import random

import pytest

from guided_diffusion.training.checkpointing import Block, Line, Moment, Needs, choose


def needs_of(savings: list[float], work: list[float], levels: list[float]) -> Needs:
    blocks = tuple(Block(f"b{k}", Line(0, s), w) for k, (s, w) in enumerate(zip(savings, work)))
    return Needs(blocks, tuple(Moment(k, Line(0, level)) for k, level in enumerate(levels)), operations=sum(work))


def random_needs(seed: int, *, one_limit: bool = False) -> Needs:
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    levels = [draw.randint(0, 30) for _ in range(count + 1)]
    savings = [draw.randint(0, 20) for _ in range(count)]
    return needs_of(savings, [draw.randint(1, 50) for _ in range(count)], sorted(levels) if one_limit else levels)


def work_of(needs: Needs, names: frozenset[str]) -> float:
    return sum(block.work for block in needs.blocks if block.name in names)


def cheapest(needs: Needs, examples: int, room: float) -> float | None:
    """By trying every set of blocks."""
    names = [block.name for block in needs.blocks]
    sets = (frozenset(s) for k in range(len(names) + 1) for s in itertools.combinations(names, k))
    return min((work_of(needs, s) for s in sets if needs.peak(examples, s) <= room), default=None)


def by_parts(needs: Needs, examples: int, room: float) -> tuple[float, list[float]]:
    """(least work, works of the blocks that are cut in two) if a part of a block could recompute: no whole choice costs less."""
    free = [room - level for level in needs.levels(examples)]
    cost, cut = 0.0, []
    order = sorted(range(len(needs.blocks)), key=lambda k: -_ratio(needs, k, examples))
    for k in order:
        block = needs.blocks[k]
        saving = block.saving.at(examples)
        share = 1.0 if saving == 0 else min(1.0, min(free[k + 1 :]) / saving)
        free[k + 1 :] = [left - share * saving for left in free[k + 1 :]]
        cost += (1 - share) * block.work
        if 1e-9 < share < 1 - 1e-9:  # not by rounding
            cut.append(block.work)
    return cost, cut


def _ratio(needs: Needs, k: int, examples: int) -> float:
    saving = needs.blocks[k].saving.at(examples)
    return needs.blocks[k].work / saving if saving else float("inf")


@pytest.mark.parametrize("one_limit", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_never_more_than_the_blocks_that_a_limit_cuts_from_the_best(seed: int, one_limit: bool) -> None:
    needs = random_needs(seed, one_limit=one_limit)
    names = frozenset(block.name for block in needs.blocks)
    least, most = needs.peak(3, names), needs.peak(3)
    for step in range(5):
        room = least + (most - least) * step / 4
        chosen, best = choose(needs, 3, room), cheapest(needs, 3, room)
        assert chosen is not None and best is not None and needs.peak(3, chosen) <= room
        bound, cut = by_parts(needs, 3, room)
        assert bound <= best + 1e-6 and work_of(needs, chosen) <= bound + sum(cut) + 1e-6
        assert len(cut) <= (1 if one_limit else len(needs.blocks))
    assert choose(needs, 3, most) == frozenset()
    assert choose(needs, 3, least - 1) is None


def test_a_block_that_comes_last_weighs_on_one_moment_only() -> None:
    # By hand: an early block is there at both moments, a late one only at the last, where there is room.
    needs = needs_of([10, 10], [1, 1], [0, 25, 5])
    assert choose(needs, 1, 30) == {"b0"}
    assert needs.peak(1, {"b0"}) == 25 and needs.peak(1, {"b1"}) == 35 and needs.peak(1) == 35


def test_fixed_bytes_hidden_bytes_and_gradients_count() -> None:
    block = Block("b", Line(6, 2), 1)
    needs = Needs(
        (block,), (Moment(1, Line(10, 1), gradients=3), Moment(0, Line(9, 1), gradients=8)), Line(1, 1), 8, 5, 4
    )
    assert needs.kept(4) == 1 + 4 + 6 + 8 and needs.kept(4, {"b"}) == 5
    assert needs.peak(4) == 10 + 4 + 5 + 14
    assert needs.peak(4, {"b"}) == 10 + 4 + 5
    assert needs.peak(4, {"b"}, more=True) == 10 + 4 + 5 + (8 - 3)
    assert needs.extra_work({"b"}) == 1 / 12


def test_a_block_that_saves_nothing_is_left_alone() -> None:
    needs = needs_of([0, 5], [1, 1], [1, 1, 1])
    assert choose(needs, 2, 2) == {"b1"}
    assert choose(needs, 2, 12) == frozenset()
