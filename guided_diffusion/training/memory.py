"""Memory of a training step: what is computed again in the backward pass, what is kept for it, and what fits into the device."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..runtime.devices import (
    available_memory,
    give_back,
    give_back_at_once,
    peak_memory,
    restart_peak_memory,
    used_memory,
)
from . import batching
from .parallel import unwrapped

if TYPE_CHECKING:
    from .trainer import Trainer

_GIB = 2**30
_SHARE_OF_FREE = 0.9  # of main memory that a step may count on; the rest is for what is not counted
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


def fit(
    trainer: Trainer, batch: Any, *, recompute: bool, shrink: bool, norms: bool = True, limit_gb: float = 0.0
) -> None:
    """Choose what a step on `batch` recomputes, and its microbatch, by trying: the first that fits into memory stays.

    With `recompute` the network keeps everything, then computes its norms again (if `norms`), then whole blocks. Where that is
    not enough, with `shrink`, the images go through by halves, quarters ... of the batch. A trial is a real forward and backward
    pass, with room for the optimizer's moments. (The system ends a process that takes too much main memory, so on the CPU trials
    grow from few examples, and stop before they would need too much.) All processes try and choose the same; weights and
    gradients stay as they are. `limit_gb`: GiB that this process may use; 0 = what is free. Call it before the network is
    compiled. ValueError where nothing fits.
    """
    net, device = trainer.net, trainer.device
    ways = [way for way in can_recompute(net) if norms or way != "norms"] if recompute else [""]
    size = min(trainer.microbatch or batching.length(batch), batching.length(batch))
    attempts = [(way, size) for way in ways]
    while shrink and size > 1:
        size = -(-size // 2)
        attempts.append((ways[-1], size))
    give_back_at_once(device)
    limit = _limit(trainer, limit_gb)
    limited = bool(limit_gb) and device.type == "cuda"
    if limited:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)
    try:
        for way, size in attempts:
            if way:
                set_recompute(net, way)
            if trainer.world.any_true(not _fits(trainer, batch, size, limit), name="does a step fit into memory?"):
                continue
            if size < batching.length(batch):
                trainer.microbatch = size
            passes = f"{size} images per forward and backward pass"
            if way:
                _log.info(f"--recompute auto: {_CHOSEN[way]}" + f"; {passes}" * (size < batching.length(batch)))
            else:
                _log.info(f"--microbatch auto: {passes} fit")
            return
    finally:
        if limited:  # it guides the choice only
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    remedies = ["--memory_limit_gb 0 or more"] * bool(limit_gb) + ["--recompute all"] * (not recompute)
    remedies += ["--microbatch auto"] * (not shrink) + ["--precision bf16", "fewer --num_channels"]
    raise ValueError(
        f"not even {size} image{'s' * (size > 1)} at a time {'fit' if size > 1 else 'fits'} into this device's memory"
        f"{f' of --memory_limit_gb {limit_gb:g}' if limit_gb else ''}; give {', or '.join(remedies)}"
    )


def _fits(trainer: Trainer, batch: Any, count: int, limit: float) -> bool:
    """Whether a step with `count` examples at a time fits into the device's memory, on the CPU `limit` bytes, on this process."""
    trainer.net.train()
    try:
        if trainer.device.type == "cuda":
            _try(trainer, batch, count)
            return True
        if _counted(trainer, batch, count) > limit:
            return False
        return _grown(trainer, batch, count, limit - _copies(trainer))
    except torch.OutOfMemoryError:
        return False
    finally:
        give_back(trainer.device)


def _grown(trainer: Trainer, batch: Any, count: int, limit: float) -> bool:
    """Whether the process's peak stays below `limit` bytes in trials of few examples, then of four times as many ... `count`.

    Each size is tried only if the line through the last two peaks allows it, give or take a tenth:
    the count of what forward keeps does not know
    what backward recomputes. Where the system does not restart a peak, the count alone decides.
    """
    sizes = [count]
    while sizes[0] > 2:
        sizes.insert(0, max(2, -(-sizes[0] // 4)))
    passes = 1 if count >= batching.length(batch) else 2
    gradients = sum(p.nbytes for p in trainer.params)
    tried = [(0, used_memory(trainer.device) + gradients + _moment_bytes(trainer))]  # without examples
    for size in sizes:
        if len(tried) > 1:
            (fewer, low), (more, high) = tried[-2:]
            if high + (size - more) * (high - low) / (more - fewer) > limit / _SHARE_OF_FREE:
                return False
        give_back(trainer.device)
        if not restart_peak_memory():
            return True
        _try(trainer, batch, size, passes)
        tried.append((size, peak_memory()))
    return tried[-1][1] <= limit


def _try(trainer: Trainer, batch: Any, count: int, passes: int = 2) -> None:
    """What the largest moment of a step needs: the pass of a second microbatch, with gradients and moments in memory.

    `passes`: 1 where there is no second one.
    Gradients are taken without `backward`, so that no wrapper for several processes waits for the others.
    """
    room = torch.zeros(_moment_bytes(trainer), dtype=torch.uint8, device=trainer.device)
    gradients = []
    for part, ids in itertools.islice(_parts(trainer, batch, count), passes):
        loss = trainer.precision.scale(trainer.losses_of(trainer.net, part, ids).loss.float().sum())
        gradients.append(torch.autograd.grad(loss, trainer.params, allow_unused=True))
    del room, gradients


def _counted(trainer: Trainer, batch: Any, count: int) -> int:
    """Bytes that this process will hold with `count` examples at a time: what it holds now, and what a step adds, in main memory."""

    def forward(examples: int) -> None:
        part, ids = next(_parts(trainer, batch, examples))
        trainer.losses_of(trainer.net, part, ids)

    now = used_memory(trainer.device)
    fixed, each = kept_bytes(forward, trainer.params, most=min(3, batching.length(batch)))
    gradients = sum(p.nbytes for p in trainer.params)
    return now + fixed + count * each + gradients + _moment_bytes(trainer) + _copies(trainer)


def _copies(trainer: Trainer) -> int:
    """Bytes of main memory that a save is written from: copies of weights, moments and averages."""
    if trainer.checkpoints is None:
        return 0
    averages = sum(copy.nbytes for copies in trainer.ema.copies.values() for copy in copies)
    return 3 * sum(p.nbytes for p in trainer.params) + averages


def _limit(trainer: Trainer, limit_gb: float) -> float:
    """Bytes that this process may hold. All processes ask before any tries, and may add as much as the one with the least room."""
    device, sharers = trainer.device, max(1, trainer.world.local_size)
    room = _SHARE_OF_FREE * (available_memory(device) or math.inf) / sharers
    least = min(trainer.world.all_gather_object(room, "how much memory is free?"))
    return limit_gb * _GIB or used_memory(device) + least


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
