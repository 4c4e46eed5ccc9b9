"""Does a faster number format move the scores? `python -m benchmarks.quality runs/demo`

Takes the networks that `guided-diffusion demo` trained and samples with them once in float32 and once in another format,
from the same noise, for several seeds. A score of one run is uncertain by how much it varies from seed to seed: that is
the error bar. What the format does is the mean difference at equal seeds. It is within the error bar or it is told.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

SCORES = ("fd", "precision", "recall", "accuracy")
Scores = Mapping[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Print one row per score, write `quality_FORMAT.json` beside the demo; returns 1 where a score moved beyond its error bar."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__, allow_abbrev=False)
    parser.add_argument("demo", help="folder that `guided-diffusion demo` wrote")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16"), help="the format to judge (bf16)")
    parser.add_argument("--seeds", type=int, default=5, help="runs in each format (5)")
    parser.add_argument("--num_samples", type=int, default=400, help="images per run (400, as the demo)")
    parser.add_argument("--scale", type=float, default=1.0, help="classifier scale (1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}; the error bar needs at least 2")
    runs = measured(
        Path(args.demo),
        args.precision,
        seeds=args.seeds,
        count=args.num_samples,
        scale=args.scale,
        device=args.device,
    )
    rows = compared(runs["fp32"], runs[args.precision])
    print(f"\n{args.seeds} runs of {args.num_samples} images, scale {args.scale:g}, {args.precision} against fp32")
    print(
        "| score | fp32 | error bar of one run | mean difference | its own error | within |\n|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        values = " | ".join(f"{row[key]:.4f}" for key in ("fp32", "error_bar", "difference", "difference_error"))
        print(f"| {name} | {values} | {'yes' if row['within'] else 'NO'} |")
    told = {
        "precision": args.precision,
        "scale": args.scale,
        "num_samples": args.num_samples,
        "rows": rows,
        "runs": runs,
    }
    path = Path(args.demo) / f"quality_{args.precision}.json"
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["within"] for row in rows.values()) else 1


def compared(usual: Sequence[Scores], faster: Sequence[Scores]) -> dict[str, dict[str, float]]:
    """Per score: mean of `usual`, its deviation between runs (the error bar), mean difference at equal places and that mean's
    standard error, and whether the difference stays within the error bar."""
    rows = {}
    for name in SCORES:
        values = [run[name] for run in usual]
        moved = [b[name] - a[name] for a, b in zip(usual, faster, strict=True)]
        bar, shift = stdev(values), mean(moved)
        rows[name] = {
            "fp32": mean(values),
            "error_bar": bar,
            "difference": shift,
            "difference_error": stdev(moved) / len(moved) ** 0.5,
            "within": abs(shift) <= bar,
        }
    return rows


def measured(
    demo: Path, precision: str, *, seeds: int, count: int, scale: float, device: str
) -> dict[str, list[dict[str, float]]]:
    """The scores of every run, by format. The classifier that scores computes in float32 for both."""
    import numpy as np

    from evaluations.metrics import frechet_distance_of_features
    from evaluations.neighbours import neighbours
    from guided_diffusion.cli.demo import Plan, run
    from guided_diffusion.cli.features import classifier_features, read_images
    from guided_diffusion.runtime import world
    from guided_diffusion.weights.load import load

    with world.session(device) as here:
        critic = load(str(demo / "classifier"), kind="classifier", device=here.device)
        real, _ = classifier_features(critic, read_images(str(demo / "data" / "train"), critic, 100)[0], here.device)
    steps = Plan().sample[Plan().sample.index("--timestep_respacing") + 1]
    found: dict[str, list[dict[str, float]]] = {"fp32": [], precision: []}
    for seed in range(seeds):
        for name, scores in found.items():
            with tempfile.TemporaryDirectory() as folder:
                words = [
                    "sample",
                    "--model_path",
                    str(demo / "diffusion"),
                    "--classifier_path",
                    str(demo / "classifier"),
                ]
                words += ["--classifier_scale", str(scale), "--seed", str(seed), "--precision", name, "--grid", "0"]
                words += ["--num_samples", str(count), "--batch_size", "100", "--labels", "balanced"]
                run([*words, "--timestep_respacing", steps, "--out", folder, "--device", device])
                path = next(Path(folder).glob("samples_*.npz"))
                with world.session(device) as here:
                    images, labels = read_images(str(path), critic, 100)
                    made, predicted = classifier_features(critic, images, here.device)
            near = neighbours(made, real)
            scores.append(
                {
                    "fd": float(frechet_distance_of_features(made, real)),
                    "precision": float(near.precision),
                    "recall": float(near.recall),
                    "accuracy": float(np.mean(predicted == labels)),
                }
            )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
