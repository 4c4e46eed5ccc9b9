"""Score samples against a reference: `python evaluator.py REF.npz SAMPLES.npz [MORE.npz ...] [options]`.

With two paths it prints the lines of the 2021 evaluator. `evaluator.py compare`, `reference` and `selftest` are further
commands; `evaluator.py --help` lists all options.
"""

from __future__ import annotations

import os
import sys

if __package__ in (None, ""):
    # Run as a plain file. Its folder must leave the path, or its statistics.py would hide the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    __package__ = "evaluations"
    import evaluations  # noqa: F401 - makes the relative imports below work

import io
import logging
import warnings
from collections.abc import Sequence
from importlib import import_module

from guided_diffusion.runtime import launchers, storage

from . import plots
from . import report as reports
from .commands import Parser, announce_place, check_file, check_folder, place, settings_of
from .settings import DTYPES, PR_DTYPES

COMMANDS = ("compare", "reference", "selftest")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 with one line on stderr for a wrong flag or file, or 130 after Ctrl-C."""
    arguments = storage.command_words(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal's encoding cannot show
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
        try:
            # A file of such a name is a reference to score, not a command.
            if arguments and arguments[0] in COMMANDS and not os.path.isfile(arguments[0]):
                return int(import_module(f".{arguments[0]}", __package__).main(arguments[1:]))
            return _score(arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:  # TimeoutError is an OSError
            # Let the first process of the machine report, before torchrun ends the job. Print here too: the error may concern this
            # process's share of the images only.
            launchers.wait_for_local_main(os.environ)
            print(f"error: {error}", file=sys.stderr)
            return 2


def _parser() -> Parser:
    parser = Parser(
        prog="evaluator.py",
        description="FID, sFID, Inception Score, precision and recall of samples, as the evaluator of 2021 computes them "
        "(precision and recall to the last digit with --pr_dtype float16).",
        epilog="Further commands: 'compare A.json B.json' lists the settings and inputs in which two reports differ; "
        "'reference IMAGES --image_size 64 --out ref.npz' makes a reference of your own; 'selftest' checks agreement with the "
        "2021 evaluator on this machine.",
    )
    add = parser.add_argument
    add("reference", help="reference: npz as in 2021, or npy, folder, zip or tar shards of images")
    add("samples", nargs="+", help="one or more sets of samples, in the same formats")
    kinds = "inception (default), dinov2:FOLDER, clip:FOLDER, or npz when the files hold features [N, d]"
    add("--features", metavar="KIND", help=kinds)
    use = "precision of the network; bfloat16 is for quick looks, never for reported scores"
    add("--dtype", choices=DTYPES, help=use)
    add("--compile", action="store_true", help="the network through torch.compile: slow to start, faster on a GPU")
    use = "float16: precision and recall as published (about 0.001 to 0.003 higher than float32)"
    add("--pr_dtype", choices=PR_DTYPES, help=use)
    add("--k", type=int, help="neighbours for precision, recall, density, coverage (default 3)")
    add("--split_size", type=int, help="images per split of the Inception Score (default 5000)")
    add("--errors", action="store_true", help="standard errors, and differences between several sets of samples")
    add("--kid", action="store_true", help="kernel distance over all pairs")
    use = "further scores by name, separated by commas (docs/extending.md)"
    add("--metrics", metavar="NAMES", type=lambda text: tuple(text.split(",")), help=use)
    add("--density_coverage", action="store_true", help="density and coverage")
    add("--fid_infinity", action="store_true", help="FID at several numbers of samples, extrapolated to infinity")
    add("--per_class", action="store_true", help="scores of each class of the labels arr_1")
    add("--all", action="store_true", help="same as --errors --kid --density_coverage --fid_infinity --per_class")
    add("--json", metavar="FILE", help="write scores with all settings, hashes of the inputs and versions, as JSON")
    add("--plot", metavar="FILE.png", help="draw FID against N, and precision against recall (needs matplotlib)")
    parser.add_common()
    return parser


def _score(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    announce_place()
    for option, target in (("--json", options.json), ("--plot", options.plot)):
        check_file(option, target, [options.reference, *options.samples, options.weights])
    check_folder("--shard_dir", options.shard_dir)
    if options.plot:
        plots.check(options.plot)
    from .scoring import evaluate

    if options.all:
        options.errors = options.kid = options.density_coverage = options.fid_infinity = options.per_class = True
    settings = settings_of(options)
    log, world = logging.getLogger("evaluations"), place()
    progress = logging.StreamHandler(sys.stdout)

    def show(scored: reports.SetReport) -> None:
        if len(options.samples) > 1:
            print(f"samples: {scored.samples.name}")
        print("\n".join(reports.classic_lines(scored) + reports.extra_lines(scored)), flush=True)

    log.addHandler(progress)
    log.setLevel(logging.INFO if world.rank == 0 else logging.WARNING)
    try:
        log.info("warming up PyTorch...")  # only because the evaluator of 2021 prints such a line, which programs read
        report = evaluate(options.reference, options.samples, settings, show=show, world=world)
    finally:
        log.removeHandler(progress)
    if report is None:
        return 0  # only rank 0 gets the report
    for line in reports.difference_lines(report.differences):
        print(line)
    if options.json:
        report.write(options.json)
    if options.plot:
        plots.draw(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
