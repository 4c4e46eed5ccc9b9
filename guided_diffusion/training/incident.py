"""Evidence that is written when training diverges: the batch, the step, and the largest activation of every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..runtime import storage
from .losses import Losses
from .saver import Checkpoints


class TrainingDiverged(RuntimeError):
    """Losses or gradients were not finite for too many steps in a row. The message names the folder with the evidence."""


@torch.no_grad()
def largest_activations(net: nn.Module, forward: Callable[[], Any]) -> list[dict[str, Any]]:
    """Run `forward` and list, in order of execution, each innermost module's largest finite output and non-finite count."""
    rows: list[dict[str, Any]] = []

    def record(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            finite = torch.isfinite(output)
            largest = torch.where(finite, output, 0).abs().max().item() if output.numel() else 0.0
            row = {"layer": name, "type": type(module).__name__, "largest": largest}
            rows.append({**row, "non_finite": int((~finite).sum())})

    leaves = [(name, module) for name, module in net.named_modules() if not any(True for _ in module.children())]
    handles = [
        module.register_forward_hook(lambda module, _inputs, output, name=name: record(name, module, output))
        for name, module in leaves
    ]
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


def raise_diverged(
    what: str,
    *,
    saves: Checkpoints | None,
    net: nn.Module,
    losses_again: Callable[[], Losses],
    step: int,
    batch: Any,
    precision: dict[str, Any],
) -> NoReturn:
    """Write the evidence beside the saves and raise `TrainingDiverged`. All ranks call it; each writes its report.

    `losses_again` repeats the forward pass of the last step, while hooks record the output of every layer of `net`.
    """
    if saves is None:
        raise TrainingDiverged(f"{what}. There is no good save yet")
    saves.wait()  # the good save may be the one that is being written
    last_good = saves.world.broadcast_object(saves.last_good, name="naming the last good save")
    good = f"The last good save is {last_good}" if last_good else "There is no good save yet"
    losses: dict[str, list[float]] = {}

    def forward() -> None:
        again = losses_again()
        losses.update({name: value.float().tolist() for name, value in again.terms.items()}, loss=again.loss.tolist())

    layers = largest_activations(net, forward)
    report = {"last_good": last_good, "losses": losses, "precision": precision, "layers": layers}
    try:
        folder = write_incident(saves.directory, step=step, rank=saves.world.rank, batch=batch, report=report)
    except OSError as error:
        raise TrainingDiverged(f"{what}. The evidence could not be written: {error}. {good}") from None
    raise TrainingDiverged(f"{what}. Batch and largest activations by layer are in {folder}. {good}")
