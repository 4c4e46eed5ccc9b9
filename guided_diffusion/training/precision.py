"""Number formats of training: float32, bfloat16, or float16 with a loss scale. Weights stay float32 in all three.

The network casts its weights where it uses them (`net.set_compute_dtype`), so nothing here copies or halves parameters.
All decisions are tensors on the device: no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.devices import DTYPES, compute_in

INITIAL_LOG_LOSS_SCALE = 20.0
"""log2 of the first float16 loss scale, as in 2021."""


class Precision:
    """What format the network computes in and, for float16, the scale of the loss.

    The scale is kept as `lg_loss_scale = log2(scale)`: `+ growth` after a good step, `- 1` (halved) after one whose
    gradients overflowed, never below `floor`. For fp32 and bf16 the scale is 1 and never changes.
    """

    def __init__(
        self,
        name: str = "fp32",
        *,
        device: torch.device | str = "cpu",
        initial: float = INITIAL_LOG_LOSS_SCALE,
        growth: float = 1e-3,
        floor: float = 0.0,
    ) -> None:
        if name not in DTYPES:
            raise ValueError(f"precision {name!r} is not one of {', '.join(DTYPES)}")
        if initial < floor:
            raise ValueError(f"the first loss scale 2^{initial} is below its floor 2^{floor}")
        self.name = name
        self.dtype = DTYPES[name]
        self.growth = growth
        self.floor = floor
        start = initial if self.scales else 0.0
        self.lg_loss_scale = torch.tensor(start, dtype=torch.float32, device=device)

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled, which only float16 needs."""
        return self.name == "fp16"

    def prepare(self, net: nn.Module) -> None:
        """Tell the network its format. Networks without `set_compute_dtype` can only train in fp32."""
        compute_in(net, self.name)

    def scale(self, loss: Tensor) -> Tensor:
        """`loss * 2^lg_loss_scale`: keeps small float16 gradients from vanishing."""
        return loss * torch.exp2(self.lg_loss_scale) if self.scales else loss

    def divisor(self) -> Tensor:
        """What gradients must be divided by, float32 scalar on the device."""
        return torch.exp2(self.lg_loss_scale)

    def at_floor(self) -> Tensor:
        """Whether the scale cannot fall any further (true for fp32 and bf16), bool scalar on the device."""
        return (
            self.lg_loss_scale <= self.floor if self.scales else torch.ones_like(self.lg_loss_scale, dtype=torch.bool)
        )

    def update(self, overflowed: Tensor) -> None:
        """Grow or halve the scale after a step; `overflowed` is a bool scalar on the device."""
        if self.scales:
            lowered = (self.lg_loss_scale - 1.0).clamp(min=self.floor)
            self.lg_loss_scale = torch.where(overflowed, lowered, self.lg_loss_scale + self.growth)

    def state_dict(self) -> dict[str, Any]:
        """`lg_loss_scale` as a Python number; it is exact, float32 fits in a float."""
        return {"name": self.name, "lg_loss_scale": self.lg_loss_scale.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the scale up again. A run that was not float16 before starts with the initial scale."""
        if self.scales and state.get("name") == "fp16":
            self.lg_loss_scale.fill_(float(state["lg_loss_scale"]))
