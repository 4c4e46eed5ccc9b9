"""Between log lines the host never waits for the device: no operation of a step turns a tensor into a Python number."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.diffusion.timesteps import LossSecondMoment
from guided_diffusion.models.unet import UNetModel
from guided_diffusion.runtime.world import World
from guided_diffusion.training.memory import set_recompute

from .test_memory import batch_of, trainer_of
from .toys import T, batches, make, toy_net


class Listening(TorchDispatchMode):
    """Notes the operations that read a value, or whose result has a size that only the device knows."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_reads_nothing(precision):
    options = {"microbatch": 3, "max_grad_norm": 1.0, "ema_rates": (0.9, 0.99), "schedule_sampler": LossSecondMoment(T)}
    trainer = make(toy_net(dropout=0.1), precision=precision, **options)
    data = batches()
    trainer.step(next(data))  # the optimizer makes its state in the first
    with Listening() as listening:
        trainer.step(next(data))
    assert listening.reads == []
    with Listening() as listening:
        trainer.net.first.weight.sum().item()
    assert listening.reads


@pytest.mark.gpu
@pytest.mark.parametrize("net", [None, "none", "norms", "all"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_does_not_wait_for_the_gpu(precision, net):
    options = {"precision": precision, "max_grad_norm": 1.0, "world": World(device=torch.device("cuda"))}
    if net is None:
        trainer, data = make(microbatch=3, schedule_sampler=LossSecondMoment(T), **options), batches()
    else:  # a real network, with what it recomputes
        model = UNetModel(16, 3, 32, 3, 1, (2,), 0.1, channel_mult=(1, 2), num_head_channels=16)
        set_recompute(model, net)
        trainer, data = trainer_of(model, 8, microbatch=3, **options), itertools.repeat(batch_of(8))
    data = map(pinned, data)
    for _ in range(2):
        trainer.step(next(data))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(next(data))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        trainer.step(next(data))
    assert profile.events() and not [event.name for event in profile.events() if "Pageable" in event.name]


def pinned(batch):
    """As the loader gives it beside a GPU."""
    return batch._replace(images=batch.images.pin_memory(), positions=batch.positions.pin_memory())
