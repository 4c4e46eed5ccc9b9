"""The microbatch that fits: found by halving, without a trace in the run that follows."""

from __future__ import annotations

import copy

import pytest
import torch

from guided_diffusion.training.fitting import fitting_microbatch

from .toys import batches, make, toy_net


class OnlyFew(torch.nn.Module):
    """A network for which more than `limit` examples are too many."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.inner, self.limit = toy_net(), limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x)


def test_halves_until_it_fits_and_leaves_no_trace() -> None:
    trainer, untouched = make(OnlyFew(3)), make(OnlyFew(3))
    batch = next(batches())
    before = copy.deepcopy(trainer.net.state_dict())
    size = len(batch.images)
    found = fitting_microbatch(trainer, batch)
    assert 1 <= found <= 3 and found >= size // 8
    assert all(torch.equal(before[name], value) for name, value in trainer.net.state_dict().items())
    assert all(p.grad is None for p in trainer.params)
    trainer.microbatch = untouched.microbatch = found
    for a, b in zip(trainer.step(batch).values(), untouched.step(batch).values()):
        assert torch.equal(a, b)


def test_nothing_fits() -> None:
    with pytest.raises(ValueError, match="not even one example"):
        fitting_microbatch(make(OnlyFew(0)), next(batches()))
