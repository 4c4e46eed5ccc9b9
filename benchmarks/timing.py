"""Time things in turns, and write what came out as one table.

A shared machine is noisy, so absolute times mean little: things that are compared take turns, and reported is the median of
the per-round ratios with its quartiles. On the CPU the clock is process CPU time with one thread (waiting for neighbours
does not count); on a GPU it is wall time between two synchronisations.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

FEW = 4
"""Images of a small request, as the README of 2021 sampled them."""
TABLE_HEAD = "| what | value | against | ratio | quartiles | rounds | note |\n|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """One figure; if it was compared, how many times better it is than `against` (median and quartiles over rounds)."""

    what: str
    value: float
    unit: str = "ms"
    against: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    note: str = ""

    def line(self) -> str:
        """As a line of the table."""
        ratio, spread = ("", "") if self.ratio is None else (f"**{self.ratio:.2f}**", f"{self.low:.2f}-{self.high:.2f}")
        rounds = self.rounds or ""
        value = f"{self.value:.0f}" if self.value >= 1000 else f"{self.value:.4g}"
        return f"| {self.what} | {value} {self.unit} | {self.against} | {ratio} | {spread} | {rounds} | {self.note} |"


@dataclass(frozen=True)
class Plan:
    """Where to measure, how often, on which networks, and the machine's own best rates (see `rates`)."""

    device: str = "cpu"
    quick: bool = False
    rounds: int = 7
    limit: float = float("inf")
    """No round begins after so many seconds of one comparison, but there are at least two."""
    rates: Mapping[str, float] = field(default_factory=dict)
    shapes: Sequence[Any] = ()

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def steps(self) -> int:
        """Steps of DDIM that are timed: each costs the same."""
        return 25 if self.on_gpu else 5 if self.quick else 10

    def requests(self, shape: Any) -> list[tuple[int, int]]:
        """(batch, DDIM steps) of what is sampled on a GPU: a full batch, a few steps of it; and a few images, whole."""
        return [(shape.batch, 4), (FEW, self.steps)]

    def wait(self) -> None:
        """Let the GPU, if there is one, finish what it was given."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def best_rate(self, dtype: str) -> float:
        """FLOP/s of this machine in a number format, the higher of the measured two; infinity where none was measured."""
        return 1e9 * max((value for name, value in self.rates.items() if dtype in name), default=float("inf"))


def clocked(call: Callable[[], object], device: str = "cpu") -> Callable[[], float]:
    """A function that makes the call and returns its seconds: of process CPU time, or on a GPU synchronised wall time."""

    def on_cpu() -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    def on_gpu() -> float:
        import torch

        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    return on_gpu if device.startswith("cuda") else on_cpu


def alternate(
    ways: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    limit: float = float("inf"),
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Seconds of each way by round; each round starts with another way.

    Fewer rounds than asked for, but at least two, where one more would end later than `limit` seconds after the first began.
    """
    names, begin = list(ways), now()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn >= 2 and (now() - begin) * (turn + 1) / turn > limit:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(ways[name]())
    return times


def as_rows(what: str, times: Mapping[str, Sequence[float]], notes: Mapping[str, str]) -> list[Row]:
    """A row for each way; ratios are the time of the first way over that of the others."""
    base, *_ = times
    rows = []
    for name, spent in times.items():
        row = Row(f"{what}: {name}", 1e3 * median(spent), rounds=len(spent), note=notes.get(name, ""))
        if name != base:
            ratios = sorted(other / max(own, 1e-12) for other, own in zip(times[base], spent))
            quartiles = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            row = Row(row.what, row.value, "ms", base, median(ratios), *quartiles, row.rounds, row.note)
        rows.append(row)
    return rows


def compare(
    what: str, ways: Mapping[str, Callable[[], Any]], plan: Plan, *, floor: Mapping[str, float] | None = None
) -> list[Row]:
    """Time `ways` in turns after a first call of each, which compiles what is compiled.

    Notes say how far a tensor that a way returns lies from that of the first way; on a GPU the peak memory of a call on top
    of what lies there; how long a slow first call took; and what share of its time a way needs at least (`floor`, seconds).
    """
    notes: dict[str, list[str]] = {}
    found, first = {}, {}
    for name, call in ways.items():
        begin = time.perf_counter()
        found[name] = call()
        plan.wait()
        first[name] = time.perf_counter() - begin
        notes[name] = []
    base = next(iter(found.values()))
    for name, value in found.items():
        if hasattr(value, "norm") and value is not base:
            apart = float((value.float() - base.float()).norm() / base.float().norm())
            notes[name].append(f"differs {apart:.1e} in norm")
    if plan.on_gpu:
        for name, call in ways.items():
            notes[name].append(f"peak {gpu_peak(call) / 2**20:.0f} MiB above the weights")
    times = alternate(
        {name: clocked(call, plan.device) for name, call in ways.items()}, rounds=plan.rounds, limit=plan.limit
    )
    for name, spent in times.items():
        if floor:
            notes[name].append(f"{floor[name] / max(median(spent), 1e-12):.0%} of the best rate")
        if first[name] > 5 + 5 * median(spent):
            notes[name].append(f"first call {first[name]:.0f} s")
    return as_rows(what, times, {name: "; ".join(said) for name, said in notes.items()})


def gpu_peak(call: Callable[[], object]) -> int:
    """Bytes of GPU memory that tensors of a call take at most, on top of what lies there before."""
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def rates(device: str = "cpu", quick: bool = False) -> dict[str, float]:
    """GFLOP/s of matrix products and of 3x3 convolutions, in float32 and in bfloat16."""
    import torch

    side, images, pixels = (8192, 32, 64) if device.startswith("cuda") else (512 if quick else 1024, 2, 32)
    found: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with torch.inference_mode():
            a = torch.randn(side, side, device=device).to(dtype)
            x, weight = (torch.randn(*shape, device=device).to(dtype, memory_format=torch.channels_last)
                         for shape in ((images, 192, pixels, pixels), (192, 192, 3, 3)))  # fmt: skip
            for what, call, work in (
                ("matmul", partial(torch.matmul, a, a), 2 * side**3),
                ("convolution", partial(torch.nn.functional.conv2d, x, weight, padding=1), 18 * images * (192 * pixels) ** 2),
            ):  # fmt: skip
                call()
                times = alternate({what: clocked(call, device)}, rounds=5)[what]
                found[f"{what} {name} GFLOP/s"] = 1e-9 * work / median(times)
    return found


def machine() -> dict[str, str]:
    """What figures were measured on: processor, cores, Python, torch, GPU if any."""
    import torch

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    facts = {"processor": f"{model}, {os.cpu_count()} cores", "instructions": torch.backends.cpu.get_cpu_capability()}
    facts |= {"python": platform.python_version(), "torch": torch.__version__}
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


# What isolated code may call. Linux: ru_maxrss would also count what the parent had when it started the process.
_PEAK = """
def peak_mib():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""


def run_isolated(code: str, *words: str, timeout: float = 3600) -> dict[str, float]:
    """Run Python code in a fresh process with `words` as arguments; its last line is one JSON object.

    The code can call `peak_mib()`, the most memory that the process had so far.
    """
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK + code, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The report


class Report:
    """What has been measured so far, in `benchmarks.md` and `benchmarks.json`, which are whole at any moment."""

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self.folder, self.head = folder, head
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def add(self, row: Row) -> None:
        """Take up and print what a part found."""
        print(row.line(), flush=True)
        self.rows.append(row)

    def write(self) -> None:
        """Write both files; each replaces the one before when it is complete."""
        found = {**self.head, "rows": [asdict(row) for row in self.rows]}
        found |= {"left_out": self.left_out, "failed": self.failed}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("benchmarks.json", json.dumps(found, indent=1) + "\n"), ("benchmarks.md", self.markdown())):
            half = self.folder / f".{name}.part"
            half.write_text(text, encoding="utf-8")
            os.replace(half, self.folder / name)

    def markdown(self) -> str:
        """The report as one table below what it was measured on."""
        lines = ["# Measured", "", f"`{self.head['command']}`", ""]
        lines += [f"* {name}: {value}" for name, value in self.head["machine"].items()]
        lines += [f"* {name}: {value:.1f}" for name, value in self.head["rates"].items()]
        lines += [f"* left out: {name} ({why})" for name, why in self.left_out.items()]
        lines += [f"* FAILED: {name} ({why})" for name, why in self.failed.items()]
        lines += ["", TABLE_HEAD, *(row.line() for row in self.rows)]
        return "\n".join(lines) + "\n"
