"""What a training objective hands to the trainer, and the objectives of denoisers and classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.denoiser import Predicts, Variance
from ..diffusion.objectives import Loss, Weight, training_losses
from ..diffusion.process import Process, add_noise
from ..diffusion.timesteps import Timesteps
from ..runtime.streams import Streams


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
"""`loss_fn(net, batch, streams)`: per-example losses of a batch on the device, its images finished (`data.loader.Batch.to_device`)."""


def diffusion_loss(
    process: Process,
    timesteps: Timesteps,
    *,
    predicts: Predicts,
    variance: Variance,
    loss: Loss = "mse",
    weight: Weight | None = None,
    class_cond: bool = False,
) -> LossFn:
    """The loss of a denoising network on a batch; `process` on the training device.

    The network is given `batch.labels` if `class_cond`, and `batch.low_res` where there is one.
    """

    def of_batch(net: Any, batch: Any, streams: Streams) -> Losses:
        x0 = batch.images
        i, importance = timesteps.draw(streams.uniform().to(x0.device))
        noise = streams.normal(x0.shape[1:])
        cond: dict[str, Tensor] = {"y": batch.labels} if class_cond else {}
        if getattr(batch, "low_res", None) is not None:
            cond["low_res"] = batch.low_res
        terms = training_losses(
            net, process, x0, i, noise, cond, loss=loss, predicts=predicts, variance=variance, weight=weight
        )
        weighted = {name: value * importance for name, value in terms.items()}
        return Losses(weighted["loss"], weighted, i, len(process), terms["loss"].detach())

    return of_batch


def classifier_loss(process: Process, timesteps: Timesteps, *, noised: bool = True, prefix: str = "train") -> LossFn:
    """Cross entropy of a classifier on noised images, with accuracies, under the column names of 2021."""

    def loss(net: Any, batch: Any, streams: Streams) -> Losses:
        x = batch.images
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
