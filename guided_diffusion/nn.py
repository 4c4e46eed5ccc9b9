"""Door: guided_diffusion.nn as of 2021, opening on models.layers, training.ema and diffusion.densities."""

from __future__ import annotations

import math  # noqa: F401
from collections.abc import Callable
from typing import Any

import torch as th
import torch.nn as nn

from .diffusion.densities import mean_flat  # noqa: F401
from .models.layers import (  # noqa: F401
    GroupNorm32,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from .training.ema import update_ema  # noqa: F401


class SiLU(nn.SiLU):
    """x * sigmoid(x): torch's own, under the name it had here before torch had one."""


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter of `module` by `scale` and return it."""
    with th.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


class CheckpointFunction:
    """The call of 2021, `CheckpointFunction.apply(function, number of inputs, *inputs, *parameters)`."""

    @staticmethod
    def apply(run_function: Callable[..., Any], length: int, *args: Any) -> Any:
        return checkpoint(run_function, args[:length], args[length:], True)
