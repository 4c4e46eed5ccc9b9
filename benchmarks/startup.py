"""What is paid once, and memory: import, building and loading a network, peak memory of training and sampling.

Each figure is measured in fresh processes, whose peak is the operating system's own count (VmHWM, else ru_maxrss).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from statistics import median
from typing import Any

from .timing import run_isolated

_IMPORT = """
import json, time
{before}
begin = time.process_time()
{what}
print(json.dumps(dict(seconds=time.process_time() - begin)))
"""

_PEAK = """
def peak():
    try:  # Linux; ru_maxrss would also count what the parent had when it made this process
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""

_COMMON = """
import json, resource, time
import torch
torch.set_num_threads(1)
from benchmarks import networks, shapes
from benchmarks.plain_loops import PlainLoops, PlainTrainer, plain_batch, plain_cond_fn
shape = shapes.{shape}
{peak}
def forget():
    try:  # Linux: the peak counts from now on
        with open("/proc/self/clear_refs", "w") as file: file.write("5")
    except OSError:
        pass
    return peak()
""".replace("{peak}", _PEAK)

_TRAIN = """
from guided_diffusion import build
from guided_diffusion.training.losses import diffusion_loss
from guided_diffusion.weights.load import load
from guided_diffusion.training.trainer import Trainer
net = shapes.generator(shape)
process = build.build_process(shape.diffusion, respacing="")
batch = shapes.training_batch(shape)
loss = diffusion_loss(process, build.build_timesteps("uniform", len(process)), **build.loss_options(shape.config))
{checkpoint}
ours = {ours}
if ours:
    trainer = Trainer(net, loss, iter([]), lr=1e-4, ema_rates=(0.9999,))
    step = lambda: trainer.step(batch)
else:
    from benchmarks.plain import Plain
    other = PlainTrainer(net, Plain(net), process, lr=1e-4, ema_rates=(0.9999,))
    def step():
        x0, t = plain_batch(batch.images, len(process))
        other.step(x0, t, torch.randn_like(x0), dict(y=batch.labels))
before = forget()
step(); step()
print(json.dumps(dict(peak_mib=peak(), before_mib=before)))
"""

_SAMPLE = """
from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import make_denoiser
net, critic = shapes.generator(shape), shapes.critic(shape)
process = networks.short_process(shape, 25, "cpu")
x, _, y = shapes.inputs(shape, shape.batch)
if {ours}:
    net, critic = networks.ready(net), networks.ready(critic)
    denoise = make_denoiser(net, process, dict(y=y))
    denoise = guidance.classifier(denoise, process, guidance.log_prob_gradient(critic, y), 1.0)
    steps = samplers.ddim(denoise, x, process)
    def run():
        with torch.inference_mode(): next(steps)
else:
    from benchmarks.plain import Plain
    loops = PlainLoops(process)
    loops.steps = 1
    def run(): loops.ddim(Plain(net), x, dict(y=y), plain_cond_fn(Plain(critic), y, 1.0))
before = forget()
run(); run()
print(json.dumps(dict(peak_mib=peak(), before_mib=before)))
"""

_LOAD = """
from guided_diffusion import build
from guided_diffusion.training.losses import diffusion_loss
from guided_diffusion.weights.load import load
path = {path!r}
from guided_diffusion.runtime import storage
from guided_diffusion.training import weights
torch.load(path, mmap=True, weights_only=True)
begin = time.process_time()
if {ours}:
    net = load(path, flags={flags!r}, tell=lambda text: None).net
else:
    net = build.build_model(shape.model, shape.diffusion)
    with open(path, "rb") as file:
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=False))
    net.eval()
took = time.process_time() - begin
print(json.dumps(dict(seconds=took, parameters=sum(p.numel() for p in net.parameters()))))
"""


def import_time(rounds: int = 5) -> dict[str, float]:
    """Milliseconds to import the package, and everything of it that sampling needs, after torch and numpy are there."""
    public = "import guided_diffusion; dir(guided_diffusion)"
    whole = "from guided_diffusion import build"
    found = {}
    for name, what in (("import guided_diffusion", public), ("import guided_diffusion.build", whole)):
        code = _IMPORT.format(before="import torch, numpy", what=what)
        found[f"{name}, net of torch, ms"] = 1e3 * median(run_isolated(code)["seconds"] for _ in range(rounds))
    code = _IMPORT.format(before="", what=public)
    found["import guided_diffusion with nothing loaded before, ms"] = 1e3 * median(
        run_isolated(code)["seconds"] for _ in range(rounds)
    )
    code = _IMPORT.format(before="", what="import torch")
    found["import torch, ms"] = 1e3 * median(run_isolated(code)["seconds"] for _ in range(rounds))
    return found


def memory(shape: str = "small()") -> dict[str, float]:
    """Peak MiB of two training steps and of two guided sampling steps above what the process had before; ratios."""
    found: dict[str, float] = {}
    plans = {
        "training step": _TRAIN.format(ours="{ours}", checkpoint=""),
        "training step with --use_checkpoint True": _TRAIN.format(
            ours="{ours}",
            checkpoint="for m in net.modules():\n    if hasattr(m, 'use_checkpoint'): m.use_checkpoint = True",
        ),
        "training step with --checkpoint norms": _TRAIN.format(ours="{ours}", checkpoint="net.set_recompute_norms()"),
        "guided sampling": _SAMPLE,
    }
    plain: dict[str, float] = {}
    for name, code in plans.items():
        sides = (True,) if " with " in name else (True, False)
        for ours in sides:
            told = run_isolated(_COMMON.format(shape=shape) + code.replace("{ours}", str(ours)))
            above = told["peak_mib"] - told["before_mib"]
            found[f"{name}, {'ours' if ours else 'plain'}, MiB above the network and imports"] = above
            if not ours:
                plain[name] = above
        key = name.split(" with ")[0]
        ours_above = found[f"{name}, ours, MiB above the network and imports"]
        found[f"{name}, plain / ours"] = plain[key] / max(ours_above, 0.1)
    return found


def loading(shape: str = "small()", rounds: int = 3) -> dict[str, float]:
    """Seconds of CPU from a file on disk to a network that answers: build with random weights and fill, against ours."""
    import torch

    from . import shapes

    chosen: Any = eval(f"shapes.{shape}", {"shapes": shapes})
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pt")
        torch.save(shapes.generator(chosen).state_dict(), path)
        flags = {**chosen.model.to_dict(), **chosen.diffusion.to_dict()}
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            for ours in (True, False):
                code = _LOAD.format(path=path, flags=flags, ours=ours)
                times[ours].append(run_isolated(_COMMON.format(shape=shape) + code)["seconds"])
    ours_ms, plain_ms = 1e3 * median(times[True]), 1e3 * median(times[False])
    return {
        "build and load, ours, ms": ours_ms,
        "build and load, plain, ms": plain_ms,
        "build and load, plain / ours": plain_ms / ours_ms,
    }


_DEMO = """
import json, resource, sys, time
{peak}
begin, cpu = time.perf_counter(), time.process_time()
from guided_diffusion.cli.main import main
code = main({words!r})
assert code == 0, code
print()
print(json.dumps(dict(seconds=time.perf_counter() - begin, cpu_seconds=time.process_time() - cpu,
                      peak_mib=peak())))
""".replace("{peak}", _PEAK)


def demo(quick: bool = True) -> dict[str, float]:
    """Wall and CPU seconds and peak MiB of the demo, its parts' seconds as it tells them itself."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        words = ["demo", "--out", folder, "--device", "cpu", *(["--quick"] if quick else [])]
        told = run_isolated(_DEMO.format(words=words), 3600)
        with open(os.path.join(folder, "scores.json"), encoding="utf-8") as file:
            parts = json.load(file)["seconds"]
    found = {"demo, wall seconds": told["seconds"], "demo, CPU seconds": told["cpu_seconds"]}
    found["demo, peak MiB of the process"] = told["peak_mib"]
    laps = parts.items() if isinstance(parts, dict) else parts
    found.update({f"demo, {name}, seconds": float(value) for name, value in laps})
    return found


def python() -> str:
    """The interpreter all fresh processes use."""
    return subprocess.list2cmdline([sys.executable])
