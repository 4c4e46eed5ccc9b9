"""Weights in another form: safetensors, a plain .pt file, or diffusers' layout, with the largest output difference measured."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..runtime import storage
from ..runtime.streams import EVALUATE, Streams
from .diffusers import is_diffusers, load_diffusers, save_diffusers
from .identify import flag_line
from .load import Loaded, load, metadata_of
from .probe import conditions

_log = logging.getLogger(__name__)
FORMS = ("safetensors", "pt", "diffusers")


def form_of(target: str, form: str = "") -> str:
    """`form`, one of FORMS; where it is empty, by the target's name."""
    form = form or os.path.splitext(target)[1].removeprefix(".")
    if form not in FORMS:
        raise ValueError(f"cannot tell the form of {target!r}; end it in .safetensors or .pt, or say --to diffusers")
    return form


def convert(source: str, target: str, form: str, *, noise_schedule: str = "linear", weights: str = "") -> float:
    """Write the weights of `source` as `target` and return how far its outputs are from those of the source, relatively.

    source          a .pt or .safetensors file, a run folder, or a folder that diffusers wrote
    form            one of FORMS; "diffusers" writes a folder
    noise_schedule  of a diffusers folder, which does not carry it
    weights         "ema" or "model" where the source holds both
    """
    original: Callable[..., Tensor]
    if is_diffusers(source):
        loaded, original = load_diffusers(source, noise_schedule)
    else:
        loaded = load(source, weights=weights)
        original = loaded.net
    if form == "diffusers":
        return largest_difference(original, save_diffusers(loaded, target), loaded.config)
    save_file(loaded, target, form)
    return largest_difference(original, load(target, flags=_flags(loaded.config)).net, loaded.config)


def _flags(config: RunConfig) -> dict[str, Any]:
    return {**config.model.to_dict(), **config.diffusion.to_dict()}


def save_file(loaded: Loaded, target: str, form: str) -> None:
    """Write one file: safetensors with its configuration inside, or a plain state dict as in 2021, whose flags are logged."""
    state = {name: value.detach().cpu().contiguous() for name, value in loaded.net.state_dict().items()}
    if form == "safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise ValueError(
                "writing safetensors needs its package: pip install 'guided-diffusion[safetensors]'"
            ) from None
        metadata = {"guided_diffusion": storage.to_json(metadata_of(loaded), indent=None)}
        storage.write_bytes_atomic(target, save(state, metadata=metadata))
        return
    with storage.atomic_write(target) as file:
        torch.save(state, file)
    flags = flag_line(_flags(loaded.config))
    _log.info("note: a plain state dict as in 2021 carries no configuration; to load %s, type %s", target, flags)


def largest_difference(first: Callable[..., Tensor], second: Callable[..., Tensor], config: RunConfig) -> float:
    """max |difference| / max |output| of two networks on the same noise, steps and classes, float32 on the CPU."""
    model = config.model
    x = Streams(0, EVALUATE, ids=range(2)).normal((model.image_channels, *model.size))
    time = torch.tensor([10.0, 700.0])
    cond = conditions(model, x)
    with torch.no_grad():
        a, b = first(x, time, **cond).float(), second(x, time, **cond).float()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
