"""The mathematics of diffusion: noise process, objectives, samplers and guidance, on tensors; torch and numpy only.

The modules that the 2021 names open on are loaded when they are first touched: importing those names costs little.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_DOORS_USE = ("denoiser", "guidance", "likelihood", "objectives", "process", "schedules", "updates")


def __getattr__(name: str) -> ModuleType:
    if name in _DOORS_USE:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
