"""What is measured on one and two examples against what more examples really take, counted in other ways."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from guided_diffusion.models.unet import EncoderUNetModel, UNetModel
from guided_diffusion.runtime.streams import Streams
from guided_diffusion.training.checkpointing import Needs
from guided_diffusion.training.losses import Losses
from guided_diffusion.training.measuring import blocks_of, measured, set_recomputing
from guided_diffusion.training.trainer import Trainer


class Batch(NamedTuple):
    images: Tensor
    positions: Tensor


def batch_of(size: int, side: int = 16) -> Batch:
    return Batch(torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(2)), torch.arange(size))


def loss_fn(net: Any, batch: Batch, streams: Streams) -> Losses:
    time = streams.uniform() * 1000
    error = net(batch.images + streams.randn_like(batch.images), time).float()
    loss = error.pow(2).flatten(1).mean(1)
    return Losses(loss, {"loss": loss})


def unet(dropout: float = 0.0) -> UNetModel:
    torch.manual_seed(0)
    net = UNetModel(16, 3, 32, 6, 1, (2,), dropout, channel_mult=(1, 2), num_head_channels=16,
                    use_scale_shift_norm=True, resblock_updown=True)  # fmt: skip
    return _stirred(net)


def classifier() -> EncoderUNetModel:
    torch.manual_seed(0)
    net = EncoderUNetModel(16, 3, 32, 10, 2, (2,), channel_mult=(1, 2), num_head_channels=16, pool="attention")
    return _stirred(net)


def _stirred(net: Any) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():  # a fresh network ends in zeros: half of its gradients would be zero
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return net


def trainer_of(net: nn.Module, size: int, **options: Any) -> Trainer:
    return Trainer(net, loss_fn, iter([]), lr=1e-3, ema_rates=(0.9,), batch_size=size, **options)


def really_kept(trainer: Trainer, batch: Batch) -> int:
    """Every storage that autograd keeps in a forward pass, once; parameters left out."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    trainer.net.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = loss_fn(trainer.net, batch, Streams(0, 0, 0, ids=batch.positions, device=torch.device("cpu")))
    for parameter in trainer.params:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert losses.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def really_taken(trainer: Trainer, batch: Batch, passes: int = 1) -> int:
    """The most bytes that the last of some passes held at a time, by torch's own record of allocations."""
    size = len(batch.images)
    for _ in range(passes - 1):
        trainer.forward_backward(batch, batch.positions, size, last=False)
    before = sum(p.grad.nbytes for p in trainer.params if p.grad is not None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.forward_backward(batch, batch.positions, size, last=False)
    trainer.optimizer.zero_grad(set_to_none=True)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest + before


NETWORKS = pytest.mark.parametrize("make", [unet, classifier])
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def some_subsets(net: nn.Module) -> list[set[str]]:
    names, draw = list(blocks_of(net)), random.Random(1)
    return [set(), set(names), set(draw.sample(names, len(names) // 2)), set(names[: len(names) // 2])]


def needs_of(make: Any, precision: str, size: int) -> tuple[Needs, Trainer, Batch]:
    trainer, batch = trainer_of(make(), size, precision=precision), batch_of(size)
    return measured(trainer, batch), trainer, batch


@NETWORKS
@PRECISIONS
def test_kept_bytes_of_many_examples(make: Any, precision: str) -> None:
    needs, trainer, batch = needs_of(make, precision, 7)
    assert needs.kept(7) == pytest.approx(really_kept(trainer, batch), rel=0.05)
    assert sum(block.saving.at(7) for block in needs.blocks) > 0.5 * needs.kept(7)


def largest_convolution(trainer: Any, batch: Any) -> int:
    """Bytes of what one convolution takes, gives and multiplies by, in float32: the most of all."""
    sizes: list[int] = []

    def note(conv: Any, given: Any, answer: Any) -> None:
        sizes.append(4 * (given[0].numel() + answer.numel() + conv.weight.numel()))

    handles = [m.register_forward_hook(note) for m in trainer.net.modules() if isinstance(m, torch.nn.Conv2d)]
    trainer.forward_backward(batch, batch.positions, len(batch.images), last=False)
    for handle in handles:
        handle.remove()
    trainer.optimizer.zero_grad(set_to_none=True)
    return max(sizes)


@NETWORKS
@PRECISIONS
def test_highest_level_of_many_examples_whichever_blocks_recompute(make: Any, precision: str) -> None:
    needs, trainer, batch = needs_of(make, precision, 9)
    trainer.net.train()
    # Without instructions for bfloat16 a processor may convolve through copies in float32, which torch's record of allocations
    # counts and no tensor shows: at the highest level those of one convolution at most.
    copies = largest_convolution(trainer, batch) if precision == "bf16" else 0
    for names in some_subsets(trainer.net):
        set_recomputing(trainer.net, names)
        for passes in (1, 2):
            foreseen = needs.peak(9, names, more=passes == 2) - needs.hidden
            taken = really_taken(trainer, batch, passes)
            assert 0.9 * taken - copies <= foreseen <= 1.1 * taken, (sorted(names), passes)


def test_work_is_that_of_what_is_computed_again() -> None:
    """torch's counter over a whole pass, with and without recomputation."""
    from torch.utils.flop_counter import FlopCounterMode

    needs, trainer, batch = needs_of(unet, "fp32", 3)
    counted = []
    names = {name for name, block in blocks_of(trainer.net).items() if "Res" in type(block).__name__}
    for recompute in (set(), names):
        set_recomputing(trainer.net, recompute)
        with FlopCounterMode(display=False) as counter:
            trainer.forward_backward(batch, batch.positions, 3, last=False)
        counted.append(counter.get_total_flops())
    expected = 3 * sum(block.work for block in needs.blocks if block.name in names)
    assert expected == pytest.approx(counted[1] - counted[0], rel=0.01) and expected > 0


def test_leaves_no_trace() -> None:
    trainer, untouched = trainer_of(unet(0.3), 4), trainer_of(unet(0.3), 4)
    names = set(list(blocks_of(trainer.net))[::2])
    set_recomputing(trainer.net, names)
    measured(trainer, batch_of(4))
    assert {name for name, block in blocks_of(trainer.net).items() if block.use_checkpoint} == names
    assert all(p.grad is None for p in trainer.params)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.net.modules())
    set_recomputing(trainer.net, ())
    for a, b in zip(trainer.step(batch_of(4)).values(), untouched.step(batch_of(4)).values()):
        assert torch.equal(a, b)


@PRECISIONS
def test_training_is_the_same_whichever_blocks_recompute(precision: str) -> None:
    """Dropout draws the same in the second computation."""
    plain: list[Tensor] | None = None
    for names in some_subsets(unet()):
        trainer = trainer_of(unet(dropout=0.3), 4, precision=precision, microbatch=3)
        set_recomputing(trainer.net, names)
        for _ in range(2):
            trainer.step(batch_of(4))
        weights = [p.detach() for p in trainer.params]
        if plain is None:
            plain = weights
        assert all(torch.equal(a, b) for a, b in zip(weights, plain)), sorted(names)


def test_a_compiled_network_trains_as_chosen() -> None:
    torch.compiler.reset()
    net = UNetModel(8, 3, 32, 3, 1, (), channel_mult=(1,))
    trainer, other = (
        trainer_of(_stirred(net), 2),
        trainer_of(_stirred(UNetModel(8, 3, 32, 3, 1, (), channel_mult=(1,))), 2),
    )
    other.net.load_state_dict(net.state_dict())
    set_recomputing(net, list(blocks_of(net))[::2])
    net.compile(fullgraph=True, dynamic=False, backend="aot_eager")  # fullgraph raises at the first graph break
    batch = batch_of(2, 8)
    for each in (trainer, other):
        each.forward_backward(batch, batch.positions, 2, last=True)
    for a, b in zip(trainer.params, other.params):
        torch.testing.assert_close(a.grad, b.grad)
