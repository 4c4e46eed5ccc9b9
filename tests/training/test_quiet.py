"""Between log lines the host never waits for the device: no operation of a step turns a tensor into a Python number."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.runtime.world import World

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_does_not_wait_for_the_gpu(precision):
    trainer = make(precision=precision, microbatch=3, max_grad_norm=1.0, world=World(device=torch.device("cuda")))
    data = batches()
    for _ in range(2):
        trainer.step(next(data))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(next(data))
    finally:
        torch.cuda.set_sync_debug_mode("default")
