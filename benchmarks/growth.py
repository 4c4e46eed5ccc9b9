"""How the cost of a forward pass grows with the image, the batch and the channels."""

from __future__ import annotations

import torch

from . import floor, networks, shapes


def measure(*, device: str, quick: bool) -> dict[str, float]:
    """Milliseconds per image of a float32 forward pass; each line changes one thing."""
    base, step = (32, 32) if quick else (64, 64)
    cases = [(base, step, batch) for batch in (1, 2, 4, 8)]
    cases += [(size, step, 2) for size in (base // 2, base * 2)]
    cases += [(base, channels, 2) for channels in ((64,) if quick else (32, 96, 128))]
    found: dict[str, float] = {}
    for size, channels, batch in cases:
        shape = shapes.small(channels, size, batch=batch)
        net = networks.ready(shapes.generator(shape, device))
        x, t, y = shapes.inputs(shape, batch, device)
        with torch.inference_mode():
            took = floor.seconds(lambda net=net, x=x, t=t, y=y: net(x, t, y), device, rounds=3)  # type: ignore[misc]
        found[f"forward ms per image, {size}px, {channels} channels, batch {batch}"] = 1e3 * took / batch
    return found
