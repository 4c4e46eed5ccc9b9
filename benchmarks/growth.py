"""How the cost of a forward pass grows with the image, the batch and the channels, and that of a run with processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

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


# One of the processes. Times are the wall's: what a process waits for the others is part of what is to be known. All
# begin together, and the slowest counts.
_CHILD = """
import json, time
import torch
torch.set_num_threads(1)
from benchmarks import networks, shapes
from guided_diffusion import build
from guided_diffusion.training.losses import diffusion_loss
from guided_diffusion.diffusion import samplers
from guided_diffusion.diffusion.denoiser import make_denoiser
from guided_diffusion.runtime import world as worlds
from guided_diffusion.training.trainer import Trainer
shape, steps = shapes.{shape}, {steps}
world = worlds.start("cpu", announce=None)
net = shapes.generator(shape)
process = build.build_process(shape.diffusion, respacing="")
loss = diffusion_loss(process, build.build_timesteps("uniform", len(process)), **build.loss_options(shape.config))
trainer = Trainer(net, loss, iter([]), lr=1e-4, ema_rates=(0.9999,), world=world)
batch = shapes.training_batch(shape)._replace(positions=torch.arange(shape.train_batch) * world.size + world.rank)
def measured(call, images):
    call()
    times, spent = [], []
    for _ in range(steps):
        world.barrier()
        begin, used = time.perf_counter(), time.process_time()
        call()
        spent.append(time.process_time() - used)
        world.barrier()
        times.append(time.perf_counter() - begin)
    return images / sorted(times)[steps // 2], sorted(spent)[steps // 2] / images
trained = measured(lambda: trainer.step(batch), shape.train_batch)
frozen, short = networks.ready(shapes.generator(shape)), networks.short_process(shape, 2, "cpu")
x, _, y = shapes.inputs(shape, shape.batch)
def sample():
    return samplers.last(samplers.ddim(make_denoiser(frozen, short, dict(y=y)), x, short))
sampled = measured(sample, shape.batch / (25 / 2))
if world.is_main:
    print(json.dumps(dict(trained=trained, sampled=sampled)))
"""


def processes(shape: str = "small()", steps: int = 5, counts: tuple[int, ...] = (1, 2)) -> dict[str, float]:
    """Training and sampling (DDIM-25 without guidance) on so many processes: images per wall second and process, CPU per image.

    Each has one thread and the same batch, whatever their number: gradients travel by gloo, sampling shares nothing. Wall
    times mean something only where every process has a core of its own; CPU seconds show what exchanging costs in work.
    """
    found: dict[str, float] = {}
    for count in counts:
        told = _together(_CHILD.format(shape=shape, steps=steps), count)
        for what, name in (("trained", "training"), ("sampled", "sampling with DDIM-25")):
            wall, spent = told[what]
            found[f"{name}, images per second and process, {count} of them, {shape}"] = wall
            found[f"{name}, CPU seconds per image, {count} processes, {shape}"] = spent
            if count > 1:
                alone = found[f"{name}, images per second and process, {counts[0]} of them, {shape}"]
                found[f"{name}, {count} processes, share of the speed of one kept by each, {shape}"] = wall / alone
    return found


def _together(code: str, count: int, timeout: float = 600) -> dict[str, list[float]]:
    """Run code in `count` processes that can find each other; the first prints one JSON object on its last line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        told = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, told):
        if process.returncode:
            raise RuntimeError(f"a measured process failed:\n{errors[-2000:]}")
    found: dict[str, list[float]] = json.loads(told[0][0].strip().splitlines()[-1])
    return found
