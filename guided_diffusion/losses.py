"""Door: guided_diffusion.losses is guided_diffusion.diffusion.densities (the same module object), with the other names of 2021."""

import sys

import numpy as np
import torch as th

from .diffusion import densities as _room
from .diffusion.densities import *  # noqa: F403  so editors and type checkers can follow the door

vars(_room).update(np=np, th=th)
sys.modules[__name__] = _room
