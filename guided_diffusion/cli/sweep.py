"""`sweep`: compare samplers, numbers of steps and scales of guidance. `noise-levels`: in which noise a classifier can guide."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..config import ClassifierConfig, DiffusionConfig, ModelConfig, SweepConfig, each_setting
from ..runtime import storage
from . import arguments, making, runs, sample


def main(argv: Sequence[str], program: str) -> int:
    """Make the same images by every combination of samplers, numbers of steps and scales of guidance, and score them: sweep.json,
    a table, pictures. Other flags are those of `sample`. The same command again goes on where it stopped."""
    own = SweepConfig.names()
    groups = {"the sweep": " ".join(own)}
    for title, names in arguments.SAMPLING.items():
        groups[title] = " ".join(name for name in names.split() if name not in own)
    flags, typed = arguments.parse(
        argv,
        (SweepConfig, making.Making, ModelConfig, DiffusionConfig, ClassifierConfig),
        program=program,
        description=str(main.__doc__),
        defaults={"num_samples": 400},
        groups=groups,
    )
    asked, out = SweepConfig.from_flags(flags), flags["out"]
    settings = each_setting(asked, flags, typed)
    options = {setting: making.Making.of(arguments.Parsed(*of_setting)) for setting, *of_setting in settings}

    from evaluations import tradeoffs
    from evaluations.settings import Settings

    from ..sampling import sweeps
    from ..weights.load import load

    with making.session(next(iter(options.values()))) as (world, stop):
        rows, makers, known = [], [], {}  # type: ignore[var-annotated]
        for setting, option in options.items():
            try:
                setup = making.Setup.read(option, world, known)
                rows.append(sweeps.row_of(setting.name, setting._asdict(), setup.guided, setup.chain))
            except ValueError as error:
                raise ValueError(f"{setting.name}: {error}") from None
            makers.append(partial(sample.make, setup, stop))
        path = storage.join(out, "sweep.json")
        sweeps.make(rows, makers, path, world.is_main)
        reference, sets, right = asked.reference, [row["samples"] for row in rows], []  # type: ignore[var-annotated]
        if asked.data_dir and not reference and world.is_main:  # by a classifier's features, on one process
            classifier = load(flags["classifier_path"], kind="classifier", device=world.device)
            reference, sets, right = sweeps.features_of(rows, classifier, asked.data_dir, out)
    features, device = "npz" if right else "inception", None if flags["device"] == "auto" else flags["device"]
    how = Settings(asked.inception or None, asked.allow_other_weights, features, device=device, errors=True)
    report = tradeoffs.add_scores(rows, reference, sets, how, right) if reference else None
    if world.is_main:
        by = flags["classifier_path"] if right else features
        scored = {"reference": asked.reference or asked.data_dir, "features": by} if report else None
        sweeps.write_rows(path, rows, scored=scored)
        sweeps.write_pictures(rows, storage.join(out, "pictures.png"))
        print("\n".join(tradeoffs.conclude(rows, report, out)))
    return 0


def noise_levels(argv: Sequence[str], program: str) -> int:
    """A classifier's accuracy and the norm of its gradient by noise level, from images that it was not trained on: where it sees nothing,
    guidance can do nothing."""
    parser = arguments.Parser(program, noise_levels.__doc__)
    parser.flag("classifier_path", "", "weights of a classifier, or the folder of its run", required=True)
    parser.flag("data_dir", "", "labelled images", required=True)
    parser.flag("labels", "auto", "where classes come from: auto, folders, prefix, or a csv or json file")
    parser.flag("num_samples", 500, "how many images at most")
    parser.flag("levels", 10, "how many noise levels, even in log-SNR")
    parser.flag("batch_size", 50, "images per pass")
    parser.flag("out", "", "folder for noise_levels.json and noise_levels.png; empty = only the table is printed")
    parser.flag("seed", 0, "seed of the noise and of the choice of images")
    parser.flag("device", "auto", "auto, cpu or cuda")
    args = parser.parse_args(argv)
    for name, least in {"num_samples": 1, "levels": 2, "batch_size": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least {least}")

    from evaluations.plots import draw_levels

    from ..sampling import noise_levels as measuring
    from ..weights.load import load

    with runs.session(args.device) as world:
        if world.is_main:
            classifier = load(args.classifier_path, kind="classifier", device=world.device)
            counts = {"count": args.num_samples, "levels": args.levels, "batch_size": args.batch_size}
            found = measuring.measure(classifier, args.data_dir, labels=args.labels, seed=args.seed, **counts)
            print(measuring.table(found))
            if args.out:
                rows = [level._asdict() for level in found]
                found_by = {**vars(args), "noise_levels": rows}
                storage.write_json_atomic(storage.join(args.out, "noise_levels.json"), found_by)
                draw_levels(rows, storage.join(args.out, "noise_levels.png"))
    return 0
