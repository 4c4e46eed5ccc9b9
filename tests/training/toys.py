"""Small networks, data and objectives that exercise the trainer without any other room than runtime."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from guided_diffusion.runtime.streams import Streams
from guided_diffusion.training.losses import Losses
from guided_diffusion.training.trainer import Trainer

T = 100


class ToyBatch(NamedTuple):
    images: Tensor
    positions: Tensor
    step: int


class ToyNet(nn.Module):
    """A two-layer perceptron that can be told its compute format, with a buffer and, if asked, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(16, 6)
        self.register_buffer("calls", torch.zeros(3))
        self.dtype = torch.float32

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight.to(self.dtype)
        h = nn.functional.linear(x.to(self.dtype), weight, self.first.bias.to(self.dtype))
        return self.last(self.drop(torch.tanh(h)).float())


class Counter:
    """A schedule sampler that remembers everything it is given."""

    def __init__(self) -> None:
        self.sums = torch.zeros(T, dtype=torch.float64)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, i: Tensor, losses: Tensor) -> None:
        self.sums.index_add_(0, i, losses.double())
        self.seen.append((i.clone(), losses.clone()))

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums = state["sums"].clone()


def toy_net(dropout: float = 0.0) -> ToyNet:
    torch.manual_seed(3)
    return ToyNet(dropout)


def batches(start: int = 0, *, size: int = 8, rank: int = 0, world: int = 1) -> Iterator[ToyBatch]:
    """Endless; the example at (step, position) is a function of both."""
    step = start
    while True:
        whole = torch.randn(size, 6, generator=torch.Generator().manual_seed(step))
        positions = torch.arange(rank, size, world)
        yield ToyBatch(whole[positions], positions, step)
        step += 1


def denoising(net: nn.Module, batch: ToyBatch, streams: Streams) -> Losses:
    """Like a diffusion objective: draws time and noise from the streams."""
    i = (streams.uniform() * T).long()
    noise = streams.randn_like(batch.images)
    level = (i.float() / T)[:, None]
    error = ((net(batch.images * (1 - level) + noise * level) - noise) ** 2).mean(1)
    return Losses(error, {"loss": error, "mse": error}, i, T)


def make(net: nn.Module | None = None, **options: object) -> Trainer:
    options = {"lr": 1e-2, "ema_rates": (0.9,), "batch_size": 8, **options}
    return Trainer(toy_net() if net is None else net, denoising, options.pop("batches", batches), **options)


def weights_of(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.net.parameters()]


def assert_same_state(a: dict, b: dict, path: str = "state") -> None:
    """Bit for bit."""
    assert type(a) is type(b) or isinstance(a, dict) == isinstance(b, dict), path
    if isinstance(a, dict):
        assert set(map(str, a)) == set(map(str, b)), path
        for key in a:
            assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, Tensor):
        assert torch.equal(a.cpu(), b.cpu()), path
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{path}[{k}]")
    else:
        assert a == b, f"{path}: {a} != {b}"
