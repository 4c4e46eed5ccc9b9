"""Door: guided_diffusion.unet is guided_diffusion.models.unet (the same module object), with the other names of 2021."""

import math
import sys
from abc import abstractmethod

import numpy as np

from .models import unet as _room
from .models.attention import count_flops_attn
from .models.layers import avg_pool_nd, convert_module_to_f16, convert_module_to_f32, timestep_embedding
from .models.pools import AttentionPool2d
from .models.unet import *  # noqa: F403  so editors and type checkers can follow the door

vars(_room).update(
    math=math,
    abstractmethod=abstractmethod,
    np=np,
    convert_module_to_f16=convert_module_to_f16,
    convert_module_to_f32=convert_module_to_f32,
    count_flops_attn=count_flops_attn,
    avg_pool_nd=avg_pool_nd,
    timestep_embedding=timestep_embedding,
    AttentionPool2d=AttentionPool2d,
)
sys.modules[__name__] = _room
