"""Door: guided_diffusion.losses is guided_diffusion.diffusion.likelihood (the same module object)."""

import sys

from .diffusion import likelihood as _room
from .diffusion.likelihood import *  # noqa: F403  so editors and type checkers can follow the door

sys.modules[__name__] = _room
