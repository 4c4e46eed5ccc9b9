"""This package's networks on the machine at hand, and what its choices (number format, recomputation, compiling) bring there.

Weights are random. On a GPU sampling and training compute in bfloat16; on a CPU in float32, and in bfloat16 as well where
the processor has instructions for it. Everything runs on both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from .shapes import Shape
from .timing import Plan, Row, compare

if TYPE_CHECKING:
    from torch import Tensor, nn

    from guided_diffusion import Loaded

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}

# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def forward(shape: Shape, plan: Plan) -> list[Row]:
    """One forward pass of the frozen network, on a CPU in float32 and in bfloat16."""
    import torch

    x, t, y = inputs(shape, shape.batch, plan.device)
    flops, _ = operations(shape)
    ways: dict[str, Callable[[], Tensor]] = {}
    for dtype in formats(plan) if plan.on_gpu else PRECISIONS:
        net = ready(shape, "diffusion", plan.device, dtype).net
        ways[dtype] = partial(_inferred, net, x, t, y)
    with torch.inference_mode():
        floor = {dtype: shape.batch * flops / plan.best_rate(dtype) for dtype in ways}
        return compare(f"forward, {shape.name}, batch {shape.batch}", ways, plan, floor=floor)


def sampling(shape: Shape, plan: Plan) -> Iterator[Row]:
    """Deterministic DDIM guided by the classifier, at the shape's batch and for a few images; on a GPU as CUDA graphs too."""
    if not plan.on_gpu:
        ways = {dtype: sampler(shape, plan.device, shape.batch, plan.steps, dtype) for dtype in formats(plan)}
        yield from compare(f"guided DDIM, {plan.steps} steps, {shape.name}, batch {shape.batch}", ways, plan)
        return
    for batch, steps in plan.requests(shape):
        make = partial(sampler, shape, plan.device, batch, steps)
        ways = {"eager": make(), "CUDA graph": make(graphs=True)}
        yield from compare(f"guided DDIM, {steps} steps, {shape.name}, bfloat16, batch {batch}", ways, plan)


def training(shape: Shape, plan: Plan) -> Iterator[Row]:
    """A whole update, and what it costs to keep less in memory: activations recomputed, the batch in parts."""
    for dtype in formats(plan):
        trainer, batch = updates(shape, plan.device, dtype)
        from guided_diffusion.training.memory import set_recompute

        def step(recomputed: str, microbatch: int, trainer: Any = trainer, batch: Any = batch) -> None:
            set_recompute(trainer.net, recomputed)
            trainer.microbatch = microbatch
            trainer.step(batch)

        ways = {"all kept": partial(step, "none", 0)}
        ways |= {f"--recompute {name}": partial(step, name, 0) for name in ("norms", "all")}
        parts = {shape.train_batch // count for count in (2, 4)} - {0}
        ways |= {f"--microbatch {size}": partial(step, "none", size) for size in sorted(parts, reverse=True)}
        floor = dict.fromkeys(ways, 3 * shape.train_batch * operations(shape)[0] / plan.best_rate(dtype))
        what = f"training step, {shape.name}, {dtype}, batch {shape.train_batch}"
        yield from compare(what, ways, plan, floor=floor)


def largest(shape: Shape, plan: Plan) -> Iterator[Row]:
    """On a GPU: the largest batch of a training step without microbatches, with each --recompute."""
    import torch

    from guided_diffusion.training.memory import set_recompute

    if not plan.on_gpu:
        raise ImportError("memory runs out without an error on a CPU; --device cuda")
    trainer, _ = updates(shape, plan.device, "bfloat16")
    for name in ("none", "norms", "all"):
        set_recompute(trainer.net, name)

        def step(count: int) -> int:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            trainer.step(batch_of(shape, plan.device, count))
            plan.wait()
            return torch.cuda.max_memory_allocated()

        step(1)  # moments and copies of the weights are there from now on
        free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        count, tried = most_that_fits(step, shape.train_batch, free + held)
        begin = time.perf_counter()
        step(count)
        note = f"{1e3 * (time.perf_counter() - begin) / count:.2f} ms an image; {tried} sizes tried"
        yield Row(f"largest training batch, {shape.name}, bfloat16: --recompute {name}", count, "images", note=note)


def most_that_fits(peak: Callable[[int], int], few: int, room: int) -> tuple[int, int]:
    """(the largest count, to within 4 %, with which `peak(count)` bytes do not run out of memory; how many were tried).

    What fits by the peaks of `few` and of half as many is tried first, then 4 % less, until one does not run out.
    """
    import torch

    few = max(2, few)
    first, second = peak(few // 2), peak(few)
    each = max(1, (second - first) // (few - few // 2))
    count, tried = max(1, few + (room - second) // each), 2
    while count > 1:
        tried += 1
        try:
            peak(count)
            break
        except torch.OutOfMemoryError:
            count = min(count - 1, int(0.96 * count))
    return count, tried


def compiled_forward(shape: Shape, plan: Plan) -> Iterator[Row]:
    """What torch.compile adds to a forward pass."""
    from guided_diffusion.runtime.compiler import compile_network

    for dtype in formats(plan):
        ways = {}
        for name in ("eager", "compiled"):
            net = ready(shape, "diffusion", plan.device, dtype).net
            if name == "compiled":
                compile_network(net)
            ways[name] = partial(_inferred, net, *inputs(shape, shape.batch, plan.device))
        floor = dict.fromkeys(ways, shape.batch * operations(shape)[0] / plan.best_rate(dtype))
        yield from compare(f"forward, {shape.name}, {dtype}, batch {shape.batch}", ways, plan, floor=floor)


def compiled(shape: Shape, plan: Plan) -> Iterator[Row]:
    """What torch.compile adds to guided sampling, on a GPU with and without CUDA graphs."""
    for batch, steps in plan.requests(shape) if plan.on_gpu else ((shape.batch, 2),):
        for dtype in formats(plan):
            make = partial(sampler, shape, plan.device, batch, steps, dtype)
            ways = {"eager": make(), "compiled": make(compile=True)}
            if plan.on_gpu:
                ways["compiled, CUDA graph"] = make(compile=True, graphs=True)
            yield from compare(f"guided DDIM, {steps} steps, {shape.name}, {dtype}, batch {batch}", ways, plan)


def compiled_training(shape: Shape, plan: Plan) -> Iterator[Row]:
    """What torch.compile adds to a whole update."""
    for dtype in formats(plan):
        sides = {name: updates(shape, plan.device, dtype, compile=name == "compiled") for name in ("eager", "compiled")}
        ways = {name: partial(trainer.step, batch) for name, (trainer, batch) in sides.items()}
        yield from compare(f"training step, {shape.name}, {dtype}, batch {shape.train_batch}", ways, plan)


def diffusers(shape: Shape, plan: Plan) -> list[Row]:
    """One forward pass against the UNet2DModel of diffusers with the same weights, converted by `guided-diffusion convert`."""
    import tempfile

    import torch
    from diffusers import UNet2DModel

    import guided_diffusion as gd
    from guided_diffusion.cli.main import main

    dtype = "bfloat16" if plan.on_gpu else "float32"
    with tempfile.TemporaryDirectory() as folder:
        gd.save(ready(shape, "diffusion", "cpu"), f"{folder}/ours")
        if main(["convert", f"{folder}/ours", f"{folder}/theirs", "--to", "diffusers"]):
            raise RuntimeError("`guided-diffusion convert --to diffusers` failed; what it said is above")
        options: Any = {"torch_dtype": getattr(torch, dtype), "low_cpu_mem_usage": False}
        theirs: Any = UNet2DModel.from_pretrained(f"{folder}/theirs", **options)
    theirs = theirs.to(plan.device).eval().requires_grad_(False)
    ours = ready(shape, "diffusion", plan.device, dtype).net
    x, t, y = inputs(shape, shape.batch, plan.device)

    def their_forward() -> Tensor:
        with torch.inference_mode():
            return theirs(x.to(theirs.dtype), t, class_labels=y).sample

    ways = {"diffusers UNet2DModel": their_forward, "this package": lambda: _inferred(ours, x, t, y)}
    return compare(f"forward, {shape.name}, {dtype}, batch {shape.batch}", ways, plan)


# ---------------------------------------------------------------------------------------------------------------------
# How it is made


def formats(plan: Plan) -> tuple[str, ...]:
    """Number formats worth measuring: bfloat16 alone on a GPU, and on a CPU only where it is faster there."""
    if plan.on_gpu:
        return ("bfloat16",)
    return tuple(PRECISIONS) if plan.best_rate("bfloat16") > plan.best_rate("float32") else ("float32",)


def stir(net: nn.Module, seed: int = 0) -> None:
    """Random weights of usual size everywhere; a fresh network ends in zeros, which would make half of it trivial."""
    import torch

    device = next(net.parameters()).device
    source = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=source, device=device)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))


def made(shape: Shape, kind: str, device: str) -> Loaded:
    """The shape's generator ("diffusion") or its "classifier", with random weights that ask for gradients."""
    import torch

    import guided_diffusion as gd

    config: Any = gd.RunConfig.from_flags(kind, shape.model if kind == "diffusion" else shape.classifier)
    with torch.device(device):  # hundreds of millions of numbers are drawn faster where they are needed
        net: Any = (
            gd.build_model(config.model, config.diffusion) if kind == "diffusion" else gd.build_classifier(config.model)
        )
    if device != "meta":
        stir(net)
    return gd.Loaded(net, gd.build_process(config.diffusion, respacing="").to(device), config, "")


def ready(shape: Shape, kind: str, device: str, dtype: str = "float32") -> Loaded:
    """The same as sampling has it: frozen, computing in `dtype`, weights laid out as convolutions read them."""
    import torch

    from guided_diffusion.sampling.pipeline import make_ready

    found: Any = made(shape, kind, device)
    found.net.eval().requires_grad_(False).set_compute_dtype(getattr(torch, dtype), store=dtype != "float32")
    make_ready(found.net)
    return found


def operations(shape: Shape) -> tuple[float, float]:
    """FLOPs of one image through the generator and through its classifier, counted on the meta device: nothing is computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for kind in ("diffusion", "classifier"):
        net = made(shape, kind, "meta").net
        x, t, y = (part.to("meta") for part in inputs(shape, 1, "cpu"))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, t, y) if kind == "diffusion" else net(x, t)
        counts.append(float(counter.get_total_flops()))
    return counts[0], counts[1]


def inputs(shape: Shape, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [B, 3, H, W], times and labels."""
    import torch

    size = shape.model["image_size"]
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
    return x.to(device), torch.linspace(3, 900, batch, device=device), torch.arange(batch, device=device)


def _inferred(net: Any, *args: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        return net(*args)


def sampler(
    shape: Shape,
    device: str,
    batch: int,
    steps: int,
    dtype: str = "bfloat16",
    *,
    compile: bool = False,
    graphs: bool = False,
) -> Callable[[], Tensor]:
    """A call that samples `batch` images with `steps` steps of guided DDIM, the way `sample` does."""

    import guided_diffusion as gd
    from guided_diffusion.diffusion.updates import fresh_noise

    model, classifier = (ready(shape, kind, device, dtype) for kind in ("diffusion", "classifier"))
    process = gd.build_process(model.config.diffusion, respacing=f"ddim{steps}").to(device)
    guidance = gd.classifier(classifier, scale=1.0)
    sample = gd.make_pipeline(model, process=process, guidance=guidance, sampler="ddim", compile=compile, graphs=graphs)
    x, _, y = inputs(shape, batch, device)
    return lambda: sample(x, fresh_noise, {"y": y})


def updates(shape: Shape, device: str, dtype: str, *, compile: bool = False) -> tuple[Any, Any]:
    """A trainer and the batch to train on, which lies in main memory as the loader has it (pinned beside a GPU)."""
    import torch

    import guided_diffusion as gd
    from guided_diffusion import build
    from guided_diffusion.runtime.compiler import compile_network
    from guided_diffusion.runtime.world import World
    from guided_diffusion.training.losses import diffusion_loss

    model = made(shape, "diffusion", device)
    if compile:
        compile_network(model.net)
    timesteps = build.build_timesteps("uniform", len(model.process))
    loss = diffusion_loss(model.process, timesteps, **build.loss_options(model.config))
    world = World(device=torch.device(device))
    trainer = gd.Trainer(model.net, loss, iter([]), ema_rates=(0.9999,), precision=PRECISIONS[dtype], world=world)
    return trainer, batch_of(shape, device, shape.train_batch)


def batch_of(shape: Shape, device: str, count: int) -> Any:
    """Noise as the loader gives images: in main memory, pinned beside a GPU."""
    import torch

    from guided_diffusion.data.loader import Batch

    size = shape.model["image_size"]
    images, labels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8), torch.arange(count) % 1000
    if device.startswith("cuda"):
        images, labels = images.pin_memory(), labels.pin_memory()
    return Batch(images, labels, torch.arange(count), 0)


def tidy() -> None:
    """Give back what a measurement left in memory."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
