"""`inspect`: what a file of weights is; `--probe` decides by the denoising loss what its tensors cannot tell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import WEIGHTS, WEIGHTS_HELP
from .arguments import Parser

if TYPE_CHECKING:
    import torch


def main(argv: Sequence[str] | None = None, program: str = "guided-diffusion inspect") -> int:
    """`guided-diffusion inspect FILE [--probe FOLDER]`."""
    parser = Parser(program, __doc__)
    parser.add_argument("path", help="a file of weights, or the folder of a run")
    parser.flag("probe", "", "folder of images like those of its training; decides heads and schedule")
    parser.flag("probe_images", 4, "how many of them are used")
    parser.flag("image_size", 0, "for --probe, where the channel multipliers belong to no standard size")
    parser.flag("weights", "", WEIGHTS_HELP, choices=WEIGHTS)
    parser.flag("device", "auto", "auto, cpu or cuda")
    args = parser.parse_args(argv)
    if args.probe_images < 1:
        raise ValueError(f"--probe_images is {args.probe_images}; it must be at least 1")

    from . import runs

    with runs.session(args.device) as here:
        for line in report(args, here.device) if here.is_main else ():
            print(line)
    return 0


def report(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """What a file of weights is, line by line."""
    from ..runtime.doctor import format_bytes
    from ..training.memory import kept_bytes
    from ..weights import identify, load, probe
    from ..weights.files import read_weights
    from .doctor import forward_of

    found = load.find(args.path, weights=args.weights)
    tensors = read_weights(found.path, which=args.weights).tensors
    dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}))
    millions = sum(value.numel() for value in tensors.values()) / 1e6
    yield f"file        {found.path}"
    yield f"tensors     {len(tensors)}, {millions:.2f} million parameters, {dtypes}"
    config, shapes = found.config, {name: tuple(value.shape) for name, value in tensors.items()}
    if args.probe and (config is None or config.kind != "classifier"):
        known = probe.known_of(found.path, shapes, args.image_size)
        x0 = _images(args.probe, args.probe_images, int(known["image_size"]), int(known["image_channels"])).to(device)
        yield probe.verdict(probe.probe(load.fitted(tensors), known, x0))
        return
    config = config or identify.identify(found.path, shapes)
    yield f"kind        {config.kind}" + (f", after {found.step} training steps" if found.step is not None else "")
    if names := found.class_names:
        yield f"classes     {len(names)}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
    yield f"network     {identify.flag_line(config.model.to_dict())}"
    yield f"process     {identify.flag_line(config.diffusion.to_dict())}"
    flops, net = probe.forward_flops(config)
    yield f"arithmetic  {flops / 1e9:.4g} GFLOP per image and forward pass (2 per multiply-add)"
    plain = replace(config, train=replace(config.train, precision="fp32"))
    forward = forward_of(
        plain, net, "all" if getattr(plain.model, "use_checkpoint", False) else "none", next(net.parameters()).device
    )
    _, per_image = kept_bytes(forward, net.parameters())
    stored = 4 * sum(p.numel() for p in net.parameters())
    yield (
        f"memory      {format_bytes(stored)} of float32 weights; training adds about {format_bytes(per_image)} of "
        "activations per image, and 16 bytes per parameter in all"
    )


def _images(folder: str, count: int, size: int, channels: int) -> torch.Tensor:
    """The first images of a folder, float32 [N, C, H, W] in [-1, 1]."""
    import torch

    from ..data.images import center_crop, to_float
    from ..data.listing import list_records
    from ..data.sources import open_source

    records = list_records(folder, labels="none")
    reader = open_source(records.kind, records.root)
    images = [center_crop(reader.read(path, channels), size) for path in records.paths[:count]]
    return to_float(torch.stack([torch.from_numpy(image.copy()).reshape(size, size, channels) for image in images]))
