"""A run whose network is compiled in the middle, at the start, or not at all: the same numbers, and never an end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from guided_diffusion.diffusion.samplers import NotFinite
from guided_diffusion.runtime import compiler
from guided_diffusion.runtime.world import World
from guided_diffusion.training import compiling
from guided_diffusion.training.callbacks import SampleGrid
from guided_diffusion.training.compiling import CompileWhenItPays, compile_training

from .toys import ToyNet, batches, make, toy_net, weights_of


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


class Clock:
    """A second per step; the first one takes longer."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def perf_counter(self) -> float:
        return 1000.0 + self.trainer.steps_done


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("guided_diffusion")]


@pytest.mark.parametrize(
    ("last", "every", "begins"),
    [(3600, 10, None), (3660, 10, 20), (0, 10, 20), (4000, 1, 11), (3660, 25, None), (3700, 25, 50)],
)
def test_it_is_decided_once_from_the_steps_that_are_left(
    last: int, every: int, begins: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3632 steps of a second each save three times 230 s, at 19 %."""
    begun: list[int] = []
    clock = Clock()
    monkeypatch.setattr(compiling, "time", clock)
    monkeypatch.setattr(compiling, "compile_training", lambda trainer, batch: begun.append(trainer.steps_done))
    clock.trainer = make(callbacks=[(every, CompileWhenItPays(last))])
    clock.trainer.run(60)
    assert begun == ([] if begins is None else [begins])


@pytest.mark.parametrize("microbatch", [0, 4])
def test_a_run_goes_on_with_the_same_numbers(
    microbatch: int, counter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    monkeypatch.setattr(compiling, "time", clock)
    plain = make(microbatch=microbatch)
    trainer = clock.trainer = make(microbatch=microbatch, callbacks=[(1, CompileWhenItPays(0))])
    with caplog.at_level("INFO"):
        trainer.run(14)
    plain.run(14)
    assert counter.frame_count == 1 and [text for text in said(caplog) if "compiling, " in text]
    for a, b in zip(weights_of(trainer), weights_of(plain)):
        torch.testing.assert_close(a, b)


def test_the_first_step_after_compiling_is_the_one_it_would_have_been(counter: Any) -> None:
    """The pass that tries the compiler leaves gradients, moments and counters alone."""
    trainer, plain = make(net=toy_net(0.5)), make(net=toy_net(0.5))
    compile_training(trainer, next(batches()))
    assert counter.frame_count == 1 and all(p.grad is None for p in trainer.params) and trainer.steps_done == 0
    compiler.undo(trainer.net)
    trainer.run(2)
    plain.run(2)
    assert all(map(torch.equal, weights_of(trainer), weights_of(plain)))


def test_a_compiler_that_fails_does_not_end_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no code for this")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuse))
    trainer, plain = make(), make()
    compile_training(trainer, next(batches()))
    trainer.run(2)
    plain.run(2)
    assert all(map(torch.equal, weights_of(trainer), weights_of(plain)))
    warned = [text for text in said(caplog) if "failed" in text or "cannot" in text]
    assert len(warned) == 1 and "no code for this" in warned[0]


def test_processes_that_compiled_follow_one_that_could_not(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "any_true", lambda self, flag, name="": True)
    trainer = make()
    compile_training(trainer, next(batches()))
    assert trainer.net._compiled_call_impl is None


def test_norms_that_are_recomputed_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recomputing(ToyNet):
        recompute_norms = True

    clock = Clock()
    monkeypatch.setattr(compiling, "time", clock)
    monkeypatch.setattr(compiling, "compile_training", None)
    clock.trainer = make(net=Recomputing(), callbacks=[(1, CompileWhenItPays(0))])
    clock.trainer.run(20)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_goes_on_compiled() -> None:
    """By the compiler that users get."""
    trainers = [make(world=World(device=torch.device("cuda"))) for _ in range(2)]
    compile_training(trainers[0], next(batches()))
    assert trainers[0].net._compiled_call_impl is not None
    for trainer in trainers:
        trainer.run(3)
    for a, b in zip(*map(weights_of, trainers)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_pictures_are_drawn_uncompiled_and_training_goes_on_compiled(counter: Any, tmp_path: Path) -> None:
    """Else each picture's shape would be compiled, and a failure there would leave one process alone uncompiled."""
    drawn: list[bool] = []

    def draw(net: Any, path: str) -> None:
        drawn.append(net._compiled_call_impl is None)
        raise NotFinite(0, "no picture")

    trainer = make(callbacks=[(1, SampleGrid(draw, str(tmp_path)))])
    compile_training(trainer, next(batches()))
    compiled = trainer.net._compiled_call_impl
    trainer.run(2)
    assert drawn == [True, True] and compiled is not None and trainer.net._compiled_call_impl is compiled
    assert counter.frame_count == 1
