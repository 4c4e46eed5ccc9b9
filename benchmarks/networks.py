"""Networks, the training step and guided sampling against their plain variants, and where installed against diffusers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guided_diffusion import build
from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import make_denoiser
from guided_diffusion.diffusion.process import Process, respace, space_timesteps
from guided_diffusion.runtime.world import World
from guided_diffusion.sampling.pipeline import make_ready
from guided_diffusion.training.losses import diffusion_loss
from guided_diffusion.training.measuring import recompute
from guided_diffusion.training.trainer import Trainer

from . import floor, shapes
from .plain import Plain
from .plain_loops import PlainLoops, PlainTrainer, plain_batch, plain_cond_fn
from .shapes import Shape
from .timing import Ratio, compare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Rates(NamedTuple):
    """What the machine can do at best in one number format: FLOP/s and bytes/s."""

    flops: float
    bytes: float

    def note(self, work: floor.Work, seconds: float) -> str:
        """How much of it a call made use of."""
        return work.used(seconds, *self)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    return float((a - b).abs().max() / b.abs().max())


def ready(net: Any, dtype: str = "float32") -> Any:
    """A network as sampling has it: frozen, weights in the layout and format they are used in."""
    net = net.eval().requires_grad_(False)
    net.set_compute_dtype(DTYPES[dtype], store=True)
    make_ready(net)
    return net


@cache
def operations(shape: Shape) -> tuple[float, float]:
    """FLOPs of one image through the generator and through its classifier, counted on the meta device: nothing is computed."""
    size, channels = shape.model.image_size, shape.model.image_channels
    with torch.device("meta"), torch.no_grad():
        x, t, y = torch.empty(1, channels, size, size), torch.empty(1), torch.empty(1, dtype=torch.int64)
        empty: Any = build.build_empty(shape.model, shape.diffusion), build.build_empty(shape.classifier)
        net, critic = map(Plain, empty)
        return floor.flops(lambda: net(x, t, y)), floor.flops(lambda: critic(x, t))


def forward(shape: Shape, *, device: str, rounds: int, dtype: str, rates: Rates) -> list[Ratio]:
    """One forward pass without gradients, against the plain float32 variant and the floor."""
    x, t, y = shapes.inputs(shape, shape.batch, device)
    with torch.inference_mode():
        net = shapes.generator(shape, device)
        plain = shapes.plainly(net)
        net = ready(net, dtype)
        apart = difference(net(x, t, y), plain(x, t, y))
        work = floor.Work(floor.flops(lambda: plain(x, t, y)), floor.traffic(lambda: net(x, t, y)))
        name = f"forward, {shape.name}, {dtype}, batch {shape.batch}"
        found = compare(
            name, lambda: net(x, t, y), lambda: plain(x, t, y), against="plain float32", rounds=rounds, device=device
        )
    return [noted(found, f"differs {apart:.1e}; {rates.note(work, found.ours_seconds)}")]


def noted(ratio: Ratio, note: str) -> Ratio:
    """The ratio with something said about it."""
    return replace(ratio, note=note)


def against_diffusers(shape: Shape, *, device: str, rounds: int) -> list[Ratio]:
    """One forward pass against diffusers' UNet2DModel with the same weights; nothing where it is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return []
    from guided_diffusion.weights.diffusers import arguments_for_unet2d, to_diffusers

    model, net = shape.model, shapes.generator(shape, device)
    common: dict[str, Any] = {
        "depth": model.num_res_blocks,
        "attention_ds": model.attention_downsamplings,
        "resblock_updown": model.resblock_updown,
    }
    state = to_diffusers(
        net.state_dict(),
        levels=len(model.multipliers),
        head_channels=model.num_head_channels,
        new_order=model.use_new_attention_order,
        **common,
    )
    arguments: dict[str, Any] = arguments_for_unet2d(
        image_size=model.image_size,
        in_channels=model.image_channels,
        out_channels=net.out_channels,
        model_channels=model.num_channels,
        multipliers=model.multipliers,
        attention_head_channels=model.num_head_channels,
        scale_shift=model.use_scale_shift_norm,
        num_classes=model.num_classes,
        **common,
    )
    other: Any = UNet2DModel(**arguments)
    other.load_state_dict(state)
    other = other.to(device).eval().requires_grad_(False)
    net = ready(net)
    x, t, y = shapes.inputs(shape, shape.batch, device)
    with torch.inference_mode():
        apart = difference(net(x, t, y), other(x, t, class_labels=y).sample)
        name = f"forward, {shape.name}, float32, batch {shape.batch}"
        found = compare(
            name,
            lambda: net(x, t, y),
            lambda: other(x, t, class_labels=y).sample,
            against="diffusers UNet2DModel",
            rounds=rounds,
            device=device,
        )
    return [noted(found, f"differs {apart:.1e}")]


def classifier_gradient(shape: Shape, *, device: str, rounds: int, dtype: str) -> list[Ratio]:
    """The gradient of log p(label | x) at the input: frozen weights and kept activations against neither."""
    net = shapes.critic(shape, device)
    plain = shapes.plainly(net)
    net = ready(net, dtype)
    x, t, y = shapes.inputs(shape, shape.batch, device)
    ours, theirs = guidance.log_prob_gradient(net, y), plain_cond_fn(plain, y, 1.0)
    apart = difference(ours(x, t), theirs(x, t))
    name = f"classifier gradient, {shape.name}, {dtype}, batch {shape.batch}"
    found = compare(
        name, lambda: ours(x, t), lambda: theirs(x, t), against="plain float32", rounds=rounds, device=device
    )
    return [noted(found, f"differs {apart:.1e}")]


def short_process(shape: Shape, steps: int, device: str) -> Process:
    """`steps` evenly spaced steps of the shape's process."""
    process = build.build_process(shape.diffusion, respacing="")
    return respace(process, space_timesteps(len(process), f"ddim{steps}")).to(device)


def sampling(shape: Shape, *, device: str, rounds: int, dtype: str, steps: int = 25) -> list[Ratio]:
    """Deterministic DDIM with classifier guidance: network, classifier gradient and the arithmetic between them."""
    net, critic = shapes.generator(shape, device), shapes.critic(shape, device)
    plain, plain_critic = shapes.plainly(net), shapes.plainly(critic)
    net, critic = ready(net, dtype), ready(critic, dtype)
    process = short_process(shape, steps, device)
    x, _, y = shapes.inputs(shape, shape.batch, device)
    loops = PlainLoops(process)

    def ours(k: int = steps) -> Tensor:
        denoise = make_denoiser(net, process, {"y": y})
        denoise = guidance.classifier(denoise, process, guidance.log_prob_gradient(critic, y), 1.0)
        taken = None
        with torch.inference_mode():
            for _, step in zip(range(k), samplers.ddim(denoise, x, process)):
                taken = step.x
        assert taken is not None
        return taken

    def theirs() -> Tensor:
        return loops.ddim(plain, x, {"y": y}, plain_cond_fn(plain_critic, y, 1.0))

    apart = float((ours() - theirs()).abs().max())
    name = f"guided DDIM-{steps}, {shape.name}, {dtype}, batch {shape.batch}"
    found = compare(name, ours, theirs, against="plain float32", rounds=rounds, device=device, warmup=0)
    return [noted(found, f"images differ by {apart:.1e} at most")]


def arithmetic(shape: Shape, *, device: str, rounds: int, guided: bool, steps: int = 25) -> list[Ratio]:
    """What a sampler does between network calls: the network is a constant."""
    process = short_process(shape, steps, device)
    x, _, y = shapes.inputs(shape, shape.batch, device)
    constant, gradient = torch.cat([0.1 * x, 0.1 * x], dim=1), 0.01 * x
    loops = PlainLoops(process)

    def net(*_: Any, **__: Any) -> Tensor:
        return constant

    def pull(*_: Any) -> Tensor:
        return gradient

    def ours() -> Tensor:
        denoise = make_denoiser(net, process, {"y": y})
        if guided:
            denoise = guidance.classifier(denoise, process, pull, 1.0)
        with torch.inference_mode():
            return samplers.last(samplers.ddim(denoise, x, process))

    def theirs() -> Tensor:
        return loops.ddim(net, x, {"y": y}, pull if guided else None)

    apart = float((ours() - theirs()).abs().max())
    name = f"DDIM-{steps} with a constant network{', guided' if guided else ''}, batch {shape.batch}"
    found = compare(name, ours, theirs, against="plain", rounds=max(rounds, 9), device=device, inner=5)
    return [noted(found, f"images differ by {apart:.1e} at most")]


def training(shape: Shape, *, device: str, rounds: int, precision: str, rates: Rates) -> list[Ratio]:
    """A whole update: loss, backward, AdamW, averaged weights, what is logged."""
    net = shapes.generator(shape, device)
    plain = shapes.plainly(net)
    process = build.build_process(shape.diffusion, respacing="").to(device)
    loss = diffusion_loss(process, build.build_timesteps("uniform", len(process)), **build.loss_options(shape.config))
    world = World(device=torch.device(device))
    trainer = Trainer(net, loss, iter([]), lr=1e-4, ema_rates=(0.9999,), precision=precision, world=world)
    batch = shapes.training_batch(shape, device)
    other = PlainTrainer(plain.net, plain, process, lr=1e-4, ema_rates=(0.9999,))

    def theirs() -> None:
        x0, t = plain_batch(batch.images.cpu(), len(process))
        x0, t = x0.to(device), t.to(device)
        other.step(x0, t, torch.randn_like(x0), {"y": batch.labels})

    x, t, y = shapes.inputs(shape, shape.train_batch, device)
    flops = 3 * floor.flops(lambda: _quietly(plain, x, t, y))
    trainer.step(batch)  # the first one makes the optimizer's moments
    work = floor.Work(flops, floor.traffic(lambda: trainer.step(batch)))
    name = f"training step, {shape.name}, {precision}, batch {shape.train_batch}"
    found = compare(name, lambda: trainer.step(batch), theirs, against="plain float32", rounds=rounds, device=device)
    return [noted(found, rates.note(work, found.ours_seconds))]


def less_memory(shape: Shape, *, device: str, rounds: int, precision: str) -> list[Ratio]:
    """What the ways to train with less memory cost: recomputing norms, recomputing all, a batch in parts."""
    net = shapes.generator(shape, device)
    process = build.build_process(shape.diffusion, respacing="").to(device)
    loss = diffusion_loss(process, build.build_timesteps("uniform", len(process)), **build.loss_options(shape.config))
    world = World(device=torch.device(device))
    trainer = Trainer(net, loss, iter([]), lr=1e-4, ema_rates=(0.9999,), precision=precision, world=world)
    batch = shapes.training_batch(shape, device)

    def step(what: str, parts: int) -> None:
        recompute(net, what)
        trainer.microbatch = -(-shape.train_batch // parts)
        trainer.step(batch)

    ways = {"--checkpoint norms": ("norms", 1), "--checkpoint all": ("all", 1)}
    parts = [count for count in (2, 4, 8) if count <= shape.train_batch]
    ways |= {f"--microbatch {-(-shape.train_batch // count)}": ("none", count) for count in parts}
    name = f"training step, {shape.name}, {precision}, batch {shape.train_batch}"
    return [
        compare(
            f"{name}, {flag}",
            partial(step, *way),
            partial(step, "none", 1),
            against="everything kept",
            rounds=rounds,
            device=device,
        )
        for flag, way in ways.items()
    ]


def recomputing(name: str, net: Any, step: Any, *, rounds: int, device: str, limit: float = float("inf")) -> Ratio:
    """What `--checkpoint norms` costs: a step with norms recomputed, against one that keeps everything."""

    def with_norms(recomputed: bool) -> None:
        net.set_recompute_norms(recomputed)
        step()

    try:
        return compare(
            f"{name}, norms recomputed",
            lambda: with_norms(True),
            lambda: with_norms(False),
            against="everything kept",
            rounds=rounds,
            device=device,
            limit=limit,
        )
    finally:
        net.set_recompute_norms(False)


@torch.inference_mode()
def _quietly(net: Any, *args: Any) -> None:
    net(*args)
