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


def checkpoints(width: int = 64, steps: int = 12, every: int = 4) -> Figures:
    """Seconds per step without saves, with saves in the background and with saves that are waited for; and what one save stalls.

    The steps of a save are timed with the save; everything (weights, two moments, one average) is written and hashed.
    """
    import torch

    from guided_diffusion import build
    from guided_diffusion.config import RunConfig
    from guided_diffusion.data.loader import Batch
    from guided_diffusion.training.saver import Checkpoints
    from guided_diffusion.training.trainer import Trainer

    flags = {
        "image_size": 16,
        "num_channels": width,
        "num_res_blocks": 1,
        "channel_mult": "1,2",
        "attention_resolutions": "8",
    }
    config = RunConfig.from_flags("diffusion", {**flags, "num_heads": 2})
    process = build.build_process(config.diffusion)
    pictures = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def run(mode: str) -> tuple[list[float], list[float], float]:
        with (
            tempfile.TemporaryDirectory() as folder,
            Checkpoints(folder, background=mode == "background", keep_last=1) as saves,
        ):
            net = build.build_network(config.model, config.diffusion, seed=0)
            loss = build.generator_loss(config, process, build.build_timesteps("uniform", len(process)))

            def batches(start: int) -> Any:
                step = start
                while True:
                    yield Batch(pictures, None, torch.arange(4), step)
                    step += 1

            trainer = Trainer(net, loss, batches, checkpoints=saves, save_every=0, log_every=0)
            source = batches(0)
            plain, stalls = [], []
            begin = time.perf_counter()
            for number in range(steps):
                start = time.perf_counter()
                trainer.step(next(source))
                plain.append(time.perf_counter() - start)
                if mode != "none" and number % every == every - 1:
                    start = time.perf_counter()
                    trainer.save()
                    stalls.append(time.perf_counter() - start)
            seconds = time.perf_counter() - begin
            saves.wait()
            return plain, stalls, seconds

    run("none")
    found = {mode: run(mode) for mode in ("none", "background", "waiting")}
    return {
        "step, no saves, s": found["none"][2] / steps,
        "step, saved in the background, s": found["background"][2] / steps,
        "step, saved and waited for, s": found["waiting"][2] / steps,
        "stall of one background save, s": median(found["background"][1]),
        "stall of one save waited for, s": median(found["waiting"][1]),
        "median step during background saves / without saves": median(found["background"][0])
        / median(found["none"][0]),
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
