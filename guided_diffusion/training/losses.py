"""What a training objective hands to the trainer, and the running means that the log shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import low_res, to_float
from ..diffusion.denoiser import Predicts, Variance
from ..diffusion.objectives import Loss, training_losses
from ..diffusion.process import Process, add_noise
from ..diffusion.timesteps import Timesteps
from ..runtime.streams import Streams

QUARTILES = 4


class Losses(NamedTuple):
    """One microbatch of losses. All tensors are `[B]`, on the device, one entry per example."""

    loss: Tensor
    """What is differentiated, importance weight included."""
    terms: dict[str, Tensor]
    """What is logged, by column name: "loss", "mse", "vb", "acc@1", ... """
    i: Tensor | None = None
    """Step position of each example in `[0, num_steps)`; None if the objective has no time."""
    num_steps: int = 1
    raw: Tensor | None = None
    """Losses without importance weight, for a loss-aware choice of steps; None means `loss`."""


LossFn = Callable[[Any, Any, Streams], Losses]


class Feedback(Protocol):
    """Something that learns from the losses which steps to train on, and that is part of a checkpoint."""

    def update(self, i: Tensor, losses: Tensor) -> None:
        """Take in the whole global batch in order of position: steps and raw losses, both `[B_global]`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result."""


class LossMeans:
    """Sums of every term, in total and by quartile of time, kept on the device until a log line reads them.

    Quartile `q` holds the examples with `floor(4 i / num_steps) = q`, the 2021 columns `loss_q0` (little noise) to
    `loss_q3` (almost only noise). Non-finite values belong to skipped steps and are left out.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, losses: Losses) -> None:
        """Take in one microbatch; nothing leaves the device."""
        for name, values in losses.terms.items():
            values = values.detach().to(torch.float32).reshape(-1)
            finite = torch.isfinite(values)
            row = torch.stack([torch.where(finite, values, 0.0), finite.to(torch.float32)])
            sums = self._sums.get(name)
            if sums is None:
                sums = self._sums[name] = torch.zeros(2, QUARTILES + 1, device=self._device)
            if losses.i is None:
                sums[:, QUARTILES] += row.sum(dim=1)
            else:
                quartile = (losses.i * QUARTILES / losses.num_steps).long().clamp(0, QUARTILES - 1)
                sums.index_add_(1, quartile, row)

    def tensor(self) -> Tensor:
        """All sums as one tensor `[terms, 2, 5]`, so that one collective and one copy to the host are enough."""
        if not self._sums:
            return torch.zeros(0, 2, QUARTILES + 1, device=self._device)
        return torch.stack(list(self._sums.values()))

    def means(self, sums: Tensor) -> dict[str, float]:
        """Means by column name from `tensor()`'s result on the host; quartiles without an example have no column."""
        out: dict[str, float] = {}
        for name, (total, count) in zip(self._sums, sums.tolist()):
            if sum(count) > 0:
                out[name] = sum(total) / sum(count)
            out.update({f"{name}_q{q}": total[q] / count[q] for q in range(QUARTILES) if count[q] > 0})
        return out

    def clear(self) -> None:
        """Start the next interval."""
        for sums in self._sums.values():
            sums.zero_()


def diffusion_loss(
    process: Process,
    timesteps: Timesteps,
    *,
    predicts: Predicts,
    variance: Variance,
    loss: Loss = "mse",
    min_snr_gamma: float = 0.0,
    class_cond: bool = False,
    small_size: int = 0,
) -> LossFn:
    """The loss of a denoising network on a batch; `process` on the training device.

    `small_size`: the side of the smaller image that an upsampler is given too; 0 = none.
    """
    weight: dict[str, Any] = {"weight": "min_snr", "min_snr_gamma": min_snr_gamma} if min_snr_gamma else {}

    def of_batch(net: Any, batch: Any, streams: Streams) -> Losses:
        x0 = to_float(batch.images, getattr(batch, "flips", None))
        i, importance = timesteps.draw(streams.uniform().to(x0.device))
        noise = streams.normal(x0.shape[1:])
        cond: dict[str, Tensor] = {"y": batch.labels} if class_cond else {}
        if small_size:
            cond["low_res"] = low_res(x0, small_size)
        terms = training_losses(
            net, process, x0, i, noise, cond, loss=loss, predicts=predicts, variance=variance, **weight
        )
        weighted = {name: value * importance for name, value in terms.items()}
        return Losses(weighted["loss"], weighted, i, len(process), terms["loss"].detach())

    return of_batch


def classifier_loss(process: Process, timesteps: Timesteps, *, noised: bool = True, prefix: str = "train") -> LossFn:
    """Cross entropy of a classifier on noised images, with accuracies, under the column names of 2021."""

    def loss(net: Any, batch: Any, streams: Streams) -> Losses:
        x = to_float(batch.images, getattr(batch, "flips", None))
        i, _ = timesteps.draw(streams.uniform().to(x.device))
        if noised:
            x = add_noise(process, x, i, streams.normal(x.shape[1:]))
        else:
            i = torch.zeros_like(i)
        logits = net(x, process.time_at(i)).float()
        entropy = F.cross_entropy(logits, batch.labels, reduction="none")
        ranked = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        terms = {
            f"{prefix}_loss": entropy,
            f"{prefix}_acc@1": ranked[:, 0].float(),
            f"{prefix}_acc@5": ranked.any(dim=1).float(),
        }
        return Losses(entropy, terms, i, len(process))

    return loss
