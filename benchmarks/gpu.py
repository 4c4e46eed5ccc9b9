"""On a GPU: ours in bfloat16 against the plain variant in float16, the way of 2021.

Networks are the released ones with random weights. Sampling is guided by a classifier and takes a few steps of DDIM, every
one of which costs the same; what 25 or 250 of them take follows. Utilisation is that of ours: the arithmetic that the
network needs (no recomputation counted) over the time and the machine's own best rate, alone and with the time that
all other operations' bytes take. Everything also runs on a CPU, with small networks, to see that it works; there plain is
float32, since processors without float16 arithmetic are some thirty times slower in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guided_diffusion import build
from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import Denoiser, make_denoiser
from guided_diffusion.runtime.fitting import fits, halved_until_it_fits
from guided_diffusion.runtime.world import World
from guided_diffusion.sampling.execution import Compiled, Graphed
from guided_diffusion.sampling.pipeline import compile_network
from guided_diffusion.training.losses import diffusion_loss
from guided_diffusion.training.trainer import Trainer

from . import floor, networks, shapes
from .plain_loops import PlainHalfTrainer, PlainLoops, plain_batch, plain_cond_fn
from .shapes import Batch, Shape
from .timing import Ratio, compare

Figures = dict[str, float]
Result = tuple[list[Ratio], Figures]
Step = Callable[[], object]

FEW = 4
"""Images of a small request, as the README of 2021 sampled them."""
FEW_STEPS = 25
MANY_STEPS = 4
_PARTS = 32  # to one part in so many the largest batch is found
COMPILING = 150.0
"""Seconds that torch.compile is expected to take for one network."""


class Setting(NamedTuple):
    """Where and how often to measure: rounds per pair, of which no more begin after `limit` seconds."""

    device: str
    rounds: int
    rates: networks.Rates
    limit: float = 12.0

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def plain(self) -> str:
        """What the plain variant computes in."""
        return "float16" if self.on_gpu else "float32"

    def guess(self, flops: float) -> float:
        """Seconds of a measurement whose one call of ours needs `flops`: the plain side runs at a fifth of the best rate."""
        once = flops / self.rates.flops * (5 + 2)
        return 2 * once + max(2 * once, min(self.limit, self.rounds * once))


def expected(shape: Shape, at: Setting, what: str) -> float:
    """Seconds that sampling, training, fitting or compiled parts of a shape should take, making the networks included."""
    net, critic = networks.operations(shape)
    ready = 10.0
    if what == "sampling":
        step = net + 2 * critic
        calls = (shape.batch * net, shape.batch * MANY_STEPS * step, *[FEW * FEW_STEPS * step] * 2)
        return ready + sum(map(at.guess, calls))
    if what == "compiled":
        return ready + COMPILING + at.guess(max(MANY_STEPS * shape.batch, 3 * shape.train_batch) * (net + 2 * critic))
    if what == "training":
        return ready + at.guess(3 * shape.train_batch * net) * 1.25
    assert what == "fitting", what
    return ready + 45 * shape.train_batch * 3 * net / at.rates.flops * 7


def tidy() -> None:
    """Give back what a measurement left in memory."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class Sides:
    """One shape's generator and classifier twice: ours in bfloat16, ready to sample, and the plain ones."""

    def __init__(self, shape: Shape, at: Setting) -> None:
        net, critic = shapes.generator(shape, at.device), shapes.critic(shape, at.device)
        self.plain, self.plain_critic = (shapes.plainly(part, networks.DTYPES[at.plain]) for part in (net, critic))
        self.net, self.critic = (networks.ready(part, "bfloat16") for part in (net, critic))

    def denoiser(self, process: Any, y: Tensor) -> Denoiser:
        """Ours, guided towards `y`."""
        denoise = make_denoiser(self.net, process, {"y": y})
        return guidance.classifier(denoise, process, guidance.log_prob_gradient(self.critic, y), 1.0)


def sampling(shape: Shape, at: Setting) -> Result:
    """Forward pass and guided DDIM at the shape's batch; the same for a few images, as they come and as a CUDA graph."""
    sides = Sides(shape, at)
    rows, figures = _forward(sides, shape, at)
    for batch, steps, graph in ((shape.batch, MANY_STEPS, False), (FEW, FEW_STEPS, False), (FEW, FEW_STEPS, True)):
        row, found = _guided(sides, shape, at, batch=batch, steps=steps, graph=graph)
        rows.append(row)
        figures |= found
    return rows, figures


def compiled_sampling(shape: Shape, at: Setting) -> Result:
    """Guided DDIM at the shape's batch, each of our steps through torch.compile."""
    sides = Sides(shape, at)
    row, figures = _guided(sides, shape, at, batch=shape.batch, steps=MANY_STEPS, compile=True)
    return [row], figures


def compiled_requests(shape: Shape, at: Setting) -> Result:
    """Guided DDIM for a few images, each of our steps through torch.compile and recorded as a CUDA graph."""
    sides = Sides(shape, at)
    row, figures = _guided(sides, shape, at, batch=FEW, steps=FEW_STEPS, compile=True, graph=True)
    return [row], figures


def _forward(sides: Sides, shape: Shape, at: Setting) -> Result:
    x, t, y = shapes.inputs(shape, shape.batch, at.device)
    flops, _ = networks.operations(shape)
    with torch.inference_mode():
        apart = networks.difference(sides.net(x, t, y), sides.plain(x, t, y))
        work = floor.Work(shape.batch * flops, floor.traffic(lambda: sides.net(x, t, y)))
        name = f"forward, {shape.name}, bfloat16, batch {shape.batch}"
        found = _compare(name, lambda: sides.net(x, t, y), lambda: sides.plain(x, t, y), at)
    row, figures = _used(found, work, at, f"differs {apart:.1e}")
    return [row], figures


def _guided(
    sides: Sides, shape: Shape, at: Setting, *, batch: int, steps: int, compile: bool = False, graph: bool = False
) -> tuple[Ratio, Figures]:
    """`steps` steps of guided DDIM over `batch` images."""
    how = (", compiled" if compile else "") + (", CUDA graph" if graph else "")
    name = f"guided DDIM, {steps} steps, {shape.name}, bfloat16{how}, batch {batch}"
    process = networks.short_process(shape, steps, at.device)
    x, _, y = shapes.inputs(shape, batch, at.device)
    eager = sides.denoiser(process, y)
    whole = Compiled(lambda cond: sides.denoiser(process, cond["y"]), otherwise=lambda _: eager)
    recorded = Graphed(whole({"y": y}) if compile else eager)
    denoise = recorded if graph else whole({"y": y}) if compile else eager
    loops = PlainLoops(process)

    def ours() -> Tensor:
        return samplers.last(samplers.ddim(denoise, x, process))

    def theirs() -> Tensor:
        return loops.ddim(sides.plain, x, {"y": y}, plain_cond_fn(sides.plain_critic, y, 1.0))

    begin = time.perf_counter()
    images = ours()
    figures: Figures = {f"{name}, seconds of the first call": time.perf_counter() - begin} if how else {}
    notes = [f"images differ by {float((images - theirs()).abs().max()):.1e} at most"]
    if graph and (recorded.failure is not None or not at.on_gpu):
        notes.append(f"NOT as a graph: {recorded.failure or 'there is no CUDA device'}")
    if compile and whole.failure is not None:
        notes.append(f"NOT compiled: {whole.failure}")
    net, critic = networks.operations(shape)
    once = floor.traffic(lambda: eager(x, torch.zeros(batch, dtype=torch.int64, device=at.device))) if not how else 0.0
    work = floor.Work(steps * batch * (net + 2 * critic), steps * once)
    figures |= peaks(name, ours, theirs, at)
    figures |= _quiet(name, _second_step(denoise, x, process), at)
    row, found = _used(_compare(name, ours, theirs, at), work, at, "; ".join(notes))
    return row, figures | found


def _second_step(denoise: Denoiser, x: Tensor, process: Any) -> Step:
    """A step within a chain, the first of which has been taken."""
    chain = samplers.ddim(denoise, x, process)
    next(chain)
    return lambda: next(chain)


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Updates:
    """One shape's update of all weights twice: our trainer in bfloat16, and the plain one."""

    def __init__(self, shape: Shape, at: Setting, *, compile: bool = False) -> None:
        self.shape, self.at = shape, at
        self.net = shapes.generator(shape, at.device)
        self.process = build.build_process(shape.diffusion, respacing="").to(at.device)
        self.compile = compile

    def ours(self) -> Callable[[int], object]:
        """An update on so many images, which lie in main memory as the loader has them: uint8, and pinned beside a GPU."""
        shape, at, process = (
            self.shape,
            self.at,
            self.process,
        )  # the function below must not keep `self` and its weights
        if self.compile:
            compile_network(self.net)
        loss = diffusion_loss(
            process, build.build_timesteps("uniform", len(process)), **build.loss_options(shape.config)
        )
        world = World(device=torch.device(at.device))
        trainer = Trainer(self.net, loss, iter([]), lr=1e-4, ema_rates=(0.9999,), precision="bf16", world=world)
        known: dict[int, Batch] = {}

        def step(size: int) -> object:
            if size not in known:
                known[size] = _batch(shape, size, pinned=at.on_gpu)
            return trainer.step(known[size])

        return step

    def theirs(self) -> Callable[[int], object]:
        """The plain update on float32 images that lie in main memory, on a copy of our weights as they are now."""
        shape, at, process = self.shape, self.at, self.process
        plain = shapes.plainly(self.net, networks.DTYPES[at.plain])
        trainer = PlainHalfTrainer(plain.net, plain, process, lr=1e-4, ema_rates=(0.9999,))
        known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def step(size: int) -> None:
            if size not in known:
                batch = _batch(shape, size)
                known[size] = (*plain_batch(batch.images, len(process)), batch.labels)
            x0, t, labels = (part.to(at.device) for part in known[size])
            trainer.step(x0, t, torch.randn_like(x0), {"y": labels})

        return step


def _batch(shape: Shape, size: int, pinned: bool = False) -> Batch:
    batch = shapes.training_batch(shapes.with_train_batch(shape, size))
    return Batch(batch.images.pin_memory(), batch.labels.pin_memory(), batch.positions) if pinned else batch


def training(shape: Shape, at: Setting, *, compile: bool = False) -> Result:
    """A whole update at equal batch: the shape's, or the first half, quarter ... of it that both sides have memory for."""
    updates = Updates(shape, at, compile=compile)
    theirs = updates.theirs()
    ours = updates.ours()
    figures: Figures = {}
    begin = time.perf_counter()

    def attempt(size: int) -> None:
        theirs(size)
        ours(size)

    size = halved_until_it_fits(attempt, shape.train_batch)
    if not size:
        raise torch.OutOfMemoryError(f"not one image of {shape.name} can be trained on")
    how = ", compiled" if compile else ""
    name = f"training step, {shape.name}, bf16{how}, batch {size}"
    if compile:
        figures[f"{name}, seconds of the first calls"] = time.perf_counter() - begin
    flops, _ = networks.operations(shape)
    work = floor.Work(3 * size * flops, 0.0 if compile else floor.traffic(lambda: ours(size)))
    figures |= peaks(name, lambda: ours(size), lambda: theirs(size), at)
    figures |= _quiet(name, lambda: ours(size), at)
    row, found = _used(_compare(name, lambda: ours(size), lambda: theirs(size), at), work, at, "")
    rows = [row]
    if not compile:
        again = networks.recomputing(
            name, updates.net, lambda: ours(size), rounds=at.rounds, device=at.device, limit=at.limit / 4
        )
        rows.append(again)
    return rows, figures | found


def compiled_training(shape: Shape, at: Setting) -> Result:
    """The same, our network through torch.compile."""
    return training(shape, at, compile=True)


def fitting(shape: Shape, at: Setting) -> Result:
    """The largest training batch that the memory of the GPU has room for: the plain one's, ours, ours with norms recomputed."""
    if not at.on_gpu:
        raise ImportError("the largest batch that fits is found by running out of a GPU's memory")
    found = {}
    for side in ("plain", "ours", "ours with norms recomputed"):
        tidy()
        updates = Updates(shape, at)
        updates.net.set_recompute_norms("norms" in side)
        step = updates.theirs() if side == "plain" else updates.ours()
        del updates  # of the plain side only its own copy of the weights is to stay
        tidy()
        total = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        first = max(1, shape.train_batch // 8)
        found[side] = largest_batch(lambda size, step=step: _peak(lambda: step(size)), step, total, first)  # type: ignore[misc]
        del step
    name = f"largest training batch that fits, {shape.name}"
    figures = {f"{name}, {side}": float(size) for side, size in found.items()}
    ratios = {f"{name}, {side} / plain": found[side] / max(1, found["plain"]) for side in found if side != "plain"}
    return [], figures | ratios


def largest_batch(peak: Callable[[int], float], attempt: Callable[[int], object], total: float, first: int) -> int:
    """The largest batch for which `attempt` fits into `total` bytes, to one part in `_PARTS` of it or to one image.

    `peak(size)` is how many bytes a batch needs at once. Two small ones tell where to begin to look; that can be far off,
    since the most of a small batch is reached at another moment of a step than that of a large one.
    """
    peak(first)  # what is made once: the optimizer's moments, plans of the libraries
    low, high = peak(first), peak(2 * first)
    each = max(1.0, (high - low) / first)
    size, fitting, beyond = max(1, int((total - low) / each) + first), 0, 0
    while size:
        if fits(attempt, size):
            fitting = size
            size = (fitting + beyond) // 2 if beyond else fitting + fitting // 4 + 1
        else:
            beyond = size
            size = (fitting + beyond) // 2 if fitting else beyond * 3 // 4
        if beyond and beyond - fitting <= max(1, fitting // _PARTS):
            break
    return fitting


# ---------------------------------------------------------------------------------------------------------------------
# What every row has


def _compare(name: str, ours: Step, theirs: Step, at: Setting) -> Ratio:
    return compare(
        name, ours, theirs, against=f"plain {at.plain}", rounds=at.rounds, warmup=1, device=at.device, limit=at.limit
    )


def _used(row: Ratio, work: floor.Work, at: Setting, note: str) -> tuple[Ratio, Figures]:
    """The row with its use of the machine in words, and the same as figures; no bytes counted, no figure of them."""
    took, rates = row.ours_seconds, at.rates
    figures = {f"{row.name}, share of the matrix rate": work.seconds(rates.flops) / took}
    said = f"{work.seconds(rates.flops) / took:.0%} of the floor in arithmetic"
    if work.bytes:
        figures[f"{row.name}, share of the floor with traffic"] = work.seconds(*rates) / took
        said = rates.note(work, took)
    return networks.noted(row, "; ".join(filter(None, [note, said]))), figures


def _peak(call: Step) -> float:
    """Most bytes that tensors took up during a call, on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated())


def peaks(name: str, ours: Step, theirs: Step, at: Setting) -> Figures:
    """MiB of a GPU that a call of each side takes on top of what lies there, and how many times more the plain one does."""
    if not at.on_gpu:
        return {}
    found = {}
    for side, call in (("ours", ours), ("plain", theirs)):
        call()
        there = torch.cuda.memory_allocated()
        found[side] = (_peak(call) - there) / 2**20
    figures = {f"{name}, peak MiB on top of the weights, {side}": value for side, value in found.items()}
    return figures | {f"{name}, peak memory, plain / ours": found["plain"] / max(found["ours"], 0.1)}


def _quiet(name: str, step: Step, at: Setting) -> Figures:
    """Whether the host neither waits for the GPU nor copies from pageable memory during a step (1), or does (0)."""
    if not at.on_gpu:
        return {}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        quiet = 1.0
    except RuntimeError as error:
        print(f"{name}: waits for the device: {error}", flush=True)
        quiet = 0.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {f"{name}, no wait for the device (1 = none)": quiet}
