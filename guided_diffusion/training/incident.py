"""What to keep when training breaks down: the batch, the step, and where in the network the numbers grew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runtime import storage
from ..runtime.streams import TRAIN, Streams
from . import batching

if TYPE_CHECKING:
    from .trainer import Trainer


class TrainingDiverged(RuntimeError):
    """Losses or gradients were not finite for too many steps in a row. The message names the folder with the evidence."""


@torch.no_grad()
def largest_activations(net: nn.Module, forward: Callable[[], Any]) -> list[dict[str, Any]]:
    """Run `forward` and list, in order of execution, each innermost module's largest finite output and non-finite count."""
    rows: list[dict[str, Any]] = []

    def recorder(name: str, kind: str) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                finite = torch.isfinite(output)
                largest = torch.where(finite, output, 0).abs().max().item() if output.numel() else 0.0
                rows.append({"layer": name, "type": kind, "largest": largest, "non_finite": int((~finite).sum())})

        return record

    leaves = [(name, module) for name, module in net.named_modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(recorder(name, type(module).__name__)) for name, module in leaves]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return rows


def write_incident(directory: str, *, step: int, rank: int, batch: Any, report: dict[str, Any]) -> str:
    """Write `incident_STEP/batch_rank0.pt` and `report_rank0.json`; returns the folder. `batch` is a mapping or NamedTuple."""
    folder = storage.join(directory, f"incident_{step:06d}")
    storage.makedirs(folder)
    fields = batch._asdict() if hasattr(batch, "_asdict") else batch
    with storage.atomic_write(storage.join(folder, f"batch_rank{rank}.pt")) as file:
        torch.save({k: v.cpu() if isinstance(v, Tensor) else v for k, v in dict(fields).items()}, file)
    storage.write_json_atomic(storage.join(folder, f"report_rank{rank}.json"), {"step": step, "rank": rank, **report})
    return folder


def diverged(trainer: Trainer, batch: Any, in_a_row: int) -> TrainingDiverged:
    """The error that ends a run after `in_a_row` bad steps, once the evidence about the last of them is written.

    The forward pass of the last batch's first microbatch is repeated, with the same noise, and every layer is watched.
    """
    last_good = None
    if trainer.checkpoints is not None:
        trainer.checkpoints.wait()  # the good save may be the one that is being written
        last_good = trainer.world.broadcast_object(trainer.checkpoints.last_good, name="naming the last good save")
    what = f"{in_a_row} steps in a row, up to step {trainer.steps_done}, had losses or gradients that are not finite"
    good = f"The last good save is {last_good}" if last_good else "There is no good save yet"
    if trainer.checkpoints is None:
        return TrainingDiverged(f"{what}. {good}")
    step, world = trainer.steps_done - 1, trainer.world
    part = next(batching.split(batch, trainer.microbatch))
    ids = batching.positions(batch, world.rank, world.size)[: batching.length(part)]
    streams = Streams(trainer.seed, TRAIN, step, ids=ids, device=trainer.device)
    losses: dict[str, list[float]] = {}

    def forward() -> None:
        found = trainer.loss_fn(trainer.net, batching.to_device(part, trainer.device), streams)
        losses.update({name: value.float().tolist() for name, value in found.terms.items()}, loss=found.loss.tolist())

    layers = largest_activations(trainer.net, forward)
    report = {"last_good": last_good, "losses": losses, "precision": trainer.precision.state_dict(), "layers": layers}
    try:
        folder = write_incident(trainer.checkpoints.directory, step=step, rank=world.rank, batch=batch, report=report)
    except OSError as error:
        return TrainingDiverged(f"{what}. The evidence could not be written: {error}. {good}")
    return TrainingDiverged(f"{what}. Batch and largest activations by layer are in {folder}. {good}")
