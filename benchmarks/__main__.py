"""`python -m benchmarks`: measure on the machine at hand and write a table, as markdown and as JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import shapes
from .shapes import Shape
from .timing import TABLE_HEAD, Ratio, as_json, machine

Figures = dict[str, float]
Result = tuple[list[Ratio], Figures]
NAMES = (
    "forward", "arithmetic", "sampling", "training", "classifier", "features",
    "metrics", "loader", "growth", "startup", "memory", "demo",
)  # fmt: skip


class Plan:
    """What to measure and how often."""

    def __init__(self, device: str, quick: bool, rounds: int, rates: Figures) -> None:
        from . import floor

        self.device, self.quick = device, quick
        self.rounds = rounds or (2 if quick else 7)
        self.rate = floor.best(rates)
        self.on_gpu = device.startswith("cuda")
        self.low = "bfloat16"
        self.rate_low = floor.best(rates, self.low)

    def shapes(self) -> list[Shape]:
        """The networks that fit this machine."""
        if self.quick:
            return [shapes.tiny()]
        if self.on_gpu:
            return [shapes.released(64, 64, 64), shapes.released(128, 32, 32), shapes.released(256, 16, 16)]
        return [shapes.small()]


def forward(plan: Plan) -> Result:
    from . import networks

    rows = []
    for shape in plan.shapes():
        for dtype, rate in (("float32", plan.rate), (plan.low, plan.rate_low)):
            rows += networks.forward(shape, device=plan.device, rounds=plan.rounds, dtype=dtype, rate=rate)
        rows += networks.against_diffusers(shape, device=plan.device, rounds=plan.rounds)
    return rows, {}


def arithmetic(plan: Plan) -> Result:
    from . import networks

    shape = plan.shapes()[0]
    rows = []
    for guided in (False, True):
        rows += networks.arithmetic(shape, device=plan.device, rounds=plan.rounds, guided=guided)
    return rows, {}


def sampling(plan: Plan) -> Result:
    from . import networks

    rows, rounds = [], max(1, plan.rounds // 2)
    for shape in plan.shapes():
        for dtype in ("float32", plan.low) if plan.on_gpu else ("float32",):
            rows += networks.sampling(shape, device=plan.device, rounds=rounds, dtype=dtype)
    return rows, {}


def training(plan: Plan) -> Result:
    from . import networks

    rows = []
    for shape in plan.shapes():
        for precision, rate in (("fp32", plan.rate), ("bf16", plan.rate_low)):
            rows += networks.training(shape, device=plan.device, rounds=plan.rounds, precision=precision, rate=rate)
    return rows, {}


def classifier(plan: Plan) -> Result:
    from . import networks

    rows = []
    for shape in plan.shapes():
        rows += networks.classifier_gradient(shape, device=plan.device, rounds=plan.rounds, dtype="float32")
    return rows, {}


def features(plan: Plan) -> Result:
    from . import inception

    images = 4 if plan.quick else 8
    found = inception.measure(device=plan.device, images=images, rounds=2 if plan.quick else plan.rounds)
    return [found.pop("ratio")], {f"features, {name.replace('_', ' ')}": value for name, value in found.items()}


def metrics(plan: Plan) -> Result:
    from . import metrics as m

    small = {"dim": 256, "images": 600, "samples": 2000, "references": 1000, "neighbour_dim": 256}
    found = m.measure(**small) if plan.quick else m.measure(samples=10_000, references=10_000)
    neighbours = found["neighbours"]
    figures = {f"precision and recall, {name.replace('_', ' ')}": float(value) for name, value in neighbours.items()}
    figures["Frechet distance, scipy / ours"] = found["frechet_ratio"]
    figures["Frechet distance, relative difference"] = found["frechet_relative_difference"]
    return [], figures


def loader(plan: Plan) -> Result:
    from . import images

    return images.loader(rounds=plan.rounds, count=64 if plan.quick else 256), {}


def growth(plan: Plan) -> Result:
    from . import growth as g

    return [], g.measure(device=plan.device, quick=plan.quick)


def startup(plan: Plan) -> Result:
    from . import startup as s

    rounds = 1 if plan.quick else 3
    found = s.import_time(rounds)
    for shape in ("tiny()",) if plan.quick else ("small()", "small(num_channels=128)"):
        found.update({f"{name}, {shape}": value for name, value in s.loading(shape, rounds).items()})
    return [], found


def memory(plan: Plan) -> Result:
    from . import startup as s

    return [], s.memory("tiny()" if plan.quick else "small()")


def demo(plan: Plan) -> Result:
    from . import startup as s

    return [], {} if plan.quick else s.demo()


PARTS: dict[str, Callable[[Plan], Result]] = {name: globals()[name] for name in NAMES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, print as they come, write `benchmarks.md` and `benchmarks.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: a look, not a measurement")
    parser.add_argument("--device", default="cpu", help="cpu (one thread, process CPU time) or cuda")
    parser.add_argument("--only", action="append", choices=NAMES, help="this part alone; may be repeated")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per pair; 0 = 7, or 2 with --quick")
    parser.add_argument("--out", default="runs/benchmarks", help="folder for the two files")
    args = parser.parse_args(argv)

    import torch

    from . import floor

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    threads = torch.get_num_threads()
    if args.device == "cpu":
        torch.set_num_threads(1)
    try:
        rates = floor.rates(args.device, args.quick)
        print("\n".join(f"{name}: {value:.1f}" for name, value in rates.items()), flush=True)
        plan = Plan(args.device, args.quick, args.rounds, rates)
        ratios, figures = _measured(plan, args.only or NAMES)
    finally:
        torch.set_num_threads(threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "command": _command(args), "rates": rates}
    report |= {"ratios": as_json(ratios), "figures": figures}
    (out / "benchmarks.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "benchmarks.md").write_text(markdown(report, ratios), encoding="utf-8")
    print(f"wrote {out / 'benchmarks.md'} and {out / 'benchmarks.json'}")
    return 0


def _measured(plan: Plan, names: Sequence[str]) -> tuple[list[Ratio], Figures]:
    ratios: list[Ratio] = []
    figures: Figures = {}
    for name in names:
        begin = time.perf_counter()
        try:
            rows, found = PARTS[name](plan)
        except ImportError as error:  # a part that compares with something not installed
            print(f"{name}: left out, {error}", flush=True)
            continue
        for row in rows:
            print(row.row(), flush=True)
        for key, value in found.items():
            print(f"{key}: {value:.4g}", flush=True)
        print(f"({name}: {time.perf_counter() - begin:.0f} s)", flush=True)
        ratios += rows
        figures.update(found)
    return ratios, figures


def _command(args: argparse.Namespace) -> str:
    words = [*(["--quick"] if args.quick else []), *(["--device", args.device] if args.device != "cpu" else [])]
    for name in args.only or []:
        words += ["--only", name]
    return " ".join(["python -m benchmarks", *words])


def markdown(report: dict[str, Any], ratios: Sequence[Ratio]) -> str:
    """The report as tables."""
    lines = ["# Measured", "", f"`{report['command']}`", ""]
    lines += [f"* {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"* {name}: {value:.1f}" for name, value in report["rates"].items()]
    if ratios:
        lines += ["", TABLE_HEAD, *(ratio.row() for ratio in ratios)]
    if report["figures"]:
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in report["figures"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
