"""Door: guided_diffusion.losses is guided_diffusion.diffusion.densities (the same module object)."""

import sys

from .diffusion import densities as _room
from .diffusion.densities import *  # noqa: F403  so editors and type checkers can follow the door

sys.modules[__name__] = _room
