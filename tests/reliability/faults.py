"""Kill training and sampling at random moments, let them go on, and compare with runs that nobody disturbed.

    python -m tests.reliability.faults --moments 20          # the long form, some minutes on two cores
    python -m tests.reliability.faults --moments 2           # what the tests run

Training: at each moment one rank or all get SIGKILL, SIGTERM or SIGUSR1, and the same command starts again. Every save that the disturbed
run writes is compared with the save of the undisturbed one at that step: SHA-256 of weights, averages and optimizer, and every counter.
Sampling: the same, each time continued on another number of ranks; the npz is compared byte for byte with that of one process.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from .jobs import Job, command

REQUEUE = 85
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
SECONDS_TO_DIE = 30.0  # a rank that was not killed must notice that another was

NETWORK = (
    "--image_size 4 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 4 --num_heads 2 "
    "--diffusion_steps 40 --dropout 0.1"
).split()
TRAINING = (
    "--global_batch_size 8 --microbatch 2 --lr 1e-3 --warmup_steps 5 --ema_rate 0.9,0.99 --schedule_sampler loss-second-moment "
    "--random_crop True --log_interval 5 --sample_interval -1 --seed 3 --resume_checkpoint auto --progress False"
).split()


@dataclass
class Tally:
    """What happened."""

    what: str
    ranks: str
    moments: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    differing: list[str] = field(default_factory=list)
    slowest_end_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def good(self) -> bool:
        return not self.differing and not self.problems

    def row(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.kinds.items()))
        verdict = "equal" if self.good() else f"{len(self.differing)} DIFFER, {len(self.problems)} problems"
        return f"| {self.what} | {self.ranks} | {self.moments} | {kinds} | {self.compared} | {verdict} | {self.slowest_end_s:.1f} |"


TABLE_HEAD = "| run | ranks | moments | signals | files compared | verdict | slowest end after a signal, s |\n|---|---|---|---|---|---|---|"


def make_images(folder: Path, number: int = 40, size: int = 11, seed: int = 0) -> Path:
    """A folder of small PNG files of random smooth colours."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for k in range(number):
        coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"picture{k:04d}.png")
    return folder


def train_words(data: Path, out: Path, steps: int, save: int = 5, *more: str) -> list[str]:
    options = f"--max_steps {steps} --save_interval {save}".split()
    return ["train", "--data_dir", str(data), "--out", str(out), *options, *NETWORK, *TRAINING, *more]


def sample_words(model: Path, out: Path, count: int, batch: int = 4) -> list[str]:
    options = f"--num_samples {count} --batch_size {batch} --timestep_respacing 8 --seed 5".split()
    return ["sample", "--model_path", str(model), "--out", str(out), *options]


def saves(folder: Path) -> dict[int, dict[str, Any]]:
    """Every whole save of a run: step -> the SHA-256 of its files and its counters."""
    found = {}
    for path in folder.glob("run*.json"):
        told = json.loads(path.read_text())
        found[told["step"]] = {
            "state": told["state"],
            **{name: entry["sha256"] for name, entry in told["files"].items()},
        }
    return found


def compare_saves(undisturbed: Path, disturbed: Path) -> tuple[int, list[str]]:
    """(files and states compared, names of those that differ)."""
    ours, theirs = saves(disturbed), saves(undisturbed)
    shared = [(step, name) for step in sorted(set(ours) & set(theirs)) for name in ours[step]]
    return len(shared), [f"step {step}: {name}" for step, name in shared if ours[step][name] != theirs[step].get(name)]


class Disturber:
    """Chooses the moments and the victims."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def strike(self, job: Job, within_s: float, tally: Tally, complete: Callable[[], bool]) -> bool:
        """Wait a random time, then signal one rank or all. False if the job had ended by then.

        A rank may be killed on its way out, when all is done; otherwise the others must not call it a success.
        """
        time.sleep(self.random.uniform(0.0, within_s))
        if not job.running():
            return False
        number = self.random.choice(SIGNALS)
        size = len(job.ranks)
        victims = list(range(size)) if self.random.random() < 0.5 else [self.random.randrange(size)]
        job.signal(number, victims)
        began = time.monotonic()
        while not job.met() and job.running() and time.monotonic() - began < SECONDS_TO_DIE:
            # Before the ranks have met nobody misses one that died, except its launcher: that ends the rest, and so do we. Also
            # where all were signalled: a rank that hears signals already waits for one that was ended by it.
            if any(not process.is_alive() for process in job.ranks):
                job.signal(signal.SIGKILL)
            time.sleep(0.05)
        try:
            codes = job.wait(SECONDS_TO_DIE)
        except TimeoutError as error:
            tally.problems.append(str(error))
            return True
        tally.slowest_end_s = max(tally.slowest_end_s, time.monotonic() - began)
        tally.moments += 1
        name = f"{signal.Signals(number).name} to {'all' if len(victims) == size else 'one'}"
        tally.kinds[name] = tally.kinds.get(name, 0) + 1
        if number == signal.SIGKILL and any(code == 0 for code in codes) and not complete():
            tally.problems.append(f"{name}: exit codes {codes}\n{job.text()}")
        return True


def finish(job: Job, tally: Tally) -> bool:
    codes = job.wait(300)
    if any(codes):
        tally.problems.append(f"exit codes {codes}\n{job.text()}")
    return not any(codes)


def disturb(
    work: Path,
    moments: int,
    words: Callable[[Path], list[str]],
    compare: Callable[[Path, Path], tuple[int, list[str]]],
    is_complete: Callable[[Path], bool],
    *,
    what: str,
    seed: int,
    sizes: tuple[int, ...],
    calm_size: int = 1,
    run: Callable[..., Any] = command,
) -> Tally:
    """Interrupt `words(folder)` `moments` times, going on each time with the next number of ranks of `sizes`.

    `compare(undisturbed folder, disturbed folder)`: how many files or states, and the names of those that differ.
    """
    tally = Tally(what, "/".join(map(str, sizes)))
    calm, logs = work / f"calm_{what}_{calm_size}", work / f"logs_{what}"
    job = Job(calm_size, [words(calm)], logs, run=run)
    if not finish(job, tally):
        return tally
    whole_s, disturber = job.seconds(), Disturber(seed)
    for number in range(10 * moments):
        if tally.moments >= moments:
            break
        folder = work / f"storm_{what}_{calm_size}_{number}"
        for turn in count(number):
            job = Job(sizes[turn % len(sizes)], [words(folder)], logs, run=run)
            again = tally.moments < moments and disturber.strike(
                job, 0.6 * whole_s, tally, partial(is_complete, folder)
            )
            if not again:
                finish(job, tally)
            if tally.problems:
                return tally
            if not again:
                break
        compared, differing = compare(calm, folder)
        tally.compared += compared
        tally.differing += [f"{folder.name}: {name}" for name in differing]
        if not differing:
            shutil.rmtree(folder)
    return tally


def disturb_training(work: Path, moments: int, *, ranks: int, steps: int, seed: int) -> Tally:
    """Every save is compared with the undisturbed run's."""
    data = work / "data" if (work / "data").exists() else make_images(work / "data")

    def compare(calm: Path, folder: Path) -> tuple[int, list[str]]:
        compared, differing = compare_saves(calm, folder)
        return compared, differing if steps in saves(folder) else [*differing, f"no save at step {steps}"]

    return disturb(
        work,
        moments,
        lambda folder: train_words(data, folder, steps),
        compare,
        lambda folder: steps in saves(folder),
        what="training",
        seed=seed,
        sizes=(ranks,),
        calm_size=ranks,
    )


def disturb_sampling(
    work: Path, moments: int, words: Callable[[Path], list[str]], *, seed: int, what: str = "sampling", **options: Any
) -> Tally:
    """The npz has the bytes of one that one process wrote, whatever the numbers of ranks."""

    def npz(folder: Path) -> list[bytes]:
        return [path.read_bytes() for path in folder.glob("*.npz")]

    def compare(calm: Path, folder: Path) -> tuple[int, list[str]]:
        assert len(npz(calm)) == 1
        return 1, [] if npz(folder) == npz(calm) else ["npz"]

    is_complete = lambda folder: bool(npz(folder))  # noqa: E731
    return disturb(work, moments, words, compare, is_complete, what=what, seed=seed, sizes=(1, 2, 4), **options)


def run(
    work: Path, moments: int, *, steps: int = 60, images: int = 96, ranks: tuple[int, ...] = (2,), seed: int = 1
) -> list[Tally]:
    """All of it; the first of `ranks` trains the model that is sampled."""
    tallies = [disturb_training(work, moments, ranks=size, steps=steps, seed=seed + size) for size in ranks]
    model = work / f"calm_training_{ranks[0]}"
    return [*tallies, disturb_sampling(work, moments, lambda out: sample_words(model, out, images), seed=seed)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="interruptions of each kind of run")
    parser.add_argument("--ranks", default="2", help="numbers of ranks to train on, such as 1,2,4")
    parser.add_argument("--seed", type=int, default=1, help="of the moments, the victims and the signals")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--keep", default="", help="work in this folder and leave it")
    args = parser.parse_args()
    work = Path(args.keep or tempfile.mkdtemp(prefix="faults-"))
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    sizes = tuple(int(word) for word in args.ranks.split(","))
    tallies = run(work, args.moments, steps=args.steps, images=args.images, ranks=sizes, seed=args.seed)
    print(TABLE_HEAD)
    for tally in tallies:
        print(tally.row())
    for tally in tallies:
        for line in [*tally.differing, *tally.problems]:
            print(f"{tally.what}: {line}", file=sys.stderr)
    print(f"{time.monotonic() - began:.0f} s, seed {args.seed}")
    if not args.keep:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if all(tally.good() for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
