"""`python -m benchmarks`: measure on the machine at hand and write a table, as markdown and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .budget import Budget
from .parts import NAMES, ON_CPU, ON_GPU, Figures, Plan, tasks
from .timing import TABLE_HEAD, Ratio, as_json, machine

GPU_BUDGET = 540.0
"""Seconds that a run on a GPU takes unless told otherwise: all of it within one call of ten minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, print as they come, write `benchmarks.md` and `benchmarks.json` after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: a look, not a measurement")
    parser.add_argument("--device", default="cpu", help="cpu (one thread, process CPU time) or cuda")
    parser.add_argument("--only", action="append", choices=NAMES, help="this part alone; may be repeated")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per pair; 0 = 7, or 2 with --quick")
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds for all: what would end later is left out and named; without it 540 on cuda, no end on the cpu",
    )
    parser.add_argument("--out", default="runs/benchmarks", help="folder for the two files")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    try:
        budget = Budget(args.budget if args.budget is not None else GPU_BUDGET if on_gpu else float("inf"))
    except ValueError as error:
        parser.error(str(error))

    import torch

    from . import floor

    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    threads = torch.get_num_threads()
    if args.device == "cpu":
        torch.set_num_threads(1)
    try:
        rates = floor.rates(args.device, args.quick)
        print("\n".join(f"{name}: {value:.1f}" for name, value in rates.items()), flush=True)
        report = Report(Path(args.out), {"machine": machine(), "command": _command(args), "rates": rates}, budget)
        measure(Plan(args.device, args.quick, args.rounds, rates), args.only or (ON_GPU if on_gpu else ON_CPU), report)
    finally:
        torch.set_num_threads(threads)
    report.write()
    print(f"wrote {report.folder / 'benchmarks.md'} and {report.folder / 'benchmarks.json'}")
    return 1 if report.failed else 0


class Report:
    """What has been measured so far, in two files that are whole at any moment."""

    def __init__(self, folder: Path, head: dict[str, Any], budget: Budget) -> None:
        self.folder, self.head, self.budget = folder, head, budget
        self.ratios: list[Ratio] = []
        self.figures: Figures = {}
        self.failed: dict[str, str] = {}

    def add(self, rows: Sequence[Ratio], figures: Figures) -> None:
        """Take up and print what one task found."""
        for row in rows:
            print(row.row(), flush=True)
        for key, value in figures.items():
            print(f"{key}: {value:.4g}", flush=True)
        self.ratios += rows
        self.figures.update(figures)

    def write(self) -> None:
        """Write both files; each replaces the one before when it is complete."""
        found = {**self.head, "ratios": as_json(self.ratios), "figures": self.figures}
        found |= {"left_out": self.budget.left_out, "failed": self.failed}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("benchmarks.json", json.dumps(found, indent=1) + "\n"),
            ("benchmarks.md", markdown(found, self.ratios)),
        ):
            half = self.folder / f".{name}.part"
            half.write_text(text, encoding="utf-8")
            os.replace(half, self.folder / name)


def measure(plan: Plan, names: Sequence[str], report: Report) -> None:
    """Run the tasks of the parts named, as far as the budget goes; after each, the files hold all there is."""
    for name in names:
        for task in tasks(name, plan):
            begin = time.perf_counter()
            try:
                found = report.budget.run(task)
            except ImportError as error:  # a part that compares with something not installed
                report.budget.left_out[task.name] = str(error)
                found = None
            except Exception as error:  # a table with a hole, named, is worth more than none
                traceback.print_exc()
                report.failed[task.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                found = None
            if found is not None:
                report.add(*found)
                print(f"({task.name}: {time.perf_counter() - begin:.0f} s)", flush=True)
            elif task.name in report.budget.left_out:
                print(f"{task.name}: left out, {report.budget.left_out[task.name]}", flush=True)
            report.write()
            if plan.on_gpu:
                from .gpu import tidy

                tidy()


def _command(args: argparse.Namespace) -> str:
    words = [*(["--quick"] if args.quick else []), *(["--device", args.device] if args.device != "cpu" else [])]
    for name in args.only or []:
        words += ["--only", name]
    words += [f"--rounds {args.rounds}"] if args.rounds else []
    words += [f"--budget {args.budget:g}"] if args.budget is not None else []
    return " ".join(["python -m benchmarks", *words])


def markdown(report: dict[str, Any], ratios: Sequence[Ratio]) -> str:
    """The report as tables."""
    lines = ["# Measured", "", f"`{report['command']}`", ""]
    lines += [f"* {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"* {name}: {value:.1f}" for name, value in report["rates"].items()]
    lines += [f"* left out: {name} ({why})" for name, why in report["left_out"].items()]
    lines += [f"* FAILED: {name} ({why})" for name, why in report["failed"].items()]
    if ratios:
        lines += ["", TABLE_HEAD, *(ratio.row() for ratio in ratios)]
    if report["figures"]:
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in report["figures"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
