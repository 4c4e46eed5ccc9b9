"""Between log lines the host never waits for the device: no operation of a step turns a tensor into a Python number."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.models.unet import UNetModel
from guided_diffusion.runtime.world import World
from guided_diffusion.training.memory import set_recompute

from .test_memory import batch_of, trainer_of
from .toys import batches, make, toy_net


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
    trainer = make(toy_net(dropout=0.1), precision=precision, microbatch=3, max_grad_norm=1.0, ema_rates=(0.9, 0.99))
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
        trainer, data = make(microbatch=3, **options), batches()
    else:  # a real network, with what it recomputes
        model = UNetModel(16, 3, 32, 3, 1, (2,), 0.1, channel_mult=(1, 2), num_head_channels=16)
        set_recompute(model, net)
        trainer, data = trainer_of(model, 8, microbatch=3, **options), itertools.repeat(batch_of(8))
    for _ in range(2):
        trainer.step(next(data))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(next(data))
    finally:
        torch.cuda.set_sync_debug_mode("default")
