"""Which steps are trained: frequencies, weights that make up for them, and memory that equals a plain ring of losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.diffusion.timesteps import LossSecondMoment, UniformTimesteps

EVEN = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000  # every number in [0, 1) equally often


def warm(num_steps: int = 5, **options) -> LossSecondMoment:
    chooser = LossSecondMoment(num_steps, history=2, **options)
    steps = torch.arange(num_steps).repeat(2)
    chooser.update(steps, steps.float() ** 2 + 0.1)
    return chooser


def test_uniform() -> None:
    i, weight = UniformTimesteps(7).draw(EVEN)
    counts = torch.bincount(i, minlength=7)
    assert counts.max() - counts.min() <= 1 and torch.equal(weight, torch.ones(20000))
    assert UniformTimesteps(7).draw(torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)).i.tolist() == [0, 6]
    assert UniformTimesteps(1000).draw(torch.tensor([1.0])).i.tolist() == [999]


@pytest.mark.parametrize("chooser", [LossSecondMoment(5), warm(), warm(uniform_prob=0.0)])
def test_draws_follow_the_probabilities_and_weights_undo_them(chooser: LossSecondMoment) -> None:
    p = chooser.probabilities()
    i, weight = chooser.draw(EVEN)
    np.testing.assert_allclose(torch.bincount(i, minlength=5) / 20000, p, atol=1e-4)
    value = torch.tensor([3.0, -1.0, 4.0, 1.0, 5.0])
    torch.testing.assert_close((weight * value[i]).mean(), value.mean(), rtol=0, atol=1e-2)
    assert i.dtype == torch.int64 and weight.dtype == torch.float32
    assert chooser.draw(torch.tensor([1.0], dtype=torch.float64)).i.tolist() == [4]


def test_uniform_until_warm() -> None:
    chooser = LossSecondMoment(3, history=2)
    chooser.update(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([9.0, 9.0, 9.0, 1.0, 1.0, 1.0]))
    assert torch.equal(chooser.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64))
    chooser.update(torch.tensor([2]), torch.tensor([1.0]))
    assert chooser.probabilities()[0] > 0.8


some_loss = st.one_of(st.floats(0.01, 10), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
batches = st.lists(st.lists(st.tuples(st.integers(0, 3), some_loss), min_size=1, max_size=12), min_size=1, max_size=6)


@given(batches, st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_memory_holds_the_latest_losses(updates: list, history: int) -> None:
    """Against lists that grow at one end; repeated steps within one batch included, losses that are not finite left out."""
    chooser, lists = LossSecondMoment(4, history), [[] for _ in range(4)]  # type: ignore[var-annotated]
    for batch in updates:
        steps, losses = zip(*batch)
        chooser.update(torch.tensor(steps), torch.tensor(losses, dtype=torch.float64))
        for step, loss in batch:
            lists[step] += [loss] if np.isfinite(loss) else []
    for step, values in enumerate(lists):
        kept = sorted(values[-history:] + [0.0] * (history - len(values)))
        np.testing.assert_allclose(sorted(chooser.losses[step].tolist()), kept)
        assert chooser.seen[step] == len(values)


def test_memory_survives_saving() -> None:
    chooser, other = warm(), LossSecondMoment(5, history=2)
    other.load_state_dict(chooser.state_dict())
    chooser.update(torch.tensor([0]), torch.tensor([50.0]))
    assert not torch.equal(chooser.probabilities(), other.probabilities())
    other.update(torch.tensor([0]), torch.tensor([50.0]))
    assert torch.equal(chooser.probabilities(), other.probabilities())
    with pytest.raises(ValueError, match=r"\(5, 2\).*\(5, 3\)"):
        LossSecondMoment(5, history=3).load_state_dict(chooser.state_dict())
    uniform = UniformTimesteps(5)
    uniform.load_state_dict(uniform.state_dict())


def test_losses_with_gradient_are_remembered_without() -> None:
    chooser = LossSecondMoment(2, history=1)
    chooser.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0], requires_grad=True))
    assert not chooser.losses.requires_grad


def test_options_are_checked() -> None:
    for options in ({"history": 0}, {"uniform_prob": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LossSecondMoment(5, **options)
