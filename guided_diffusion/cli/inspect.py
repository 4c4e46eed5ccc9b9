"""`inspect`: what a file of weights is; `--probe` decides by the denoising loss what its tensors cannot tell."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import WEIGHTS, WEIGHTS_HELP
from .arguments import Parser

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config import RunConfig
    from ..weights.recognise import Layout


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion inspect FILE [--probe FOLDER]`."""
    parser = Parser(prog="guided-diffusion inspect", description=__doc__, allow_abbrev=False)
    parser.add_argument("path", help="a file of weights, or the folder of a run")
    parser.add_argument(
        "--probe", metavar="FOLDER", help="images like those of its training; decides heads and schedule"
    )
    parser.add_argument("--probe_images", type=int, default=4, help="how many of them are used (default 4)")
    parser.add_argument(
        "--image_size",
        type=int,
        default=0,
        help="for --probe, where the channel multipliers belong to no standard size",
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="", help=WEIGHTS_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args(argv)
    if args.probe_images < 1:
        raise ValueError(f"--probe_images is {args.probe_images}; it must be at least 1")

    from . import making, runs

    with runs.session({"device": args.device, "debug": False}) as here:
        tell = making.teller(here)
        for line in report(args, here.device, tell):
            tell(line)
    return 0


def report(args: argparse.Namespace, device: torch.device, tell: Callable[[str], None]) -> Iterator[str]:
    """What a file of weights is, line by line."""
    from ..config import classes_of
    from ..weights.files import read_weights
    from ..weights.load import find, recognise
    from ..weights.recognise import inspect_shapes

    found = find(args.path, weights=args.weights, tell=tell)
    weights = read_weights(found.path, which=args.weights, tell=tell).tensors
    millions = sum(value.numel() for value in weights.values()) / 1e6
    yield f"file        {found.path}"
    yield f"tensors     {len(weights)}, {millions:.2f} million parameters, {_dtypes(weights)}"
    config = found.config
    if args.probe and (config is None or config.kind != "classifier"):
        layout = inspect_shapes({name: tuple(value.shape) for name, value in weights.items()})
        if layout.kind != "diffusion":
            raise ValueError(
                f"--probe compares denoising losses of a diffusion model; {found.path} is a {layout.kind} network"
            )
        trials = probe(weights, layout, args.probe, args.probe_images, device, image_size=args.image_size)
        yield verdict(trials)
        return
    if config is None:
        config = recognise(found.path, weights, {}, tell=tell)
    yield from _describe(config, found.step, found.class_names if classes_of(config.model) else ())


def _dtypes(weights: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()}))


def _describe(config: RunConfig, step: int | None, class_names: Sequence[str]) -> Iterator[str]:
    from ..runtime.doctor import format_bytes
    from ..weights.identify import flag_line

    yield f"kind        {config.kind}" + (f", after {step} training steps" if step is not None else "")
    if class_names:
        yield f"classes     {len(class_names)}: {', '.join(class_names[:8])}{' …' if len(class_names) > 8 else ''}"
    yield f"network     {flag_line(config.model.to_dict())}"
    yield f"process     {flag_line(config.diffusion.to_dict())}"
    cost = cost_of(config)
    yield f"arithmetic  {cost.forward_flops / 1e9:.4g} GFLOP per image and forward pass (2 per multiply-add)"
    yield (
        f"memory      {format_bytes(cost.weight_bytes)} of float32 weights; training adds about "
        f"{format_bytes(cost.activation_bytes)} of activations per image, and 16 bytes per parameter in all"
    )


class Cost(NamedTuple):
    """What a network needs, counted on the meta device."""

    forward_flops: int  # per image
    weight_bytes: int  # float32
    activation_bytes: int  # per image, kept between forward and backward pass in float32


def cost_of(config: RunConfig) -> Cost:
    """Count one forward pass of one image without computing it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from .. import build
    from .doctor import activation_bytes

    with torch.device("meta"):
        net = build.build_network(config.model, config.diffusion)
        x = torch.empty(1, config.model.image_channels, config.model.sample_size, config.model.sample_size)
        cond: dict[str, Any] = {}
        if getattr(config.model, "class_cond", False):
            cond["y"] = torch.zeros(1, dtype=torch.int64)
        if config.kind == "super_resolution":
            small = config.model.small_size  # type: ignore[union-attr]
            cond["low_res"] = torch.empty(1, config.model.image_channels, small, small)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, torch.zeros(1), **cond)
    plain = replace(config, train=replace(config.train, precision="fp32"))
    _, per_image = activation_bytes(plain, net, "cpu")
    return Cost(counter.get_total_flops(), 4 * sum(p.numel() for p in net.parameters()), per_image)


LEVELS = (0.99, 0.9, 0.6, 0.3, 0.05)  # alpha-bar: the part of the signal in the variance of a noised image


class Trial(NamedTuple):
    """One reading of the file, and its denoising error: mean squared error of the noise, relative to its variance 1."""

    loss: float
    flags: dict[str, object]


def probe(
    weights: Mapping[str, Tensor],
    layout: Layout,
    folder: str,
    count: int,
    device: Any,
    *,
    image_size: int = 0,
    progress: bool = True,
) -> list[Trial]:
    """Every reading of heads, attention order, schedule and time scale, best first.

    A network hears a wrong reading as a wrong question: its noise estimate gets worse. All readings see the same noised images,
    at five levels of noise; each is told the step at which its schedule has that level.
    """
    import torch
    from tqdm import tqdm

    from .. import build
    from ..config import RunConfig
    from ..data.images import center_crop, to_float
    from ..data.listing import list_records
    from ..data.sources import open_source
    from ..runtime.streams import EVALUATE, Streams
    from ..training.restore import load_weights_into
    from ..weights.identify import flags_of
    from ..weights.load import fitted

    known = flags_of(layout, "diffusion", {"image_size": image_size} if image_size else {})
    if "image_size" not in known:
        raise ValueError("the channel multipliers belong to no standard image size; give --image_size")
    size, channels = int(known["image_size"]), int(known["image_channels"])
    records = list_records(folder, labels="none")
    reader = open_source(records.kind, records.root)
    pictures = [center_crop(reader.read(path, channels), size) for path in records.paths[:count]]
    images = torch.stack([torch.from_numpy(p.copy()).reshape(size, size, channels) for p in pictures])
    x0 = to_float(images).to(device)
    noise = Streams(0, EVALUATE, ids=range(len(x0)), device=device).normal(x0.shape[1:])
    candidates, tensors = list(_readings(layout)), fitted(weights)
    trials = []
    for flags in tqdm(candidates, desc="probe", unit="reading", disable=not progress):
        config = RunConfig.from_flags("diffusion", {**known, **flags})
        with torch.device("meta"):
            net = build.build_network(config.model, config.diffusion)
        load_weights_into(net, tensors, "the file", assign=True)
        net = net.to(device).eval().requires_grad_(False)
        process = build.build_process(config.diffusion)
        errors = []
        for level in LEVELS:
            i = int((process.alpha_bar - level).abs().argmin())
            time = process.time[i].expand(len(x0)).to(device)
            x, cond = level**0.5 * x0 + (1 - level) ** 0.5 * noise, {}
            if config.model.class_cond:  # type: ignore[union-attr]
                cond["y"] = torch.zeros(len(x0), dtype=torch.int64, device=device)
            with torch.no_grad():
                out = net(x, time, **cond)
            errors.append((out[:, :channels].float() - noise).square().mean())
        trials.append(Trial(float(torch.stack(errors).mean()), flags))
    return sorted(trials, key=lambda trial: trial.loss)


def _readings(layout: Layout) -> Iterator[dict[str, object]]:
    """Candidates that differ in what they compute; two ways of saying the same heads count once."""
    heads: dict[tuple[int, ...], dict[str, object]] = {}
    for text in layout.open["heads"]:
        name, value = str(text).removeprefix("--").split()
        number = int(value)
        counts = tuple(w // number if name == "num_head_channels" else number for w in layout.attention_widths)
        heads.setdefault(counts, {name: number})
    for counts, flags in heads.items():
        # With one head everywhere both orders are the same.
        orders = (False, True) if max(counts) > 1 else (False,)
        for order, schedule, scaled, steps in product(orders, ("linear", "cosine"), (False, True), (1000, 4000)):
            if scaled and steps == 1000:
                continue  # a thousand steps scaled to a thousand are themselves
            yield {
                **flags,
                "use_new_attention_order": order,
                "noise_schedule": schedule,
                "diffusion_steps": steps,
                "rescale_timesteps": scaled,
            }


# Readings whose errors differ by less than this part cannot be told apart by a few images.
_NEAR = 0.01


def verdict(trials: Sequence[Trial]) -> str:
    """The five best readings, and in which flags all that are about as good as the best agree."""
    from ..weights.identify import flag_line

    lines = [f"  {trial.loss:.4f}  {flag_line(trial.flags)}" for trial in trials[:5]]
    near = [trial.flags for trial in trials if trial.loss <= trials[0].loss * (1 + _NEAR)]
    names = list(dict.fromkeys(name for flags in near for name in flags))
    agreed = {name: near[0][name] for name in names if all(f.get(name) == near[0].get(name) for f in near)}
    open_ = [name for name in names if name not in agreed]
    lines.append(f"settled: {flag_line(agreed) or 'nothing'}")
    if open_:
        told = ", ".join(f"--{name}" for name in open_)
        lines.append(
            f"not told apart by these images: {told} ({len(near)} readings within {_NEAR:.0%}); use more images, or compare samples"
        )
    return "\n".join(["denoising error (1 = no idea at all) by reading:", *lines])
