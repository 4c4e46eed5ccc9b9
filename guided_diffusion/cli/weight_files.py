"""`inspect`, `convert`, `features` and `zoo`: describe files of weights, convert them, compute features, list released models."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import WEIGHTS, WEIGHTS_HELP, relative_lengths
from ..runtime import storage
from ..weights import later, released
from . import runs
from .arguments import Parser, str2bool

if TYPE_CHECKING:
    import torch

FORMS = ("safetensors", "pt", "diffusers")  # a copy of weights.convert.FORMS, whose import would load torch


def inspect(argv: Sequence[str], program: str) -> int:
    """Print what a file of weights is; `--probe` finds by the denoising loss what the shapes of its tensors do not tell."""
    parser = Parser(program, inspect.__doc__)
    parser.add_argument("path", help="a file of weights, or the folder of a run")
    images = "images like the training images, from which the number of heads and the noise schedule are found"
    parser.flag("probe", "", images, metavar="FOLDER")
    parser.flag("probe_images", 4, "how many of them are used")
    parser.flag("image_size", 0, "for --probe, where the channel multipliers belong to no standard size")
    last = "whether the last row of the label embedding stands for no class, where the file does not say"
    parser.flag("null_row", None, last, type=str2bool, metavar="bool")
    parser.flag("weights", "", WEIGHTS_HELP, choices=WEIGHTS)
    parser.flag("device", "auto", "auto, cpu or cuda")
    args = parser.parse_args(argv)
    if args.probe_images < 1:
        raise ValueError(f"--probe_images is {args.probe_images}; it must be at least 1")

    with runs.session(args.device) as world:
        for line in report(args, world.device) if world.is_main else ():
            print(line)
    return 0


def report(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The lines that `inspect` prints."""
    from ..data.samples import open_images
    from ..runtime.doctor import format_bytes
    from ..training.memory import kept_bytes, set_recompute
    from ..weights import identify, load, probe
    from ..weights.files import read_weights

    file = load.find(args.path, weights=args.weights)
    tensors, _ = read_weights(file.path, which=args.weights)
    dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}))
    millions = sum(value.numel() for value in tensors.values()) / 1e6
    yield f"file        {file.path}"
    yield f"tensors     {len(tensors)}, {millions:.2f} million parameters, {dtypes}"
    config, shapes = file.config, {name: tuple(value.shape) for name, value in tensors.items()}
    told = {} if args.null_row is None else {"null_row": args.null_row}
    if args.probe and (config is None or config.kind != "classifier"):
        size = {"image_size": args.image_size} if args.image_size else {}
        known = probe.known_of(file.path, shapes, {**told, **size})
        images = open_images(args.probe, int(known["image_size"]), int(known["image_channels"]), labels="none")
        x0 = images.low_res(range(min(args.probe_images, len(images))))["low_res"].to(device)
        yield probe.verdict(probe.probe(load.fitted(tensors), known, x0))
        return
    config = config or identify.identify(file.path, shapes, flags=told)
    yield f"kind        {config.kind}" + (f", after {file.step} training steps" if file.step is not None else "")
    if names := file.class_names:
        yield f"classes     {len(names)}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
    yield f"network     {identify.flag_line(config.model.to_dict())}"
    yield f"process     {identify.flag_line(config.diffusion.to_dict())}"
    flops, net = probe.forward_flops(config)
    yield f"arithmetic  {flops / 1e9:.4g} GFLOP per image and forward pass (2 per multiply-add)"
    plain = replace(config, train=replace(config.train, precision="fp32"))
    set_recompute(net, "all" if getattr(plain.model, "use_checkpoint", False) else "none")
    forward = probe.forward_of(plain, net, next(net.parameters()).device)
    _, per_image = kept_bytes(forward, net.parameters())
    stored = 4 * sum(p.numel() for p in net.parameters())
    yield (
        f"memory      {format_bytes(stored)} of float32 weights; training adds about {format_bytes(per_image)} of "
        "activations per image, and 16 bytes per parameter in all"
    )


def convert(argv: Sequence[str], program: str) -> int:
    """Write weights in another format (safetensors, diffusers' UNet2DModel), and measure the largest difference of the outputs."""
    parser = Parser(program, convert.__doc__)
    parser.add_argument("source", help="weights: .pt, .safetensors, a run folder, or a folder that diffusers wrote")
    parser.add_argument("target", help="NAME.safetensors, NAME.pt, or a folder for --to diffusers")
    parser.flag("to", "", "the format; default: by the target's name", choices=FORMS)
    parser.flag("noise_schedule", "linear", "noise schedule of a diffusers source, which does not store it")
    parser.flag("weights", "", WEIGHTS_HELP, choices=WEIGHTS)
    args = parser.parse_args(argv)

    from ..runtime.log import setup_messages
    from ..weights import convert as converting

    setup_messages()
    form = converting.form_of(args.target, args.to)
    options = {"noise_schedule": args.noise_schedule, "weights": args.weights}
    difference = converting.convert(args.source, args.target, form, **options)
    print(f"{args.source} -> {args.target} ({form}); largest output difference on the same input: {difference:.3g}")
    return 0


def ema(argv: Sequence[str], program: str) -> int:
    """Make averages of a run's weights, of any length, from the snapshots that training with --ema_sigma_rel kept."""
    parser = Parser(program, ema.__doc__)
    parser.flag("run", "", "run folder", required=True)
    parser.flag("sigma_rel", "", "lengths as shares of the training, such as 0.05,0.10,0.15", required=True)
    parser.flag("step", 0, "the step at which they end; 0 = the newest with snapshots")
    parser.flag("out", "", "folder for the files of weights; empty = ema in the run folder")
    args = parser.parse_args(argv)
    lengths = relative_lengths(args.sigma_rel, "sigma_rel")
    if not lengths:
        raise ValueError(f"--sigma_rel is {args.sigma_rel!r}; give at least one length, such as 0.05,0.1")

    from ..runtime.log import setup_messages
    from ..weights.averaging import reconstruct

    setup_messages()
    folder = storage.expand(args.run)
    out = storage.expand(args.out) or storage.join(folder, "ema")
    for path, error in reconstruct(folder, lengths, out, step=args.step):
        print(f"{path}: profile within {error:.2%}")
    return 0


def features(argv: Sequence[str], program: str) -> int:
    """Write a classifier's features of clean images as an npz that the evaluation suite scores (`--features npz`): `features`,
    `predicted` (classes), and the labels `arr_1` if the images have any."""
    parser = Parser(program, features.__doc__)
    parser.add_argument("images", help="a folder of images, or an npz with arr_0")
    parser.flag("classifier_path", "", "weights of a classifier, or the folder of its run", required=True)
    parser.flag("out", "", "the npz to write", required=True)
    parser.flag("batch_size", 64, "images per pass")
    parser.flag("device", "auto", "auto, cpu or cuda")
    args = parser.parse_args(argv)

    from ..sampling.features import write_features
    from ..weights.load import load

    with runs.session(args.device) as world:
        classifier = load(args.classifier_path, kind="classifier", device=world.device)
        if world.is_main:
            write_features(classifier, args.images, args.out, args.batch_size)
    return 0


def zoo(argv: Sequence[str], program: str) -> int:
    """List, describe or download the fifteen models released in 2021: what they are, their files, their published scores.

    `later`: scores that others published for them since, by other sampling or guidance.
    """
    parser = Parser(program, zoo.__doc__)
    actions = ("list", "show", "get", "later")
    parser.add_argument("action", nargs="?", default="list", choices=actions, help="what to do (default list)")
    parser.add_argument("name", nargs="?", default="", help="a model's name, for show and get")
    parser.flag("cache", "", "folder of downloads (default: $GUIDED_DIFFUSION_CACHE or ~/.cache/guided_diffusion)")
    args = parser.parse_args(argv)
    listings = {"list": released.listing, "later": later.listing}
    if args.action in listings:
        if args.name:
            raise ValueError(
                f"zoo {args.action} takes no name, and {args.name!r} is given; zoo show has one model's figures"
            )
        print(listings[args.action]())
        return 0
    if not args.name:
        raise ValueError(f"zoo {args.action} needs a name; there are {', '.join(released.PRESETS)}")
    preset = released.get(args.name)
    if args.action == "show":
        print(released.describe(preset))
        return 0

    from ..runtime.log import setup_messages

    setup_messages()
    print(released.fetch(preset, args.cache or storage.cache_folder()))
    return 0
