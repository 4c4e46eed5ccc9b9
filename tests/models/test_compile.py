"""torch.compile sees each network as one graph: forward, training, and a classifier's gradient at its input."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from guided_pair import generator, small, training_batch
from small_networks import classifier, images, times, unet
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from guided_diffusion import build
from guided_diffusion.runtime.compiler import compile_network
from guided_diffusion.runtime.world import World
from guided_diffusion.training.losses import diffusion_loss
from guided_diffusion.training.trainer import Trainer

SMALLEST = {"channel_mult": (1,), "attention_resolutions": (), "num_res_blocks": 1}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(made: list[str]) -> CompileCounterWithBackend:
    """A backend that runs graphs as they are and notes which were made, forward and backward."""

    def note(what: str, graph: Any, inputs: Any) -> Any:
        made.append(what)
        run = graph.forward

        def boxed(args: list[Any]) -> Any:
            given = list(args)
            args.clear()
            return run(*given)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    halves = {f"{half}_compiler": partial(note, name) for half, name in (("fw", "forward"), ("bw", "backward"))}
    return CompileCounterWithBackend(aot_autograd(**halves))  # type: ignore[arg-type]


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_unet_trains_as_one_graph(use_checkpoint: bool) -> None:
    net = unet(**SMALLEST, use_checkpoint=use_checkpoint, num_classes=3)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")  # fullgraph raises at the first graph break
    x, t, y = images(), times(), torch.tensor([0, 2])
    out = compiled(x, t, y)
    torch.testing.assert_close(out, net(x, t, y))
    out.pow(2).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_input_gradient_of_a_frozen_classifier_in_bfloat16() -> None:
    net = classifier(channel_mult=(1,)).requires_grad_(False)
    net.set_compute_dtype(torch.bfloat16)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = images().requires_grad_()
    (found,) = torch.autograd.grad(compiled(x, times())[:, 0].sum(), x)
    (expected,) = torch.autograd.grad(net(x, times())[:, 0].sum(), x)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifier_has_one_graph_each_way_for_all_batches(dtype: torch.dtype) -> None:
    """Compiled by itself, as the guided step does where it cannot be one graph."""
    net, made = classifier().requires_grad_(False), list[str]()
    net.set_compute_dtype(dtype)
    counter = counting(made)
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=counter)
    for k in range(3):
        x, y = images(seed=k).requires_grad_(), torch.tensor([k, 9 - k])[:, None]
        (found,) = torch.autograd.grad(compiled(x, times() + k).gather(1, y).sum(), x)
        (expected,) = torch.autograd.grad(net(x, times() + k).gather(1, y).sum(), x)
        assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 0.05) * expected.norm()
    assert (counter.frame_count, made) == (1, ["forward", "backward"])


def test_a_compiled_run_trains_with_one_graph_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some updates by the trainer, with `--compile` and without: the same losses, however batches, labels and steps differ."""
    made: list[str] = []
    counter = counting(made)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    shape = small(num_channels=32, image_size=16)
    shape = replace(shape, model=replace(shape.model, channel_mult="1", attention_resolutions=""))
    process = build.build_process(shape.diffusion)
    batch, losses = training_batch(shape), []
    for compiled in (False, True):
        net = generator(shape)
        loss = diffusion_loss(
            process, build.build_timesteps("uniform", len(process)), **build.loss_options(shape.config)
        )
        trainer = Trainer(net, loss, iter([]), lr=1e-3, ema_rates=(0.9,), world=World())
        if compiled:
            compile_network(net)
        for k in range(3):
            part = batch._replace(labels=(batch.labels + k) % 10, images=batch.images.roll(k, 0))
            losses.append(trainer.step(part)["loss"])
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-4, atol=0)
    assert len({float(loss) for loss in losses[:3]}) == 3
    assert (counter.frame_count, made) == (1, ["forward", "backward"])
