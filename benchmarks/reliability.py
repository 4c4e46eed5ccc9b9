"""What safety costs: saving in the background, memory of sampling, feeding, and a second process.

python -m benchmarks.reliability            # some minutes on two cores; prints markdown and, with --json FILE, writes JSON
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from .images import loader, write_pictures
from .timing import run_isolated

Figures = dict[str, float]
_NETWORK = "--image_size 16 --num_channels {width} --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 8 --num_heads 2"


def checkpoints(width: int = 32, rounds: int = 5, steps: int = 6) -> Figures:
    """`steps` steps and one save, in turns: without the save, saved in the background, saved and waited for. Medians of wall time.

    Everything (weights, two moments, one average) is copied, written and hashed. One thread.
    """
    import torch

    from guided_diffusion import build
    from guided_diffusion.config import RunConfig
    from guided_diffusion.data.loader import Batch
    from guided_diffusion.training.losses import diffusion_loss
    from guided_diffusion.training.saver import Checkpoints
    from guided_diffusion.training.trainer import Trainer

    torch.set_num_threads(1)
    words = _NETWORK.format(width=width).replace("--", "").split()
    names = {name: int(value) if value.isdigit() else value for name, value in zip(words[::2], words[1::2])}
    config = RunConfig.from_flags("diffusion", {**names, "attention_resolutions": "8"})
    process = build.build_process(config.diffusion)
    pictures = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def no_batches(start: int) -> Any:
        return iter(())

    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for mode in ("none", "background", "waiting"):
            saves = Checkpoints(f"{folder}/{mode}", background=mode == "background", keep_last=1)
            net = build.build_network(config.model, config.diffusion, seed=0)
            loss = diffusion_loss(process, build.build_timesteps("uniform", len(process)), **build.loss_options(config))
            trainers[mode] = Trainer(net, loss, no_batches, checkpoints=saves)
        spans: dict[str, list[float]] = {mode: [] for mode in trainers}
        stalls: dict[str, list[float]] = {mode: [] for mode in trainers}
        for number in range(rounds + 1):
            for mode, trainer in trainers.items():
                begin = time.perf_counter()
                if mode != "none":
                    trainer.save()
                stall = time.perf_counter() - begin
                for _ in range(steps):
                    trainer.step(Batch(pictures, None, torch.arange(4), trainer.steps_done))
                if number:  # the first round warms up
                    spans[mode].append((time.perf_counter() - begin) / steps)
                    stalls[mode].append(stall)
                assert trainer.checkpoints is not None
                trainer.checkpoints.wait()
        size = sum(path.stat().st_size for path in (Path(folder) / "waiting").iterdir()) / 2**20
    return {
        "one save, MiB": size,
        "step, no saves, s": median(spans["none"]),
        f"step, a background save every {steps}, s": median(spans["background"]),
        f"step, a save every {steps} waited for, s": median(spans["waiting"]),
        "stall of one background save, s": median(stalls["background"]),
        "stall of one save waited for, s": median(stalls["waiting"]),
    }


_SAMPLE = """
import json, resource, tempfile, torch
from guided_diffusion.sampling.generate import Job, generate
from guided_diffusion.data.images import to_uint8
with tempfile.TemporaryDirectory() as out:
    job = Job(out, {count}, (3, 64, 64), 50, to_uint8, grid=0)
    generate(lambda noise, randn_like, cond: noise.clamp(-1, 1), job, tell=lambda text: None, progress=False)
print(json.dumps({{"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}}))
"""


def memory(counts: tuple[int, int] = (1000, 4000)) -> Figures:
    """Peak memory of a process that samples few and many images of 64x64 and puts the npz together, MiB."""
    found = {f"peak memory, {count} images, MiB": run_isolated(_SAMPLE.format(count=count))["peak"] for count in counts}
    few, many = found.values()
    return {
        **found,
        "more images, MiB of pixels": (counts[1] - counts[0]) * 64 * 64 * 3 / 2**20,
        "more memory, MiB": many - few,
    }


def scaling(width: int = 32, steps: int = 15) -> Figures:
    """Images per second of the training command on one and on two processes, one thread each, the same global batch."""
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "data").mkdir()
        write_pictures(Path(work) / "data", 32, (32, 32))
        found = {}
        for size in (1, 2):
            out = Path(work) / str(size)
            words = [
                *_NETWORK.format(width=width).split(),
                "--data_dir",
                f"{work}/data",
                "--out",
                str(out),
                "--progress",
                "False",
            ]
            words += ["--global_batch_size", "16", "--max_steps", str(steps), "--log_interval", str(steps // 3)]
            _train(words, size)
            rows = [json.loads(line) for line in (out / "progress.json").read_text().splitlines()]
            found[f"images per second, {size} process{'es' if size > 1 else ''}"] = max(
                row["images_per_second"] for row in rows[1:]
            )
    one, two = found.values()
    return {**found, "two processes / one": two / one}


def _train(words: list[str], size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    jobs = []
    for rank in range(size):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if size > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "guided_diffusion", "train", *words]
        jobs.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    errors = [job.communicate(timeout=600)[1] for job in jobs]
    if any(job.returncode for job in jobs):
        raise RuntimeError("\n".join(errors))


def feeding(count: int = 48) -> Figures:
    """The loader against plain decoding of the same pictures: ratios of images per second (see `images.loader`)."""
    return {f"{row.name} / {row.other}": row.ratio for row in loader(rounds=3, count=count)}


def measure() -> dict[str, Figures]:
    """All of it, by name."""
    return {"checkpoints": checkpoints(), "sampling": memory(), "feeding": feeding(), "scaling": scaling()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="", help="also write the figures to this file")
    file = parser.parse_args().json
    found = measure()
    for name, figures in found.items():
        print(f"\n| {name} | |\n|---|---|")
        for what, value in figures.items():
            print(f"| {what} | {value:.4g} |")
    if file:
        Path(file).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
