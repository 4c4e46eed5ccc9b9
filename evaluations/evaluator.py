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
import warnings
from collections.abc import Sequence

from guided_diffusion.runtime import launchers, storage

from . import outputs
from .world import tell_of_others, world_from_environment

COMMANDS = ("compare", "reference", "selftest")
CLASSIC_WARM_UP = "warming up PyTorch..."


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 for a mistake in what was asked, told in one line."""
    arguments = storage.command_words(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal's encoding cannot show
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
        try:
            if arguments and arguments[0] in COMMANDS and not os.path.isfile(arguments[0]):
                return _other_command(arguments[0], arguments[1:])
            return _score(arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:  # TimeoutError is an OSError
            launchers.leave_it_to_the_first(os.environ)  # that may be of this process's share alone, so it is said then
            print(f"error: {error}", file=sys.stderr)
            return 2


def _parser() -> outputs.Parser:
    parser = outputs.Parser(
        prog="evaluator.py",
        description="FID, sFID, Inception Score, precision and recall of samples, with the numbers of 2021.",
        epilog="Further commands: 'compare A.json B.json' tells what sets two reports apart; 'reference IMAGES "
        "--image_size 64 --out ref.npz' makes a reference of your own; 'selftest' proves parity on this machine.",
    )
    add = parser.add_argument
    add("reference", help="reference: npz as in 2021, or npy, folder, zip or tar shards of images")
    add("samples", nargs="+", help="one or more sets of samples, in the same formats")
    add("--weights", help="Inception weights (.pb or .pth); default: working directory, cache, else download")
    add("--allow_other_weights", action="store_true", help="accept weights that are not the published ones")
    add(
        "--features",
        default="inception",
        metavar="KIND",
        help="inception (default), dinov2:FOLDER, clip:FOLDER, or npz when the files hold features [N, d]",
    )
    add("--batch_size", type=int, default=64, help="images read at a time; changes no number (default 64)")
    add("--device", help="cpu, cuda, cuda:1, ...; default: a graphics card where there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the network; bfloat16 is for quick looks, never for reported scores",
    )
    add("--compile", action="store_true", help="the network through torch.compile: slow to start, faster on a GPU")
    add(
        "--pr_dtype",
        choices=("float32", "float16", "float64"),
        default="float32",
        help="float16: precision and recall as published (about 0.001 to 0.003 higher)",
    )
    add("--k", type=int, default=3, help="neighbours for precision, recall, density, coverage (default 3)")
    add("--split_size", type=int, default=5000, help="images per split of the Inception Score (default 5000)")
    add("--errors", action="store_true", help="standard errors, and differences between several sets of samples")
    add("--kid", action="store_true", help="kernel distance over all pairs")
    add("--density_coverage", action="store_true", help="density and coverage")
    add("--fid_infinity", action="store_true", help="FID at several numbers of samples, extrapolated to infinity")
    add("--per_class", action="store_true", help="scores of each class of the labels arr_1")
    add("--all", action="store_true", help="all of the five above")
    add("--json", metavar="FILE", help="write scores with their receipt")
    add("--plot", metavar="FILE.png", help="draw FID against N, and precision against recall (needs matplotlib)")
    add("--shard_dir", metavar="FOLDER", help="keep features there: resumes, shares work, spares the next run")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def _score(arguments: list[str]) -> int:
    asked = _parser().parse_args(arguments)
    tell_of_others()
    inputs = [asked.reference, *asked.samples, *filter(None, [asked.weights])]
    for option, target in (("--json", asked.json), ("--plot", asked.plot)):
        if target:
            outputs.check_file(option, target, inputs)
    if asked.shard_dir:
        outputs.check_folder("--shard_dir", asked.shard_dir)
    if asked.plot:
        from . import plots

        plots.check(asked.plot)
    from . import report as reports
    from .scoring import Scored, Settings, evaluate

    settings = Settings(
        weights=asked.weights,
        allow_other_weights=asked.allow_other_weights,
        features=asked.features,
        batch_size=asked.batch_size,
        device=asked.device,
        dtype=asked.dtype,
        compile=asked.compile,
        pr_dtype=asked.pr_dtype,
        k=asked.k,
        split_size=asked.split_size,
        errors=asked.errors or asked.all,
        kid=asked.kid or asked.all,
        density_coverage=asked.density_coverage or asked.all,
        fid_infinity=asked.fid_infinity or asked.all,
        per_class=asked.per_class or asked.all,
        shard_dir=asked.shard_dir,
        progress=not asked.quiet,
    )
    world = world_from_environment()

    def say(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)

    def show(scored: Scored) -> None:
        if len(asked.samples) > 1:
            print(f"samples: {scored.report.samples.name}")
        lines = reports.classic_lines(scored.report) + reports.extra_lines(scored.report)
        print("\n".join(lines), flush=True)

    say(CLASSIC_WARM_UP)
    found = evaluate(asked.reference, asked.samples, settings, say=say, show=show, world=world)
    if found is None:
        return 0
    for line in reports.difference_lines(found.differences):
        print(line)
    if asked.json:
        found.write(asked.json)
    if asked.plot:
        plots.draw(found, asked.plot)
    return 0


def _other_command(name: str, arguments: list[str]) -> int:
    if name == "compare":
        from . import compare

        return compare.main(arguments)
    if name == "reference":
        from . import reference

        return reference.main(arguments)
    from . import selftest

    return selftest.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
