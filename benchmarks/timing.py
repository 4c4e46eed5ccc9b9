"""Measure two things against each other: interleaved rounds, medians and quartiles of the per-round ratios.

A shared machine is noisy, so absolute times mean little; what is reported is always a ratio of two things that took
turns in one process. On the CPU the clock is process CPU time with one thread (waiting threads of a loaded machine do
not count); on a GPU it is wall time between two synchronisations.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """How many times faster `ours` is than `other`; `low` and `high` are the quartiles of the per-round ratios."""

    name: str
    other: str
    ratio: float
    low: float
    high: float
    ours_seconds: float
    other_seconds: float
    rounds: int
    note: str = ""

    def row(self) -> str:
        spread = f"{self.low:.2f}-{self.high:.2f}"
        times = f"{self.ours_seconds * 1e3:.2f} | {self.other_seconds * 1e3:.2f}"
        return (
            f"| {self.name} | {self.other} | **{self.ratio:.2f}** | {spread} | {times} | {self.rounds} | {self.note} |"
        )


TABLE_HEAD = (
    "| what | against | ratio | quartiles | ours ms | other ms | rounds | note |\n|---|---|---|---|---|---|---|---|"
)


def clock_of(device: str) -> Callable[[], float]:
    """Seconds since some moment: process CPU time on the CPU, synchronised wall time on a GPU."""
    if device.startswith("cuda"):
        import torch

        def now() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return now
    return time.process_time


def compare(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    *,
    against: str,
    rounds: int = 7,
    warmup: int = 1,
    device: str = "cpu",
    note: str = "",
    inner: int = 1,
    limit: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> Ratio:
    """Time `ours` and `other` in turns, the order changing every round; `inner` calls are timed together.

    Fewer rounds than asked for, but at least two, where another one would end more than `limit` seconds of `clock` after
    the first began.
    """
    now = clock_of(device)
    for _ in range(warmup):
        ours()
        other()
    times: dict[str, list[float]] = {"ours": [], "other": []}
    start = clock()
    for turn in range(rounds):
        if turn >= 2 and (clock() - start) * (turn + 1) / turn > limit:
            break
        pair = [("ours", ours), ("other", other)]
        for label, call in pair if turn % 2 == 0 else reversed(pair):
            begin = now()
            for _ in range(inner):
                call()
            times[label].append((now() - begin) / inner)
    ratios = sorted(o / max(u, 1e-12) for u, o in zip(times["ours"], times["other"]))
    return Ratio(
        name=name,
        other=against,
        ratio=median(ratios),
        low=ratios[len(ratios) // 4],
        high=ratios[(3 * len(ratios)) // 4],
        ours_seconds=median(times["ours"]),
        other_seconds=median(times["other"]),
        rounds=len(ratios),
        note=note,
    )


def run_isolated(code: str, timeout: float = 600) -> dict[str, float]:
    """Run Python code in a fresh process; it prints one JSON object on its last line. For import time and peak memory."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, str]:
    """What the numbers were measured on: processor, cores, Python, torch, GPU if any."""
    import os

    import torch

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    facts = {
        "processor": f"{model}, {os.cpu_count()} cores",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def as_json(results: list[Ratio]) -> list[dict[str, object]]:
    return [asdict(result) for result in results]
