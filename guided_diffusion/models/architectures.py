"""Networks besides the U-Net, by the word of `--architecture`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

# Name -> what makes an nn.Module that is called as `net(x, time, y)`; `y` is given where classes are, `low_res` to an upsampler.
# It is called with image_size (height and width where they differ), in_channels, out_channels, num_classes (None = no labels
# are given) and what --arch_options says. A program adds its own before it trains or loads. "MODULE:NAME" is one in this folder,
# loaded when it is made: reading this table, as --help does, loads no torch.
ARCHITECTURES: dict[str, Callable[..., nn.Module] | str] = {}


def make_network(name: str, options: dict[str, Any], *, prefix: str = "", **shape: Any) -> nn.Module:
    """The network of that name; `prefix` begins the names of its flags. ValueError where it is unknown or takes other options."""
    make = ARCHITECTURES.get(name)
    if make is None:
        raise ValueError(
            f"--{prefix}architecture is {name!r}; it must be one of {', '.join(('unet', *ARCHITECTURES))}. A network of yours is "
            f"known once a program has set guided_diffusion.ARCHITECTURES[{name!r}]; commands take such a program by --import FILE.py"
        )
    if isinstance(make, str):
        module, _, name_there = make.partition(":")
        make = cast("Callable[..., nn.Module]", getattr(import_module(f".{module}", __package__), name_there))
    try:
        inspect.signature(make).bind(**shape, **options)
    except TypeError as error:
        raise ValueError(
            f"--{prefix}arch_options {options} do not fit --{prefix}architecture {name}: {error}"
        ) from None
    return make(**shape, **options)
