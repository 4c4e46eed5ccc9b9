"""Wrapping a network for many processes, and looking inside wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def distributed(
    net: nn.Module, device: torch.device, options: Mapping[str, Any] | None = None
) -> DistributedDataParallel:
    """`net` with gradients averaged over the processes; all start with rank 0's weights.

    Gradients are views of the communication buckets, which saves one copy of them. Buffers are not sent at every step.
    `options` go to DistributedDataParallel, e.g. `{"static_graph": True}`; `compress_gradients` among them sends gradients
    in bfloat16, half the bytes and less exact.
    """
    options = dict(options or {})
    compress = options.pop("compress_gradients", False)
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    defaults: dict[str, Any] = {buffers: False, "bucket_cap_mb": 128, "gradient_as_bucket_view": True}
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(net, device_ids=ids, **{**defaults, **options})
    if compress:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside torch.compile's or DistributedDataParallel's wrapper, whose parameters have their plain names."""
    while True:
        inner = getattr(net, "_orig_mod", None) or (net.module if isinstance(net, DistributedDataParallel) else None)
        if inner is None:
            return net
        net = inner
