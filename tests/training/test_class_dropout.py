"""Class dropout: which images lose their class, and that the null label learns what the classes' mean is."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from guided_diffusion.diffusion.process import make_process
from guided_diffusion.diffusion.schedules import named_betas
from guided_diffusion.diffusion.timesteps import UniformTimesteps
from guided_diffusion.runtime.streams import TRAIN, Streams
from guided_diffusion.training.losses import diffusion_loss
from guided_diffusion.training.trainer import Trainer

PROCESS = make_process(named_betas("linear", 100))
MEANS = torch.tensor([-0.6, 0.0, 0.9])
NULL = len(MEANS)


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    positions: Tensor


def batch_of(count: int, step: int = 0) -> Batch:
    """A third of the images is of each class, and an image of a class is the class's mean."""
    labels = (torch.arange(count) + step) % NULL
    return Batch(MEANS[labels].view(-1, 1, 1, 1).clone(), labels, torch.arange(count))


class Table(nn.Module):
    """Predicts x0 from the label alone, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(NULL + 1))
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        self.given.append((x, time, y))
        return self.rows[y].view(-1, 1, 1, 1)


def loss_of(dropout: float) -> Any:
    options: dict[str, Any] = {"predicts": "x0", "variance": "fixed_small", "class_cond": True}
    return diffusion_loss(PROCESS, UniformTimesteps(100), class_dropout=dropout, null_label=NULL, **options)


def given(dropout: float, rows: slice = slice(None), count: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    net, batch = Table(), batch_of(count)
    part = Batch(*(value[rows] for value in batch))
    loss_of(dropout)(net, part, Streams(0, TRAIN, 4, ids=part.positions))
    return net.given[0]


def test_so_many_images_lose_their_class_and_nothing_else() -> None:
    (x, time, y), (x_plain, time_plain, y_plain) = given(0.1), given(0.0)
    assert torch.equal(x, x_plain) and torch.equal(time, time_plain)
    dropped = y == NULL
    assert torch.equal(y[~dropped], y_plain[~dropped])
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=3 * (0.1 * 0.9 / 3000) ** 0.5)
    assert torch.equal(
        given(0.3)[2] == NULL, (given(0.3)[2] == NULL) | dropped
    )  # those of a lower probability are among them


def test_which_ones_is_of_the_image_not_of_the_batch() -> None:
    whole = given(0.5, count=12)[2]
    assert torch.equal(torch.cat([given(0.5, slice(0, 5), 12)[2], given(0.5, slice(5, 12), 12)[2]]), whole)


def test_the_null_label_learns_the_mean_over_classes() -> None:
    """Of all functions of the label, the class's mean and the mean of all have the least squared error."""
    net = Table()
    trainer = Trainer(net, loss_of(0.5), (batch_of(24, step) for step in range(10**6)), lr=0.05, ema_rates=())
    trainer.run(until=100)
    expected = torch.cat([MEANS, MEANS.mean().view(1)])
    torch.testing.assert_close(net.rows.detach(), expected, atol=0.03, rtol=0)
