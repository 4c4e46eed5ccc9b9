"""The pretended GPU refuses what a real one refuses, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hasattr(torch.cuda, "pretended"), reason="about the pretended GPU"),
]


def there(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


MIXED: dict[str, Callable[[], Any]] = {
    "sum": lambda: there(2, 3) + torch.randn(2, 3),
    "product": lambda: there(2, 3) @ torch.randn(3, 2),
    "embedding": lambda: F.embedding(torch.tensor([1, 2]), there(4, 3)),
    "selection": lambda: there(4, 3).index_select(0, torch.tensor([1, 2])),
    "assignment": lambda: there(4, 3).index_put_((torch.tensor([1], device="cuda"),), torch.randn(1, 3)),
    "list": lambda: torch.cat([there(2), torch.randn(2)]),
}
WAITING: dict[str, Callable[[], Any]] = {
    "reading": lambda: there(1).item(),
    "truth": lambda: bool(there(1) > 0),
    "to the host": lambda: there(2).cpu(),
    "to the device": lambda: torch.randn(2).cuda(),
    "an index on the host": lambda: there(4)[torch.tensor([1, 2])],
    "unknown size": lambda: there(4)[there(4) > 0],
    "unknown repetitions": lambda: torch.repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda")),
}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(name: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[name]()


@pytest.mark.parametrize("name", WAITING)
def test_waiting_is_noticed(name: str, request: pytest.FixtureRequest) -> None:
    WAITING[name]()
    request.getfixturevalue("no_waiting")
    with pytest.raises(RuntimeError, match="synchronizing"):
        WAITING[name]()


def test_what_does_not_wait_is_let_through(no_waiting: None) -> None:
    host = torch.randn(3).pin_memory()
    x = host.to("cuda", non_blocking=True)
    y = torch.where(x > 0, x * 2.0 + torch.tensor(1.0), x)  # a number on the host is an argument of the operation
    y[1:].add_(1)
    y.to("cpu", non_blocking=True)


def test_memory_ends() -> None:
    there(1)
    before, whole = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((before + 4096) / whole)
    try:
        kept = there(512)
        with pytest.raises(torch.OutOfMemoryError):
            there(1024)
        del kept
        there(1024)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() == before


def test_a_graph_reads_and_writes_the_memory_it_was_recorded_on() -> None:
    x, other = torch.ones(3, device="cuda"), torch.full((3,), 7.0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2 + 1
    x.copy_(other)
    graph.replay()
    assert y.tolist() == [15.0] * 3
    x = other * 0  # another tensor: the graph does not see it
    graph.replay()
    assert y.tolist() == [15.0] * 3


def test_numbers_and_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 1)
    )
    x, found = torch.randn(2, 3, 6, 6), []
    for device in ("cpu", "cuda"):
        net.to(device).zero_grad()
        y = net(x.to(device))
        y.square().mean().backward()
        found.append([y.detach().cpu(), *(p.grad.cpu().clone() for p in net.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
