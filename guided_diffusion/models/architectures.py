"""The table of networks besides the U-Net, which `--architecture` chooses by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

# Name -> constructor of an nn.Module that is called as `net(x, time)`; with `y` if class-conditional, with `low_res` in an upsampler.
# The constructor gets image_size ((height, width) where they differ), in_channels, out_channels, num_classes (None = unconditional)
# and the --arch_options. User programs add theirs before they train or load. "MODULE:NAME" stands for a constructor in this folder
# that is imported at its first use, so that --help can list this table without loading torch.
ARCHITECTURES: dict[str, Callable[..., nn.Module] | str] = {}


def make_network(name: str, options: dict[str, Any], *, prefix: str = "", **shape: Any) -> nn.Module:
    """Build the network `name`. `prefix`: of its flags, in messages. ValueError for an unknown name or options it does not take."""
    make = ARCHITECTURES.get(name)
    if make is None:
        raise ValueError(
            f"--{prefix}architecture is {name!r}; it must be one of {', '.join(('unet', *ARCHITECTURES))}. A network of yours is "
            f"known once a program has set guided_diffusion.ARCHITECTURES[{name!r}]; commands take such a program by --import FILE.py"
        )
    if isinstance(make, str):
        module, _, attribute = make.partition(":")
        make = cast("Callable[..., nn.Module]", getattr(import_module(f".{module}", __package__), attribute))
    try:
        inspect.signature(make).bind(**shape, **options)
    except TypeError as error:
        raise ValueError(
            f"--{prefix}arch_options {options} do not fit --{prefix}architecture {name}: {error}"
        ) from None
    return make(**shape, **options)
