"""AdamW as the trainer uses it: fused where possible, optionally sharded, skipping a bad step without a device sync."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def make_adamw(
    params: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0, shard: bool = False
) -> Optimizer:
    """AdamW over one parameter group. `shard` spreads its state over the processes (ZeRO stage 1); needs a process group."""
    params = [p for p in params if p.requires_grad]
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": _can_fuse(params)}
    if shard:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(params, optimizer_class=AdamW, **options)
    return AdamW(params, **options)


def learning_rate(step: int, base: float, *, anneal_steps: int = 0, warmup_steps: int = 0) -> float:
    """The rate of the update after `step` completed ones. It depends on `step` alone, so a save need not hold it.

    Linear decay from `base` at step 0 to 0 at `anneal_steps` (0 = none), times a linear warm-up that reaches 1 at the
    `warmup_steps`-th update (0 = none). Past `anneal_steps` the rate stays 0.
    """
    rate = base
    if anneal_steps > 0:
        rate *= max(0.0, 1.0 - step / anneal_steps)
    if warmup_steps > 0:
        rate *= min(1.0, (step + 1) / warmup_steps)
    return rate


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all numbers in all tensors, float32 scalar on their device."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))]).norm()


# AdamW's state tensors, which have the shapes of the parameters; other optimizers' state may have any shape.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _can_fuse(params: Sequence[nn.Parameter]) -> bool:
    try:
        AdamW(params, fused=True)
    except RuntimeError:
        return False
    return True


def guarded_step(optimizer: Optimizer, grads: Sequence[Tensor], divisor: Tensor | None, skip: Tensor) -> None:
    """One optimizer step on `grads / divisor` (None: 1), or none if `skip` (bool scalar on the device) is true.

    Fused kernels take both as tensors, so nothing waits for the device; the others read `skip` on the host.
    """
    inner: Any = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer wraps the one that computes
    if inner.defaults.get("fused"):  # attributes made for GradScaler: divide by `grad_scale`, skip if `found_inf`
        # A divisor costs a pass: the kernel writes the divided gradients back.
        inner.grad_scale, inner.found_inf = divisor, skip.to(torch.float32)
        try:
            optimizer.step()
        finally:
            del inner.grad_scale, inner.found_inf
    elif not skip.item():
        if divisor is not None:
            torch._foreach_div_(list(grads), divisor)
        optimizer.step()


def full_state_dict(optimizer: Optimizer, is_main: bool) -> dict[str, Any] | None:
    """`optimizer.state_dict()` on the main process, None on others. A sharded optimizer gathers here: call on all processes."""
    gather = getattr(optimizer, "consolidate_state_dict", None)
    if gather is not None:
        gather(to=0)
    return optimizer.state_dict() if is_main else None


def load_state(optimizer: Optimizer, state: Mapping[str, Any], params: Sequence[nn.Parameter]) -> None:
    """Take up moments and step counts; learning rate, decay and the like stay as configured now.

    Also reads the optimizer files of 2021 float16 runs, whose moments are two flat tensors: all parameters of at most one
    dimension, then all others. ValueError if the file is of another network.
    """
    moments = dict(state.get("state", {}))
    if len(moments) == 2 != len(params) and all("exp_avg" in entry for entry in moments.values()):
        moments = _unflattened(moments, params)
    for k, entry in moments.items():
        if not 0 <= int(k) < len(params):
            raise ValueError(f"the optimizer file has {len(moments)} parameters, the network {len(params)}")
        shape = params[int(k)].shape
        for name, value in entry.items():
            if name in _MOMENTS and isinstance(value, Tensor) and value.shape != shape:
                raise ValueError(
                    f"the optimizer file is of another network: {name} of parameter {k} has shape {tuple(value.shape)} "
                    f"instead of {tuple(shape)}"
                )
    # torch loads hyperparameters too, so give it the current ones, with parameters numbered as in the file.
    numbers = itertools.count()
    groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    # Files are contiguous, and torch's fused AdamW pairs moments and parameters by their place in memory.
    inner: Any = getattr(optimizer, "optim", optimizer)
    for param, entry in inner.state.items():
        for name in _MOMENTS:
            if isinstance(entry.get(name), Tensor) and entry[name].stride() != param.stride():
                entry[name] = torch.empty_like(param, dtype=entry[name].dtype, requires_grad=False).copy_(entry[name])


def _unflattened(flat: Mapping[int, Mapping[str, Any]], params: Sequence[nn.Parameter]) -> dict[int, dict[str, Any]]:
    """Moments by parameter from the two flat tensors of a 2021 float16 run; see `load_state`."""
    out: dict[int, dict[str, Any]] = {}
    vectors = [k for k, p in enumerate(params) if p.dim() <= 1]
    matrices = [k for k, p in enumerate(params) if p.dim() > 1]
    for entry, members in zip((flat[k] for k in sorted(flat)), (vectors, matrices)):
        sizes = [params[k].numel() for k in members]
        if entry["exp_avg"].numel() != sum(sizes):
            raise ValueError(
                f"the float16 optimizer file holds {entry['exp_avg'].numel()} numbers where the network has {sum(sizes)} parameters"
            )
        pieces = {name: entry[name].reshape(-1).split(sizes) for name in ("exp_avg", "exp_avg_sq")}
        for n, k in enumerate(members):
            out[k] = {name: split[n].reshape(params[k].shape).clone() for name, split in pieces.items()}
            out[k]["step"] = torch.as_tensor(entry["step"], dtype=torch.float32).clone()
    return out
