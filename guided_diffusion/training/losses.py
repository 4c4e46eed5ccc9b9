"""Losses as the trainer receives them, the objectives of denoisers and classifiers, and means for the log."""

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
from ..runtime.world import World

QUARTILES = 4  # of the noise steps, by which losses are logged


class Losses(NamedTuple):
    """One microbatch of losses. All tensors are `[B]`, on the device, one entry per example."""

    loss: Tensor
    """To be differentiated; includes the importance weight."""
    terms: dict[str, Tensor]
    """To be logged, by column name: "loss", "mse", "vb", "train_acc@1", ... """
    i: Tensor | None = None
    """Step position of each example in `[0, num_steps)`; None if the objective has no time."""
    num_steps: int = 1
    raw: Tensor | None = None
    """Losses without importance weight, from which a schedule sampler learns; None: it learns from `loss`."""


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
    class_dropout: float = 0.0,
    null_label: int = 0,
) -> LossFn:
    """The loss of a denoising network on a batch; `process` on the training device.

    The network is given `batch.labels` if `class_cond`, and `batch.low_res` where there is one. With the probability `class_dropout`
    an image has `null_label` instead (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1).
    """

    def of_batch(net: Any, batch: Any, streams: Streams) -> Losses:
        x0 = batch.images
        i, importance = timesteps.draw(streams.uniform().to(x0.device))
        noise = streams.normal(x0.shape[1:])
        cond: dict[str, Tensor] = {"y": batch.labels} if class_cond else {}
        if class_dropout:  # drawn last: steps and noise stay those of a run without it
            cond["y"] = torch.where(streams.uniform().to(x0.device) < class_dropout, null_label, batch.labels)
        if getattr(batch, "low_res", None) is not None:
            cond["low_res"] = batch.low_res
        terms = training_losses(
            net, process, x0, i, noise, cond, loss=loss, predicts=predicts, variance=variance, weight=weight
        )
        weighted = {name: value * importance for name, value in terms.items()}
        return Losses(weighted["loss"], weighted, i, len(process), terms["loss"].detach())

    return of_batch


def classifier_loss(process: Process, timesteps: Timesteps, *, noised: bool = True, prefix: str = "train") -> LossFn:
    """Cross entropy and accuracies (columns of 2021) of a classifier on noised images, or on clean ones at step 0."""

    def loss(net: Any, batch: Any, streams: Streams) -> Losses:
        x = batch.images
        i, _ = timesteps.draw(streams.uniform().to(x.device))  # importance weights are not used, as in 2021
        if noised:
            x = add_noise(process, x, i, streams.normal(x.shape[1:]))
        else:
            i = torch.zeros_like(i)
        logits = net(x, process.time_at(i)).float()
        cross_entropy = F.cross_entropy(logits, batch.labels, reduction="none")
        hits = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]  # best class first
        terms = {
            f"{prefix}_loss": cross_entropy,
            f"{prefix}_acc@1": hits[:, 0].float(),
            f"{prefix}_acc@5": hits.any(dim=1).float(),
        }
        return Losses(cross_entropy, terms, i, len(process))

    return loss


class Interval:
    """Sums of every loss term, in total and by quartile of time, and of the gradient norms, from one log row to the next.

    Quartile `q` holds the examples with `floor(4 i / num_steps) = q`, the 2021 columns `loss_q0` (little noise) to
    `loss_q3` (almost only noise). Non-finite values belong to skipped steps and are left out.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, Tensor] = {}  # by term: (sum, count) x (quartiles, then losses without a step)
        self._steps = torch.zeros(3, device=self._device)  # steps, sum of gradient norms, skipped steps

    @torch.no_grad()
    def add(self, losses: Losses) -> None:
        """Add one microbatch, without waiting for the device."""
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

    def count_step(self, grad_norm: Tensor, skipped: Tensor) -> None:
        """Add one step; both arguments are scalars on the device."""
        norm = torch.where(skipped, 0.0, grad_norm)
        self._steps += torch.stack([torch.ones_like(norm), norm, skipped.float()])

    def read(self, world: World, unreadable: float = 0.0) -> dict[str, float]:
        """Means over all ranks by column name; then all sums are reset. A collective, with one copy to the host.

        Quartiles without an example have no column. `unreadable`: images that this rank could not read so far.
        """
        # One tensor for one all-reduce. float32 is exact for counts up to 16 million.
        unread = torch.tensor([float(unreadable)], device=self._device)
        parts = [*(sums.flatten() for sums in self._sums.values()), self._steps, unread]
        flat = world.all_reduce_sum_(torch.cat(parts), name="log line").cpu()
        steps, norms, skipped, unreadable = flat[-4:].tolist()
        row: dict[str, float] = {}
        for name, (total, count) in zip(self._sums, flat[:-4].view(-1, 2, QUARTILES + 1).tolist()):
            if sum(count) > 0:
                row[name] = sum(total) / sum(count)
            row.update({f"{name}_q{q}": total[q] / count[q] for q in range(QUARTILES) if count[q] > 0})
        if steps > skipped:
            row["grad_norm"] = norms / (steps - skipped)
        if skipped:
            row["skipped_steps"] = skipped / world.size  # all ranks skip the same steps
        if unreadable:
            row["unreadable_images"] = unreadable
        for sums in (*self._sums.values(), self._steps):
            sums.zero_()
        return row
