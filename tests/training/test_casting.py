"""A training step casts its weights once; on a GPU they are stored as convolutions read them. Neither changes the numbers."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

from guided_diffusion.runtime.world import World
from guided_diffusion.training import precision, trainer
from guided_diffusion.training.memory import copied_bytes, set_recompute

from .test_memory import batch_of, trainer_of, unet
from .toys import assert_same_state


def at_each_use(net: Any) -> Any:
    return contextlib.nullcontext()


@pytest.mark.parametrize(("numbers", "recompute"), [("bf16", "none"), ("bf16", "all"), ("fp16", "none")])
def test_training_is_that_of_casting_at_each_use(numbers: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With microbatches, averages drawn from between steps, weights edited there, a clip, and a resume."""
    once = precision.weights_cast_once
    sides: list[Any] = []
    for cast in (at_each_use, once):
        monkeypatch.setattr(trainer, "weights_cast_once", cast)
        ours = trainer_of(unet(dropout=0.1), 4, precision=numbers, microbatch=3, max_grad_norm=0.1)
        set_recompute(ours.net, recompute)
        drawn = []
        for step in range(3):
            ours.step(batch_of(4))
            with ours.ema.swapped_in("0.9"), torch.no_grad():
                drawn.append(ours.net(batch_of(2).images, torch.ones(2)))
            if step == 1:
                for parameter in ours.params:
                    parameter.data.mul_(1.01)
        again = trainer_of(unet(), 4, precision=numbers, microbatch=3, max_grad_norm=0.1)
        again.load_state_dict(ours.state_dict())
        for each in (ours, again):
            each.step(batch_of(4))
        sides.append({"drawn": drawn, "whole": ours.state_dict(), "resumed": again.state_dict()})
    assert_same_state(*sides)


@pytest.mark.parametrize(("numbers", "bytes_each"), [("fp32", 0), ("bf16", 2), ("fp16", 2)])
def test_memory_of_the_copies_is_counted(numbers: str, bytes_each: int) -> None:
    ours = trainer_of(unet(), 1, precision=numbers)
    for _ in range(2):
        ours.step(batch_of(1))
    copies = [copy for cast in ours.net._copies._casts.values() for copy in cast.copies]
    counted = copied_bytes(ours.net, numbers)
    assert counted == bytes_each * sum(p.numel() for p in ours.params)
    assert 0.6 * counted <= sum(copy.nbytes for copy in copies) <= counted  # small networks have much time embedding


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", ["fp32", "bf16"])
def test_on_a_gpu_no_weight_is_turned(numbers: str) -> None:
    """Weights, gradients, moments and averages have one layout; the second step copies weights in a few kernels."""
    ours = trainer_of(unet(), 4, precision=numbers, world=World(device=torch.device("cuda")))
    data = itertools.repeat(batch_of(4))
    for _ in range(2):
        ours.step(next(data))
    for parameter, average in zip(ours.params, ours.ema.copies["0.9"]):
        moments = [ours.optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
        for other in (parameter.grad, average, *moments):
            assert other.stride() == parameter.stride() or 1 in parameter.shape
    assert not ours.net.input_blocks[0][0].weight.is_contiguous()
    saved = trainer_of(unet(), 4, precision=numbers, world=World(device=torch.device("cuda")))
    saved.load_state_dict({**ours.state_dict(), "optimizer": contiguous(ours.optimizer.state_dict())})
    before = flat(ours)
    for each in (ours, saved):
        each.step(next(data))
    # Adam turns the smallest gradients, in which a GPU's rounding shows, into whole steps: no bound for each weight.
    change, other = flat(ours) - before, flat(saved) - before
    assert float((change - other).norm() / change.norm()) < 0.1


def flat(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.params])


def contiguous(state: Any) -> Any:
    """The state as a file has it."""
    moments = {
        k: {name: value.clone(memory_format=torch.contiguous_format) for name, value in entry.items()}
        for k, entry in state["state"].items()
    }
    return {**state, "state": moments}
