"""Door: guided_diffusion.nn as of 2021, opening on models.layers, training.ema and diffusion.densities."""

from __future__ import annotations

import math  # noqa: F401
from collections.abc import Callable
from typing import Any

import torch as th  # noqa: F401
import torch.nn as nn  # noqa: F401

from .diffusion.densities import mean_flat  # noqa: F401
from .models.layers import (  # noqa: F401
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    scale_module,
    timestep_embedding,
    zero_module,
)
from .training.ema import update_ema  # noqa: F401


class CheckpointFunction:
    """The call of 2021, `CheckpointFunction.apply(function, number of inputs, *inputs, *parameters)`."""

    @staticmethod
    def apply(run_function: Callable[..., Any], length: int, *args: Any) -> Any:
        return checkpoint(run_function, args[:length], args[length:], True)
