"""`python -m benchmarks`: measure on the machine at hand and write a table, as markdown and as JSON."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from . import against, chains, evaluating, execution, feeding, files, networks, profiling, shapes
from .timing import Plan, Report, Row, machine, rates

GPU_BUDGET = 540.0
"""Seconds after which a run on a GPU begins no further part, unless told otherwise."""
PER_SHAPE = {
    "sampling": networks.sampling,
    "training": networks.training,
    "forward": networks.forward,
    "largest": networks.largest,
    "profile": profiling.profile,
    "compiled-forward": networks.compiled_forward,
    "compiled": networks.compiled,
    "compiled-training": networks.compiled_training,
    "blocks": execution.blocks,
    "batches": execution.batches,
    "chains": chains.chains,
    "diffusers": networks.diffusers,
}
ONCE = {
    "features": evaluating.features,
    "distances": evaluating.distances,
    "loader": files.loader,
    "feeding": feeding.feeding,
    "loading": files.loading,
    "saving": files.saving,
    "start": files.start,
    "memory": files.memory,
    "processes": files.processes,
}
ON_CPU = ("forward", "diffusers", "sampling", "training", "features", "distances", "loader")
ON_GPU = ("forward", "training", "sampling", "largest", "compiled-forward", "compiled-training", "compiled")
FIRST = 2
"""Networks of which all parts are measured before the others' turn comes."""
Task = tuple[str, Callable[[], Iterable[Row]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, print as they come, write `benchmarks.md` and `benchmarks.json` after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--quick", action="store_true", help="a small network and few rounds: a look, not a measurement"
    )
    parser.add_argument("--device", default="cpu", help="cpu (one thread, process CPU time) or cuda")
    parser.add_argument(
        "--only", action="append", choices=(*PER_SHAPE, *ONCE, against.HOST), help="this part alone; may be repeated"
    )
    parser.add_argument(
        "--against", default="", metavar="FOLDER", help="time the 2021 package in this folder and this one, in turns"
    )
    parser.add_argument("--rounds", type=int, default=0, help="rounds of a comparison; 0 = 7, or 2 with --quick")
    parser.add_argument("--budget", type=float, help="no part begins after so many seconds; without it 540 on cuda")
    parser.add_argument("--out", default="runs/benchmarks", help="folder for the two files")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    budget = args.budget if args.budget is not None else GPU_BUDGET if on_gpu else float("inf")
    if budget <= 0:
        parser.error(f"--budget {budget:g} leaves no time to measure in; give a positive number of seconds")
    names = args.only or (against.WORKS if args.against else ON_GPU if on_gpu else ON_CPU)
    if args.against:
        unknown = [name for name in names if name not in against.WORKS]
        if unknown:
            parser.error(
                f"--only {unknown[0]} has nothing to do with --against; choose from {', '.join(against.WORKS)}"
            )
        try:
            against.check(args.against)
        except ValueError as error:
            parser.error(str(error))
    elif against.HOST in names:
        parser.error(f"--only {against.HOST} compares with the 2021 package; give its folder with --against")

    import torch

    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    if torch.device(args.device).index:
        torch.cuda.set_device(args.device)
    threads = torch.get_num_threads()
    if not on_gpu:
        torch.set_num_threads(1)
    try:
        measured = {} if args.against else rates(args.device, args.quick)
        print("\n".join(f"{name}: {value:.1f}" for name, value in measured.items()), flush=True)
        plan = Plan(
            args.device,
            args.quick,
            args.rounds or (2 if args.quick else 7),
            12.0 if on_gpu else float("inf"),
            measured,
            shapes.chosen(args.device, args.quick),
        )
        report = Report(Path(args.out), {"machine": machine(), "command": _command(args), "rates": measured})
        run(tasks(names, plan, args.against), report, budget)
    finally:
        torch.set_num_threads(threads)
    print(f"wrote {report.folder / 'benchmarks.md'} and {report.folder / 'benchmarks.json'}")
    return 1 if report.failed else 0


def tasks(names: Sequence[str], plan: Plan, folder: str = "") -> Iterator[Task]:
    """The measurements of the parts named; `folder`, if given, holds the package to compare with."""
    for first, some in ((True, plan.shapes[:FIRST]), (False, plan.shapes[FIRST:])):
        for name in names:
            if name == against.HOST and first:
                for work in ("forward", "training"):
                    yield f"{name}, {work}", partial(against.measure, work, shapes.narrow(), plan, folder)
            if name in ONCE and first:
                yield name, partial(ONCE[name], plan)
            for shape in some if name in PER_SHAPE else ():
                if folder:
                    yield f"{name}, {shape.name}", partial(against.measure, name, shape, plan, folder)
                else:
                    yield f"{name}, {shape.name}", partial(PER_SHAPE[name], shape, plan)


def run(todo: Iterator[Task], report: Report, budget: float = float("inf")) -> None:
    """Make the measurements that begin within the budget; after each, the files hold all there is."""
    begin = time.monotonic()
    for name, measure in todo:
        since = time.monotonic()
        try:
            if since - begin > budget:
                report.left_out[name] = f"{since - begin:.0f} of {budget:g} s were over"
            else:
                for row in measure():
                    report.add(row)
                    report.write()  # now: a lent machine may go at any time
                print(f"({name}: {time.monotonic() - since:.0f} s)", flush=True)
        except ImportError as error:  # something to compare with is not installed
            report.left_out[name] = str(error)
        except Exception as error:  # a table with a hole, named, is worth more than none
            traceback.print_exc()
            report.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if name in report.left_out:
            print(f"{name}: left out, {report.left_out[name]}", flush=True)
        report.write()
        networks.tidy()


def _command(args: argparse.Namespace) -> str:
    words = ["python -m benchmarks", *(["--quick"] if args.quick else [])]
    words += [f"--device {args.device}"] if args.device != "cpu" else []
    words += [f"--against {args.against}"] if args.against else []
    words += [f"--only {name}" for name in args.only or []]
    words += [f"--rounds {args.rounds}"] if args.rounds else []
    words += [f"--budget {args.budget:g}"] if args.budget is not None else []
    return " ".join(words)


if __name__ == "__main__":
    raise SystemExit(main())
