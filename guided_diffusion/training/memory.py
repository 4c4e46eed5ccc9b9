"""Memory of a training step: what is computed again in the backward pass, what is kept for it, and what fits into the device."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..runtime.devices import available_memory, give_back, used_memory
from . import batching
from .parallel import unwrapped

if TYPE_CHECKING:
    from .trainer import Trainer

_GIB = 2**30
_SHARE = 0.9  # of main memory that a step may count on
# What workspaces of kernels and passing gradients take on a CPU, as a share of what forward keeps if nothing is recomputed: 0.7 of 64
# images of 32 pixels and 0.7 of 16 of 64, whatever is recomputed.
_PASSING = 0.75
_CHOSEN = {"none": "nothing is recomputed", "norms": "norms are recomputed", "all": "whole blocks are recomputed"}
_log = logging.getLogger(__name__)


def can_recompute(net: nn.Module) -> tuple[str, ...]:
    """What `set_recompute` can ask of a network, the cheapest in time first."""
    inner = unwrapped(net)
    blocks = any(hasattr(module, "use_checkpoint") for module in inner.modules())
    return ("none", *["norms"] * hasattr(inner, "set_recompute_norms"), *["all"] * blocks)


def set_recompute(net: nn.Module, what: str) -> None:
    """Let a network compute again in backward: "none", "norms" (norms and what follows them) or "all" (whole blocks).

    Blocks are modules with an attribute `use_checkpoint`; norms need a method `set_recompute_norms`. ValueError where the
    network cannot.
    """
    inner: Any = unwrapped(net)
    if what not in can_recompute(net):
        raise ValueError(f"--recompute {what}: {type(inner).__name__} can do {' or '.join(can_recompute(net))} only")
    for module in inner.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = what == "all"
    if hasattr(inner, "set_recompute_norms"):
        inner.set_recompute_norms(what == "norms")


class StepPlan(NamedTuple):
    """A forward and backward pass of training: what is recomputed ("none", "norms", "all"), and images at a time."""

    recompute: str
    images: int


def attempts(ways: Sequence[str], images: int, *, shrink: bool) -> list[StepPlan]:
    """What training tries, in this order: all `images` in each of the `ways`; with `shrink` then a half, a quarter ... in the last way."""
    sizes = [images]
    while shrink and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return [StepPlan(way, images) for way in ways[:-1]] + [StepPlan(ways[-1], size) for size in sizes]


def fit(
    trainer: Trainer, batch: Any, *, recompute: bool, shrink: bool, norms: bool = True, limit_gb: float = 0.0
) -> None:
    """Choose what a step on `batch` recomputes, and its microbatch: the first of the `attempts` that fits into memory stays.

    With `recompute` the network keeps everything, then computes its norms again (if `norms`), then whole blocks. With `shrink` fewer
    images go through at a time. On a GPU each attempt is a real forward and backward pass, with room for the optimizer's moments. The
    system ends a process that takes too much main memory, so on a CPU what a step needs is counted. All processes choose the same;
    weights and gradients stay as they are. `limit_gb`: GiB that this process may use; 0 = what is free. Call it before the network is
    compiled. ValueError where nothing fits.
    """
    net, device, whole = trainer.net, trainer.device, batching.length(batch)
    ways = [way for way in can_recompute(net) if norms or way != "norms"] if recompute else [""]
    room = _room(trainer, limit_gb)
    passing = 0.0 if device.type == "cuda" else _PASSING * _kept(trainer, batch, ways[0])[1]
    try:
        if limit_gb and device.type == "cuda":
            there = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * _GIB / there), device)
        for way, size in attempts(ways, min(trainer.microbatch or whole, whole), shrink=shrink):
            fits = _fits(trainer, batch, way, size, room - passing * size)
            if trainer.world.any_true(not fits, name="does a step fit into memory?"):
                continue
            if size < whole:
                trainer.microbatch = size
            passes = f"{size} images per forward and backward pass"
            if way:
                _log.info(f"--recompute auto: {_CHOSEN[way]}" + f"; {passes}" * (size < whole))
            else:
                _log.info(f"--microbatch auto: {passes} fit")
            return
    finally:
        if limit_gb and device.type == "cuda":  # it guides the choice only
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    remedies = ["--memory_limit_gb 0 or more"] * bool(limit_gb) + ["--recompute all"] * (not recompute)
    remedies += ["--microbatch auto"] * (not shrink) + ["--precision bf16", "fewer --num_channels"]
    raise ValueError(
        f"not even {size} image{'s' * (size > 1)} at a time {'fit' if size > 1 else 'fits'} into this device's memory"
        f"{f' of --memory_limit_gb {limit_gb:g}' if limit_gb else ''}; give {', or '.join(remedies)}"
    )


def _fits(trainer: Trainer, batch: Any, way: str, count: int, room: float) -> bool:
    """Whether this process can take a step with `count` examples at a time: on a GPU by trying, else by counting up to `room` bytes."""
    trainer.net.train()
    if trainer.device.type != "cuda":
        fixed, each = _kept(trainer, batch, way)
        weights = sum(p.nbytes for p in trainer.params)  # as many bytes as gradients
        averages = sum(copy.nbytes for copies in trainer.ema.copies.values() for copy in copies)
        saving = 0 if trainer.checkpoints is None else 3 * weights + averages  # the copies that a save is written from
        return fixed + count * each + weights + _moment_bytes(trainer) + saving <= room
    try:
        if way:
            set_recompute(trainer.net, way)
        _try(trainer, batch, count)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        give_back(trainer.device)


def _try(trainer: Trainer, batch: Any, count: int) -> None:
    """What the largest moment of a step needs: the pass of a second microbatch, with gradients and moments in memory.

    Gradients are taken without `backward`, so that no wrapper for several processes waits for the others.
    """
    room = torch.zeros(_moment_bytes(trainer), dtype=torch.uint8, device=trainer.device)
    gradients = []
    for part, ids in itertools.islice(_parts(trainer, batch, count), 2):
        loss = trainer.precision.scale(trainer.losses_of(trainer.net, part, ids).loss.float().sum())
        gradients.append(torch.autograd.grad(loss, trainer.params, allow_unused=True))
    del room, gradients


def _kept(trainer: Trainer, batch: Any, way: str) -> tuple[int, int]:
    """`kept_bytes` of the trainer's losses, recomputing what `way` says."""

    def forward(examples: int) -> None:
        part, ids = next(_parts(trainer, batch, examples))
        trainer.losses_of(trainer.net, part, ids)

    if way:
        set_recompute(trainer.net, way)
    kept = kept_bytes(forward, trainer.params, most=min(3, batching.length(batch)))
    give_back(trainer.device)
    return kept


def _room(trainer: Trainer, limit_gb: float) -> float:
    """Bytes that a step may add on this process. All processes ask before any tries, and count on as much as the one with the least."""
    device, sharers = trainer.device, max(1, trainer.world.local_size)
    free = _SHARE * (available_memory(device) or math.inf) / sharers
    least = min(trainer.world.all_gather_object(free, "how much memory is free?"))
    return limit_gb * _GIB - used_memory(device) if limit_gb else least


def _parts(trainer: Trainer, batch: Any, count: int) -> Any:
    """(examples, their positions) of each microbatch of `count`."""
    ids = batching.positions(batch, trainer.world.rank, trainer.world.size)
    return zip(batching.split(batch, count), ids.split(count))


def _moment_bytes(trainer: Trainer) -> int:
    """Bytes of the optimizer's moments, where it has not made them yet: two numbers per weight."""
    inner: Any = getattr(trainer.optimizer, "optim", trainer.optimizer)
    sharers = trainer.world.size if inner is not trainer.optimizer else 1
    return 0 if inner.state else -(-2 * sum(p.nbytes for p in trainer.params) // sharers)


def kept_bytes(forward: Callable[[int], Any], weights: Iterable[Tensor], *, most: int = 3) -> tuple[int, int]:
    """(bytes that do not grow with the batch, bytes per example) kept from the forward pass for the backward pass.

    `forward(n)` runs it on n examples, of any device, the meta device too; `weights` are not counted, nor are workspaces of
    kernels and what allocators round up. `most`: how many examples there are, 3 are enough; one alone is a special case to kernels.
    """
    own = {weight.untyped_storage()._cdata for weight in weights}

    def kept(examples: int) -> int:
        sizes: dict[int, int] = {}
        alive = []  # the addresses of storages are unique among living ones only

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in sizes:
                sizes[storage._cdata] = storage.nbytes()
                alive.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _AsOnADevice():
            forward(examples)
        return sum(sizes.values())

    fewer = min(2, max(1, most - 1))
    first = kept(fewer)
    each = kept(fewer + 1) - first if most > 1 else first
    return max(0, first - fewer * each), each


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels of attention keep: no matrix of tokens by tokens."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        out = torch.empty_like(q)
        log_sum_exp = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only counted, never run backwards")


class _AsOnADevice(TorchFunctionMode):
    """Lets the meta device keep what others do: torch would take the plain formula of attention there, and forget layouts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if on_meta and func is torch.nn.functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        answer = func(*args, **(kwargs or {}))
        if on_meta and func is torch.conv2d:
            return answer.contiguous(memory_format=torch.channels_last)
        return answer
