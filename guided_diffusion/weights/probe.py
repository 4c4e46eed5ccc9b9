"""Choose among the configurations (readings) that fit a file by the denoising loss of each. Count the operations of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .. import build
from ..config import ModelConfig, Network, RunConfig, SuperResConfig, classes_of
from ..models.kernels import norm
from ..runtime.devices import choose_precision, compute_in
from ..runtime.streams import EVALUATE, Streams
from .identify import flag_line, flags_of
from .load import network_of
from .recognise import OPEN, Layout, Shapes, inspect_shapes

LEVELS = (0.99, 0.9, 0.6, 0.3, 0.05)  # alpha-bar: the part of the signal in the variance of a noised image


class Trial(NamedTuple):
    """One reading of the file as flags, and its loss: mean squared error of the predicted noise (whose variance is 1)."""

    loss: float
    flags: dict[str, object]


def known_of(path: str, shapes: Shapes, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The flags that a diffusion model's shapes fix, and of `flags` what `identify.flags_of` reads (`image_size`, `null_row`)."""
    layout = inspect_shapes(shapes)
    if layout.kind != "diffusion":
        raise ValueError(f"--probe compares denoising losses of a diffusion model; {path} is a {layout.kind} network")
    known = flags_of(layout, flags or {}, path)
    if "image_size" not in known:
        raise ValueError("the channel multipliers belong to no standard image size; give --image_size")
    return known


def probe(tensors: Mapping[str, Tensor], known: Mapping[str, Any], x0: Tensor) -> list[Trial]:
    """The loss of every reading of heads, attention order, noise schedule and time scale, best first.

    tensors  of the file, as from `load.fitted`
    known    as `known_of`
    x0       images like those of the network's training, float32 [N, C, H, W] in [-1, 1], on the device to compute on

    Under a wrong reading the network predicts the noise worse. All readings get the same noised images, at five noise levels, each
    with the time step at which the reading's schedule has that level.
    """
    noise = Streams(0, EVALUATE, ids=range(len(x0)), device=x0.device).normal(x0.shape[1:])
    layout, trials = inspect_shapes({name: tuple(value.shape) for name, value in tensors.items()}), []
    for flags in tqdm(list(readings(layout)), desc="probe", unit="reading"):
        config = RunConfig.from_flags("diffusion", {**known, **flags})
        assert isinstance(config.model, ModelConfig)
        net = network_of(config, tensors, "the file").to(x0.device)
        process = build.build_process(config.diffusion)
        cond = {"y": torch.zeros(len(x0), dtype=torch.int64, device=x0.device)} if config.model.class_cond else {}
        errors = []
        for level in LEVELS:
            i = int((process.alpha_bar - level).abs().argmin())
            time = process.time[i].expand(len(x0)).to(x0.device)
            with torch.no_grad():
                out = net(level**0.5 * x0 + (1 - level) ** 0.5 * noise, time, **cond)
            errors.append((out[:, : x0.shape[1]].float() - noise).square().mean())
        trials.append(Trial(float(torch.stack(errors).mean()), flags))
    return sorted(trials, key=lambda trial: trial.loss)


def readings(layout: Layout) -> Iterator[dict[str, object]]:
    """All readings that differ in what they compute; two flags for the same heads count once."""
    by_count: dict[tuple[int, ...], dict[str, object]] = {}
    for name, number in layout.open[0]:
        counts = tuple(w // number if name == "num_head_channels" else number for w in layout.attention_widths)
        by_count.setdefault(counts, {name: number})
    for counts, values in product(by_count, product(*OPEN.values())):
        flags = {**by_count[counts], **dict(zip(OPEN, values))}
        # With one head both attention orders are the same; rescaling 1000 steps to 1000 changes nothing.
        one_head = flags["use_new_attention_order"] and max(counts) == 1
        if not one_head and not (flags["rescale_timesteps"] and flags["diffusion_steps"] == 1000):
            yield flags


# Readings whose losses differ by less than this fraction cannot be told apart with a few images.
_NEAR = 0.01


def verdict(trials: Sequence[Trial]) -> str:
    """A report: the five best readings, and the flags in which all readings within `_NEAR` of the best agree."""
    lines = [f"  {trial.loss:.4f}  {flag_line(trial.flags)}" for trial in trials[:5]]
    near = [trial.flags for trial in trials if trial.loss <= trials[0].loss * (1 + _NEAR)]
    names = dict.fromkeys(name for flags in near for name in flags)
    agreed = {name: near[0][name] for name in names if all(f.get(name) == near[0].get(name) for f in near)}
    lines.append(f"settled: {flag_line(agreed) or 'nothing'}")
    open_ = [f"--{name}" for name in names if name not in agreed]
    if open_:
        lines.append(
            f"not told apart by these images: {', '.join(open_)} ({len(near)} readings within {_NEAR:.0%}); "
            "use more images, or compare samples"
        )
    return "\n".join(["denoising error (1 = no idea at all) by reading:", *lines])


def conditions(model: Network, x: Tensor) -> dict[str, Tensor]:
    """Conditioning of a network for images `x`: first and last class in turn; as low-resolution input every k-th pixel of `x`."""
    found: dict[str, Tensor] = {}
    if getattr(model, "class_cond", False):
        found["y"] = torch.arange(len(x), device=x.device) % 2 * max(0, classes_of(model) - 1)
    if isinstance(model, SuperResConfig):
        every = model.large_size // model.small_size
        found["low_res"] = x[:, :, ::every, ::every].contiguous()
    return found


def forward_of(config: RunConfig, net: nn.Module, device: torch.device) -> Callable[[int], Any]:
    """A function that runs `net` (perhaps on the meta device) on n images of noise, as training on `device` would."""
    model, net_device = config.model, next(net.parameters()).device
    if device.type == "cuda" and hasattr(net, "set_fused_norm") and not norm.available():
        net.set_fused_norm(False)  # type: ignore[operator]
    compute_in(net, choose_precision(config.train.precision, model.fp16, device))

    def forward(count: int) -> Any:
        x = torch.randn(count, model.image_channels, *model.size, device=net_device)
        return net(x.contiguous(memory_format=torch.channels_last), x.new_zeros(count), **conditions(model, x))

    return forward


def forward_flops(config: RunConfig) -> tuple[int, nn.Module]:
    """(floating-point operations of one forward pass of one image, the network); a U-Net is on the meta device, so nothing is computed."""
    model = config.model
    net = build.build_empty(model, config.diffusion)
    x = torch.zeros(1, model.image_channels, *model.size, device=next(net.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, x.new_zeros(1), **conditions(model, x))
    return counter.get_total_flops(), net
