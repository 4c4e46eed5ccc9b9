"""A picture of samples while a network trains: always the same noise, so that one sees training at work."""

from __future__ import annotations

from typing import Any

import torch

from ..data.images import to_uint8
from ..runtime.streams import SAMPLE, Streams
from ..weights.load import Loaded
from . import writers
from .pipeline import make_pipeline, respaced


def write_preview(model: Loaded, path: str, *, steps: str, seed: int = 0, count: int = 16) -> None:
    """Write `count` samples by DDIM, the classes spread evenly and named, as one PNG.

    `steps` as in --timestep_respacing; every step where the process has fewer than that asks for.
    """
    config: Any = model.config.model
    device = next(model.net.parameters()).device
    try:
        process = respaced(model.process, steps)
    except ValueError:
        process = model.process
    cond, captions = {}, None
    if getattr(config, "class_cond", False):
        labels = torch.arange(count) * max(1, config.num_classes // count) % config.num_classes
        cond = {"y": labels.to(device)}
        names = model.class_names
        captions = [names[k] if k < len(names) else str(k) for k in labels.tolist()]
    streams = Streams(seed, SAMPLE, ids=range(count), device=device)
    sample = make_pipeline(model, process=process.to(device), sampler="ddim")
    images = sample(streams.normal(model.shape), streams.randn_like, cond)
    writers.write_grid(path, to_uint8(images).cpu().numpy(), captions)
