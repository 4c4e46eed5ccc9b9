"""The benchmarks measure what they say: both sides compute the same, and a report comes out. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import floor, networks, shapes
from benchmarks.plain_loops import PlainLoops, PlainTrainer
from benchmarks.timing import compare
from guided_diffusion import build
from guided_diffusion.runtime.streams import Streams
from guided_diffusion.runtime.world import World
from guided_diffusion.training.trainer import Trainer

SHAPE = shapes.small(num_channels=32, image_size=16)


def test_plain_losses_are_ours() -> None:
    process = build.build_process(SHAPE.diffusion)
    batch = shapes.training_batch(SHAPE)
    loss = build.generator_loss(SHAPE.config, process, build.build_timesteps("uniform", 1000))
    net = shapes.generator(SHAPE)
    ours = loss(net, batch, Streams(0, 1, ids=batch.positions))
    x0 = build.to_float(batch.images)
    streams = Streams(0, 1, ids=batch.positions)
    streams.uniform()
    noise = streams.normal(x0.shape[1:])
    assert ours.i is not None
    plain = PlainLoops(process).losses(shapes.plainly(net), x0, ours.i, noise, {"y": batch.labels})
    for name in ("loss", "mse", "vb"):
        torch.testing.assert_close(ours.terms[name], plain[name], rtol=2e-5, atol=2e-5)


def test_one_plain_update_is_ours() -> None:
    """Same batch, steps and noise: the weights after one update agree where the gradient is not lost in rounding."""
    process = build.build_process(SHAPE.diffusion)
    batch = shapes.training_batch(SHAPE)
    net = shapes.generator(SHAPE)
    plain = shapes.plainly(net)
    seen: dict[str, Any] = {}
    inner = build.generator_loss(SHAPE.config, process, build.build_timesteps("uniform", 1000))

    def loss(model: Any, part: Any, streams: Streams) -> Any:
        found = inner(model, part, streams)
        again = Streams(0, 1, 0, ids=part.positions)
        again.uniform()
        seen["i"], seen["noise"] = found.i, again.normal((3, 16, 16))
        return found

    trainer = Trainer(net, loss, iter([]), lr=1e-3, ema_rates=(0.9,), world=World())
    trainer.step(batch)
    other = PlainTrainer(plain.net, plain, process, lr=1e-3, ema_rates=(0.9,))
    other.step(build.to_float(batch.images), seen["i"], seen["noise"], {"y": batch.labels})
    gradients = {name: p.grad for name, p in plain.net.named_parameters()}
    for name, p in net.named_parameters():
        wanted = gradients[name]
        assert wanted is not None and p.grad is not None
        torch.testing.assert_close(p.grad, wanted, rtol=1e-3, atol=2e-5 * max(1.0, float(wanted.abs().max())))
    assert other.logged["grad_norm"] > 0


@pytest.mark.parametrize("guided", [False, True])
def test_arithmetic_alone_is_the_same(guided: bool) -> None:
    (row,) = networks.arithmetic(SHAPE, device="cpu", rounds=1, guided=guided, steps=5)
    assert float(row.note.split("by ")[1].split(" ")[0]) < 1e-5


def test_the_plain_twin_has_its_own_weights_in_the_usual_layout() -> None:
    net = networks.ready(shapes.generator(SHAPE))
    plain = shapes.plainly(net)
    weight = plain.net.middle_block[0].in_layers[2].weight  # type: ignore[union-attr,index]
    assert weight.is_contiguous() and weight.requires_grad
    x, t, y = shapes.inputs(SHAPE, 2)
    torch.testing.assert_close(plain(x, t, y), net(x, t, y), rtol=2e-5, atol=2e-5)


def test_counting_operations() -> None:
    a = torch.ones(3, 4)
    assert floor.flops(lambda: a @ a.T) == 2 * 3 * 4 * 3


def test_ratios_are_other_over_ours() -> None:
    counted = {"ours": 0, "other": 0}

    def work(name: str) -> None:
        counted[name] += 1

    row = compare("x", lambda: work("ours"), lambda: work("other"), against="y", rounds=3, warmup=1, inner=2)
    assert counted == {"ours": 7, "other": 7} and row.low <= row.ratio <= row.high


def test_the_command_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = compare("a", lambda: None, lambda: None, against="b", rounds=1)
    monkeypatch.setitem(command.PARTS, "forward", lambda plan: ([row], {"answer": 42.0}))
    assert command.main(["--quick", "--only", "forward", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report["figures"] == {"answer": 42.0} and report["ratios"][0]["name"] == "a"
    assert "| a | b |" in (tmp_path / "benchmarks.md").read_text()
    assert report["machine"]["torch"] == torch.__version__
