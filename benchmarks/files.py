"""What files cost: pictures read for training, weights loaded, runs saved; and samples kept, and a second process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from . import networks
from .shapes import released
from .timing import Plan, Row, alternate, as_rows, clocked, run_isolated

_SMALL = "--num_channels 32 --num_res_blocks 1 --num_heads 2 --class_cond False"


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Smooth random JPEG pictures of a usual size."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = np.clip(smooth + rng.integers(-12, 13, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k % 2}_{k:05d}.jpg", quality=90)


def loader(plan: Plan) -> list[Row]:
    """A batch of 16 images of 64 px from JPEG files of 500x375, and from the same files packed."""
    from guided_diffusion.data.listing import list_records
    from guided_diffusion.data.loader import make_batches
    from guided_diffusion.data.packed import pack

    size, batch = 64, 16
    with tempfile.TemporaryDirectory() as folder:
        files, packed = Path(folder) / "files", Path(folder) / "packed"
        write_pictures(files, 64 if plan.quick else 256)
        pack(list_records(str(files)), str(packed), size)
        ways: dict[str, Callable[[], float]] = {}
        for name, path in (("from files", files), ("packed", packed)):
            batches = make_batches(list_records(str(path)), image_size=size, batch_size=batch)
            next(batches)
            ways[name] = clocked(lambda batches=batches: next(batches))  # type: ignore[misc]
        times = alternate(ways, rounds=plan.rounds)
    rates = {name: f"{batch / median(spent):.0f} images/s" for name, spent in times.items()}
    return as_rows(f"loader, batch of {batch} at {size} px", times, rates)


# Seconds from the call to a network of which every tensor was read; the highest resident memory above what was there before.
_LOAD = """
import json, sys, time
import torch
import guided_diffusion as gd
gd.load, gd.build_model
torch.set_num_threads(1)
how, path, flags = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
before, begin = peak_mib(), time.perf_counter()
if how == "torch.load":
    tensors = torch.load(path, weights_only=True, map_location="cpu")
else:
    tensors = gd.load(path, flags=flags).net.state_dict()
total = sum(float(t.view(-1)[::1024].sum()) for t in tensors.values())
print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": 2**20 * (peak_mib() - before), "sum": total}))
"""


def loading(plan: Plan) -> list[Row]:
    """`gd.load` against `torch.load` alone: a file like the released 256 px one (2.2 GB) in fresh processes.

    Every tensor is read once, so that mapping the file does not count as reading it.
    """
    import torch

    shape = plan.shapes[0] if plan.quick else released(256, 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pt")
        state = networks.made(shape, "diffusion", "meta").net.state_dict()
        torch.save({name: torch.rand(value.shape) for name, value in state.items()}, path)
        size = os.path.getsize(path)
        found: dict[str, list[dict[str, float]]] = {"torch.load": [], "this package": []}

        def once(how: str) -> float:
            found[how].append(run_isolated(_LOAD, how, path, json.dumps(dict(shape.model))))
            return found[how][-1]["seconds"]

        times = alternate({how: lambda how=how: once(how) for how in found}, rounds=min(plan.rounds, 3))  # type: ignore[misc]
    assert len({told["sum"] for rows in found.values() for told in rows}) == 1, "the two read different numbers"
    notes = {
        how: f"{median(told['bytes'] for told in rows) / size:.2f} times the file in memory"
        for how, rows in found.items()
    }
    return as_rows(f"loading {size / 2**30:.2f} GiB", times, notes)


def saving(plan: Plan) -> Iterator[Row]:
    """Six steps with and without a save among them: written in the background, or waited for. Then the last save of a run
    against as many bytes written by themselves. Wall time."""
    from guided_diffusion.training.saver import Checkpoints

    steps = 6
    ways: dict[str, Callable[[], float]] = {}
    stalls: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("no save", "saved in the background", "save waited for"):
            trainer, batch = networks.updates(plan.shapes[0], plan.device, networks.formats(plan)[0])
            trainer.checkpoints = Checkpoints(f"{folder}/{name}", keep_last=1)
            stalls[name] = []

            # Its defaults are this round's: the function outlives the loop.
            def once(name: str = name, trainer: Any = trainer, batch: object = batch) -> float:
                plan.wait()
                begin = time.perf_counter()
                if name != "no save":
                    trainer.save()
                if name == "save waited for":
                    trainer.checkpoints.wait()
                stalls[name].append(time.perf_counter() - begin)
                for _ in range(steps):
                    trainer.step(batch)
                plan.wait()
                took = time.perf_counter() - begin
                trainer.checkpoints.wait()
                return took / steps

            once()
            ways[name] = once
        times = alternate(ways, rounds=plan.rounds, limit=plan.limit)
        size = sum(path.stat().st_size for path in (Path(folder) / "save waited for").iterdir())
        notes = {name: f"{1e3 * median(spent):.0f} ms stall" for name, spent in stalls.items() if name != "no save"}
        yield from as_rows(f"training step, one save of {size / 2**20:.0f} MiB in {steps}", times, notes)
        last = {
            "raw write and fsync": lambda: _raw_write(f"{folder}/raw", size),
            "last save of a run": lambda: _last(trainer),
        }
        times = alternate(last, rounds=plan.rounds, limit=plan.limit)
        notes = {name: f"{1e-9 * size / median(spent):.2f} GB/s" for name, spent in times.items()}
        yield from as_rows(f"writing {size / 2**20:.0f} MiB", times, notes)


def _last(trainer: Any) -> float:
    begin = time.perf_counter()
    trainer.save(background=False)
    return time.perf_counter() - begin


def _raw_write(path: str, size: int) -> float:
    """Seconds in which `size` bytes of a file reach the disk."""
    piece = memoryview(os.urandom(1 << 24))
    begin = time.perf_counter()
    with open(path, "wb") as file:
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - begin
    os.remove(path)
    return took


def start(plan: Plan) -> Iterator[Row]:
    """Seconds from the command `train` to its first step and to its end, in a new run of one step and in one that continues.

    Measured where the lines of its log arrive, so what comes before the first one begins with loading Python and torch.
    """
    shape = plan.shapes[0]
    marks = {"first line": "[model]", "weights are on the device": "parameters, computing in"}
    marks |= {"all is read": "counters:", "first step": "| loss "}
    with tempfile.TemporaryDirectory() as work:
        write_pictures(Path(work) / "data", 2 * shape.train_batch, (80, 64))
        words = [word for name, value in shape.model.items() for word in (f"--{name}", str(value))]
        words += (
            f"--data_dir {work}/data --out {work}/run --device {plan.device} --batch_size {shape.train_batch}".split()
        )
        words += "--sample_interval -1 --log_interval 1 --progress False --max_steps".split()
        alone = [_lines([sys.executable, "-c", "import torch"])[-1][0] for _ in range(2)]  # first from the disk
        yield Row("start: import torch alone", alone[1], "s", note=f"the first time {alone[0]:.1f} s")
        for run, steps in (("new run", 1), ("continued", 2)):
            lines = _lines([sys.executable, "-m", "guided_diffusion", "train", *words, str(steps)])
            for what, mark in marks.items():
                for at in [at for at, text in lines if mark in text][:1]:
                    yield Row(f"start: {run}, {what}", at, "s")
            yield Row(f"start: {run}, saved and ended", lines[-1][0], "s")


def _lines(command: list[str]) -> list[tuple[float, str]]:
    """(seconds since the command, line) of all that it prints, and last of its end."""
    begin = time.perf_counter()
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = [(time.perf_counter() - begin, line) for line in process.stdout]
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(line for _, line in lines[-20:])}")
    return [*lines, (time.perf_counter() - begin, "")]


_SAMPLE = """
import json, sys
from guided_diffusion.cli.main import main
assert main(sys.argv[1:]) == 0
print()
print(json.dumps({"peak": peak_mib()}))
"""


def memory(plan: Plan) -> list[Row]:
    """Peak memory of `sample` for few and for many images: what is kept of them should not grow with their number."""
    import guided_diffusion as gd

    counts = (20, 60) if plan.quick else (500, 2000)
    flags = {
        "image_size": 64,
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": "1,1,1",
        "attention_resolutions": "",
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = gd.RunConfig.from_flags("diffusion", flags)
        net = gd.build_model(config.model, config.diffusion)
        gd.save(gd.Loaded(net, gd.build_process(config.diffusion), config, ""), f"{folder}/model")
        for count in counts:
            words = f"sample --model_path {folder}/model --out {folder}/{count} --num_samples {count} --batch_size 10"
            words += " --timestep_respacing 2 --use_ddim True --grid 0 --device cpu"
            peak = run_isolated(_SAMPLE, *words.split())["peak"]
            rows.append(Row(f"peak memory of sampling {count} images of 64 px", peak, "MiB"))
    return rows


def processes(plan: Plan) -> list[Row]:
    """Images per second of `train` on one and on two processes with one thread each, the same global batch."""
    steps = 6 if plan.quick else 15
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        write_pictures(Path(work) / "data", 32, (32, 32))
        for size in (1, 2):
            out = f"{work}/{size}"
            words = f"{_SMALL} --image_size 16 --channel_mult 1,2 --attention_resolutions 8 --data_dir {work}/data --out {out}"
            words += (
                f" --global_batch_size 16 --max_steps {steps} --log_interval {steps // 3} --progress False --device cpu"
            )
            launch = f"-m torch.distributed.run --standalone --nproc-per-node {size} -m guided_diffusion train {words}"
            env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, *launch.split()], env=env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"training on {size} processes failed:\n{done.stderr[-2000:]}")
            logged = [json.loads(line) for line in Path(out, "progress.json").read_text().splitlines()]
            rates.append(max(row["images_per_second"] for row in logged[1:]))
    one, two = rates
    unit, note = "images/s", "wall time: every process needs a core of its own"
    return [
        Row("training on one process", one, unit, note=note),
        Row("training on two processes", two, unit, note=f"{two / one:.2f} times one"),
    ]
