"""Memory of a training step: recompute of activations, bytes kept for the backward pass, the microbatch that fits."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..runtime.devices import available_memory, give_back, return_freed_memory, used_memory
from . import batching
from .parallel import unwrapped

if TYPE_CHECKING:
    from .trainer import Trainer

_GIB = 2**30
_USABLE = 0.9  # share of the free memory that a step may plan with
# Temporary memory on a CPU (kernel workspaces, gradients of activations), as a share of the activations kept when nothing
# is recomputed. With it, computed bytes were 0.86 to 1.05 of a process's peak, on three networks with each kind of recompute.
_TEMPORARY = 0.75
_CHOSEN = {"none": "nothing is recomputed", "norms": "norms are recomputed", "all": "whole blocks are recomputed"}
_log = logging.getLogger(__name__)


def can_recompute(net: nn.Module) -> tuple[str, ...]:
    """The values of `set_recompute` that a network supports, the fastest first."""
    inner = unwrapped(net)
    blocks = any(hasattr(module, "use_checkpoint") for module in inner.modules())
    return ("none", *["norms"] * hasattr(inner, "set_recompute_norms"), *["all"] * blocks)


def set_recompute(net: nn.Module, what: str) -> None:
    """Choose what backward recomputes: "none", "norms" (norms and what follows them) or "all" (whole blocks).

    Blocks are modules with an attribute `use_checkpoint`; "norms" needs a method `set_recompute_norms`. ValueError if
    the network does not support `what`.
    """
    inner: Any = unwrapped(net)
    if what not in can_recompute(net):
        raise ValueError(f"--recompute {what}: {type(inner).__name__} supports {' or '.join(can_recompute(net))} only")
    for module in inner.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = what == "all"
    if hasattr(inner, "set_recompute_norms"):
        inner.set_recompute_norms(what == "norms")


class StepPlan(NamedTuple):
    """How to run forward and backward: what is recomputed ("none", "norms", "all"), and the images per pass."""

    recompute: str
    images: int


def attempts(ways: Sequence[str], images: int, *, shrink: bool) -> list[StepPlan]:
    """Plans to try, in order: all `images` with each recompute of `ways`; if `shrink`, 1/2, 1/4, ... with the last."""
    sizes = [images]
    while shrink and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return [StepPlan(way, images) for way in ways[:-1]] + [StepPlan(ways[-1], size) for size in sizes]


def choose(
    plans: Sequence[StepPlan],
    need: Callable[[StepPlan], float],
    room: float,
    trial: Callable[[StepPlan], bool] | None = None,
) -> StepPlan | None:
    """The first of `plans` whose computed `need` is at most `room` (both in bytes); None if there is none.

    With `trial` (whether a real step fits; computed bytes lack the device's workspaces) that plan is tried, or the last one
    where none fits by computation. After a failure a second is tried, the next that needs at most 3/4 of the first. If that
    fails too, the next that needs at most half of the second is taken untried: each trial costs as much as a step. Where no plan
    needs so little, it is the last; None if that one failed.
    """
    last = len(plans) - 1
    k = next((k for k, plan in enumerate(plans) if need(plan) <= room), None)
    if trial is None or not plans:
        return None if k is None else plans[k]
    k = last if k is None else k
    for share in (0.75, 0.5):
        if trial(plans[k]):
            return plans[k]
        if k == last:
            return None
        most = share * need(plans[k])
        k = next((j for j in range(k + 1, last) if need(plans[j]) <= most), last)
    return plans[k]


def fit(
    trainer: Trainer, batch: Any, *, recompute: bool, shrink: bool, norms: bool = True, limit_gb: float = 0.0
) -> None:
    """Set recompute and microbatch to the first of the `attempts` whose step on `batch` fits into memory, as `choose` finds it.

    With `recompute` these recompute nothing, then norms (if `norms`), then whole blocks; with `shrink`, then smaller
    microbatches follow. What a step needs is computed. On a GPU at most two real forward and backward passes beside the
    optimizer's moments correct that; on a CPU none do, as the system kills a process that uses too much. All ranks choose the
    same; weights and gradients stay. `limit_gb`: GiB that this process may use; 0 = what is free. Call before compiling.
    ValueError if nothing fits.
    """
    net, device, world, whole = trainer.net, trainer.device, trainer.world, batching.length(batch)
    # "" leaves the network's recompute as it is.
    ways = [way for way in can_recompute(net) if norms or way != "norms"] if recompute else [""]
    return_freed_memory(device)
    give_back(device)
    net.train()
    room = _usable_bytes(trainer, limit_gb)
    kept = functools.cache(lambda way: _most_kept(trainer, batch, way))

    def need(plan: StepPlan) -> float:
        fixed, each = kept(plan.recompute)
        return fixed + plan.images * (each + (0.0 if device.type == "cuda" else _TEMPORARY * kept(ways[0])[1]))

    def fits(plan: StepPlan) -> bool:
        if plan.recompute:
            set_recompute(net, plan.recompute)
        return not world.any_true(not _runs(trainer, batch, plan.images), name="does a step fit into memory?")

    plans = attempts(ways, min(trainer.microbatch or whole, whole), shrink=shrink)
    try:
        if limit_gb and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * _GIB / total), device)
        plan = choose(plans, need, room, fits if _can_try(device) else None)
    finally:
        if limit_gb and device.type == "cuda":  # the limit holds for these attempts, not for training
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    if plan is None:
        size = plans[-1].images
        remedies = ["--memory_limit_gb 0 or more"] * bool(limit_gb) + ["--recompute all"] * (not recompute)
        remedies += ["--microbatch auto"] * (not shrink) + ["--precision bf16", "fewer --num_channels"]
        raise ValueError(
            f"not even {size} image{'s' * (size > 1)} at a time {'fit' if size > 1 else 'fits'} into this device's memory"
            f"{f' of --memory_limit_gb {limit_gb:g}' if limit_gb else ''}; give {', or '.join(remedies)}"
        )
    if plan.images < whole:
        trainer.microbatch = plan.images
    passes = f"{plan.images} images per forward and backward pass"
    if plan.recompute:
        set_recompute(net, plan.recompute)
        _log.info(f"--recompute auto: {_CHOSEN[plan.recompute]}" + f"; {passes}" * (plan.images < whole))
    else:
        _log.info(f"--microbatch auto: {passes} fit")


def _can_try(device: torch.device) -> bool:
    """Whether a step that is too large fails with an error, and not by the end of the process."""
    return device.type == "cuda"


def _most_kept(trainer: Trainer, batch: Any, recompute: str) -> tuple[float, float]:
    """`_kept`, the most of all ranks; infinite where not even the few images fit on which it is counted."""
    try:
        mine: tuple[float, float] = _kept(trainer, batch, recompute)
    except torch.OutOfMemoryError:
        give_back(trainer.device)
        mine = math.inf, 0.0
    fixed, each = zip(*trainer.world.all_gather_object(mine, "how much memory does a step need?"))
    return max(fixed), max(each)


def _state_bytes(trainer: Trainer) -> int:
    """Bytes that a step needs for any number of images: gradients, moments and, in main memory, the copies that a save is
    written from."""
    weights = gradients = sum(p.nbytes for p in trainer.params)
    averages = sum(copy.nbytes for copies in trainer.ema.copies.values() for copy in copies)
    saving = 0 if trainer.checkpoints is None or trainer.device.type == "cuda" else 3 * weights + averages
    return gradients + _moment_bytes(trainer) + saving


def _runs(trainer: Trainer, batch: Any, count: int) -> bool:
    """Whether a step on microbatches of `count` runs on this device."""
    try:
        _try(trainer, batch, count)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        give_back(trainer.device)


def _try(trainer: Trainer, batch: Any, count: int) -> None:
    """Allocate as much as a step's peak: a second microbatch, with gradients and optimizer moments in memory.

    `autograd.grad` instead of `backward`, so that the hooks of DistributedDataParallel start no collective.
    """
    # Autograd keeps the weights that were cast, unless blocks are recomputed as a whole; a step has copies of them in any case.
    whole_blocks = any(getattr(module, "use_checkpoint", False) for module in trainer.net.modules())
    copied = copied_bytes(trainer.net, trainer.precision.name) if whole_blocks else 0
    moments = torch.zeros(_moment_bytes(trainer) + copied, dtype=torch.uint8, device=trainer.device)
    gradients = []
    for part, ids in itertools.islice(_parts(trainer, batch, count), 2):
        loss = trainer.precision.scale(trainer.losses_of(trainer.net, part, ids).loss.float().sum())
        gradients.append(torch.autograd.grad(loss, trainer.params, allow_unused=True))
    del moments, gradients


def _kept(trainer: Trainer, batch: Any, recompute: str) -> tuple[int, int]:
    """`kept_bytes` of the trainer's losses, after `set_recompute(recompute)` ("": without that call)."""

    def forward(examples: int) -> None:
        part, ids = next(_parts(trainer, batch, examples))
        trainer.losses_of(trainer.net, part, ids)

    if recompute:
        set_recompute(trainer.net, recompute)
    copied = copied_bytes(trainer.net, trainer.precision.name)
    kept = kept_bytes(forward, trainer.params, most=min(3, batching.length(batch)), copied=copied)
    give_back(trainer.device)
    return kept


def _usable_bytes(trainer: Trainer, limit_gb: float) -> float:
    """Bytes that a step may add on the rank that has least: what `limit_gb` leaves, else a share of what is free."""
    device, sharers = trainer.device, max(1, trainer.world.local_size)
    free = _USABLE * (available_memory(device) or math.inf) / sharers
    mine = (limit_gb * _GIB - used_memory(device) if limit_gb else free) - _state_bytes(trainer)
    return float(min(trainer.world.all_gather_object(mine, "how much memory is free?")))


def _parts(trainer: Trainer, batch: Any, count: int) -> Any:
    """(examples, their positions) of each microbatch of `count`."""
    ids = batching.positions(batch, trainer.world.rank, trainer.world.size)
    return zip(batching.split(batch, count), ids.split(count))


def _moment_bytes(trainer: Trainer) -> int:
    """Bytes of the optimizer's moments, two numbers per weight; 0 once the optimizer has allocated them."""
    inner: Any = getattr(trainer.optimizer, "optim", trainer.optimizer)
    sharers = trainer.world.size if inner is not trainer.optimizer else 1
    return 0 if inner.state else -(-2 * sum(p.nbytes for p in trainer.params) // sharers)


def copied_bytes(net: nn.Module, precision: str) -> int:
    """Bytes of the low-precision copies of the weights that a training step makes (`precision.weights_cast_once`)."""
    makes = precision != "fp32" and hasattr(unwrapped(net), "weights_cast_once")
    return 2 * makes * sum(p.numel() for p in net.parameters())


def kept_bytes(
    forward: Callable[[int], Any], weights: Iterable[Tensor], *, most: int = 3, copied: int = 0
) -> tuple[int, int]:
    """(bytes that do not grow with the batch, bytes per example) that autograd keeps from forward for backward.

    `forward(n)` runs on n examples on any device, meta included. Not counted: `weights`, kernel workspaces, allocator
    rounding. `most`: the largest n; from 3 on, batches of 2 and 3 are compared, as kernels treat a single example differently.
    `copied`: bytes of weights that were cast, in memory whether autograd keeps them or not.
    """
    excluded = {weight.untyped_storage()._cdata for weight in weights}

    def kept(examples: int) -> int:
        sizes: dict[int, int] = {}
        alive = []  # holds the storages, as the address of a freed one may be used again

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in excluded and storage._cdata not in sizes:
                sizes[storage._cdata] = storage.nbytes()
                alive.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _MetaLikeReal():
            forward(examples)
        return sum(sizes.values())

    fewer = min(2, max(1, most - 1))
    first = kept(fewer)
    each = kept(fewer + 1) - first if most > 1 else first
    return max(copied, first - fewer * each), each


class _FusedAttention(torch.autograd.Function):
    """Saves for backward what fused attention kernels save: not the matrix of tokens by tokens."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        out = torch.empty_like(q)
        log_sum_exp = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("kept_bytes runs forward only")


class _MetaLikeReal(TorchFunctionMode):
    """Makes the meta device keep what others do: torch has only unfused attention there, and loses channels_last."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if on_meta and func is torch.nn.functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        result = func(*args, **(kwargs or {}))
        if on_meta and func is torch.conv2d:
            return result.contiguous(memory_format=torch.channels_last)
        return result
