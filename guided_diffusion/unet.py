"""Door: guided_diffusion.unet is guided_diffusion.models.unet (the same module object)."""

import sys

from .models import unet as _room
from .models.unet import *  # noqa: F403  so editors and type checkers can follow the door

sys.modules[__name__] = _room
