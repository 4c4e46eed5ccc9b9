"""Number formats of training: float32, bfloat16, or float16 with a loss scale. Weights stay float32 in all three.

The network casts its weights where it uses them (`runtime.devices.compute_in`), in a training step once for all its uses.
All decisions are tensors on the device: no step waits for the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.devices import DTYPES
from .parallel import unwrapped

INITIAL_LOG_LOSS_SCALE = 20.0
"""log2 of the first float16 loss scale, as in 2021."""


class Precision:
    """For float16 the scale of the loss, which keeps small gradients from vanishing.

    The scale is kept as `lg_loss_scale = log2(scale)`: `+ growth` after a good step, `- 1` (halved) after one whose
    gradients overflowed, never below 0. For fp32 and bf16 the scale is 1 and never changes.
    """

    def __init__(self, name: str = "fp32", *, device: torch.device | str = "cpu", growth: float = 1e-3) -> None:
        if name not in DTYPES:
            raise ValueError(f"precision {name!r} is not one of {', '.join(DTYPES)}")
        self.name, self.growth = name, growth
        self.scales = name == "fp16"
        """Whether the loss is scaled."""
        self.lg_loss_scale = torch.tensor(INITIAL_LOG_LOSS_SCALE * self.scales, dtype=torch.float32, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """`loss * 2^lg_loss_scale`."""
        return loss * torch.exp2(self.lg_loss_scale) if self.scales else loss

    def divisor(self) -> Tensor | None:
        """The scale, by which gradients must be divided, float32 scalar on the device; None for fp32 and bf16."""
        return torch.exp2(self.lg_loss_scale) if self.scales else None

    def at_floor(self) -> Tensor:
        """Whether the scale cannot fall any further (true for fp32 and bf16), bool scalar on the device."""
        return self.lg_loss_scale <= 0

    def update(self, overflowed: Tensor) -> None:
        """Grow or halve the scale after a step; `overflowed` is a bool scalar on the device."""
        if self.scales:
            lowered = (self.lg_loss_scale - 1.0).clamp(min=0.0)
            self.lg_loss_scale = torch.where(overflowed, lowered, self.lg_loss_scale + self.growth)

    def state_dict(self) -> dict[str, Any]:
        """`lg_loss_scale` as a Python float, which holds a float32 exactly."""
        return {"name": self.name, "lg_loss_scale": self.lg_loss_scale.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the scale. If the saved run was not float16, the initial scale stays."""
        if self.scales and state.get("name") == "fp16":
            self.lg_loss_scale.fill_(float(state["lg_loss_scale"]))


def weights_cast_once(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A block in which a network that can do so (`Network.weights_cast_once`) casts its weights once, not at each use.

    A compiled one does not use such copies.
    """
    inner = unwrapped(net)
    plain = inner._compiled_call_impl is None
    return getattr(inner, "weights_cast_once", contextlib.nullcontext)() if plain else contextlib.nullcontext()


def store_as_used(net: nn.Module) -> None:
    """On a GPU: store the weights in the layout in which the network uses them, if it knows one (`Network.store_channels_last`).

    That saves turning every weight and its gradient at each step. Gradients, moments and EMA copies take the same layout.
    """
    store = getattr(unwrapped(net), "store_channels_last", None)
    if store is not None and all(p.is_cuda for p in net.parameters()):
        store()
