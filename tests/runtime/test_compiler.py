"""When compiling pays, and what happens where it fails: a warning, and the same numbers without it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guided_diffusion.runtime import compiler
from guided_diffusion.runtime.compiler import SAMPLING, TRAINING, Price, pays


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Scaled(nn.Module):
    """A network of one weight; with `broken` nothing can follow it."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.weight, self.broken = nn.Parameter(torch.tensor(3.0)), broken

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            torch._dynamo.graph_break()
        return self.weight * x.square()


def trial(net: nn.Module) -> None:
    torch.autograd.grad(net(torch.ones(2)).sum(), list(net.parameters()))


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    """Messages of this package; torch has many of its own."""
    records = (record for record in caplog.records if record.name.startswith("guided_diffusion"))
    return [record.getMessage() for record in records if record.levelno >= level]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without the information that a command, which an earlier test ran in this process, lets through."""
    return said(caplog, logging.WARNING)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and run as they are."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize(
    ("seconds", "price", "expected"),
    [
        (1199, SAMPLING, False),  # a fifth of twenty minutes is three times 80 s
        (1200, SAMPLING, True),
        (3600, TRAINING, False),
        (3640, TRAINING, True),
        (float("inf"), TRAINING, True),
        (0, SAMPLING, False),
        (30, Price(1, 0.1), True),
    ],
)
def test_what_saves_three_times_its_cost_pays(seconds: float, price: Price, expected: bool) -> None:
    assert pays(seconds, price) is expected


def test_the_announcement_says_how_long(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        compiler.announce(7200, SAMPLING)
        compiler.announce(float("inf"), TRAINING)
    first, endless = said(caplog)
    assert all(word in first for word in ("120 minutes", "80 s", "24 minutes"))
    assert "without end" in endless and "19%" in endless


def test_compiled_code_outlives_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "x")  # so that what is set below goes at the end
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path))
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with caplog.at_level(logging.INFO):
        compiler.begin()
        assert cache_dir() == str(tmp_path / "compiled") and said(caplog)[0].endswith(cache_dir())
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
        compiler.begin()
        assert cache_dir() == str(tmp_path / "own") and said(caplog)[1].endswith(cache_dir())


@pytest.mark.usefixtures("eager")
def test_a_network_that_compiles_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    net = Scaled()
    names = list(net.state_dict())
    assert compiler.compile_or_leave([net], partial(trial, net)) and not warned(caplog)
    assert net._compiled_call_impl is not None and list(net.state_dict()) == names
    assert net(torch.tensor([2.0])).tolist() == [12.0]


@pytest.mark.usefixtures("eager")
def test_a_network_that_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    nets = [Scaled(), Scaled(broken=True)]
    assert not compiler.compile_or_leave(nets, lambda: [trial(net) for net in nets])
    assert len(warned(caplog)) == 1 and "Scaled cannot be compiled" in warned(caplog)[0]
    assert nets[1](torch.tensor([2.0])).tolist() == [12.0] and len(warned(caplog)) == 1


def fails_backward(kind: type[Exception]) -> Any:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise kind("no code for this")

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop

    return aot_autograd(fw_compiler=nop, bw_compiler=refuse)


@pytest.mark.parametrize("kind", [AssertionError, torch.OutOfMemoryError])
def test_a_backward_pass_that_cannot_be_compiled_is_told_once(
    kind: type[Exception], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails_backward(kind)))
    nets = [Scaled(), Scaled()]
    assert not compiler.compile_or_leave(nets, lambda: [trial(net) for net in nets])
    assert len(warned(caplog)) == 1 and "no code for this" in warned(caplog)[0]
    assert all(net._compiled_call_impl is None for net in nets)
    trial(nets[0])


@pytest.mark.usefixtures("eager")
def test_an_error_of_the_network_itself_is_raised_by_it() -> None:
    net = Scaled()
    assert not compiler.compile_or_leave([net], lambda: net("no tensor"))
    with pytest.raises(AttributeError, match="square"):
        net("no tensor")


@pytest.mark.usefixtures("eager")
def test_shapes_beyond_those_that_are_kept_run_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    net = Scaled()
    compiler.compile_network(net)
    for size in range(1, 3 + torch._dynamo.config.recompile_limit):
        assert net(torch.full((size,), 2.0)).tolist() == [12.0] * size
    assert net._compiled_call_impl is not None and not warned(caplog)


@pytest.mark.usefixtures("eager")
def test_inside_a_network_runs_uncompiled_and_after_as_before() -> None:
    net = Scaled()
    for compiled in (None, "compiled"):
        if compiled:
            compiler.compile_network(net)
        before = net._compiled_call_impl
        with pytest.raises(KeyError), compiler.uncompiled(net):
            assert net._compiled_call_impl is None and net(torch.tensor([2.0])).tolist() == [12.0]
            raise KeyError
        assert net._compiled_call_impl is before and (before is None) == (compiled is None)
