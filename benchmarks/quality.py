"""Does a faster number format move the scores? `python -m benchmarks.quality runs/demo`

Takes the networks that `guided-diffusion demo` trained and samples with them once in float32 and once in another format,
from the same noise, for several seeds. How much a score varies from seed to seed is the error bar of one run; what the
format does is the mean difference at equal seeds.
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
    parser.add_argument("--timestep_respacing", default="50", help="steps of the sampler (50, as the demo)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}; the error bar needs at least 2")
    runs = measured(args)
    rows = compared(runs["fp32"], runs[args.precision])
    print(f"\n{args.seeds} runs of {args.num_samples} images, scale {args.scale:g}, {args.precision} against fp32")
    print(
        "| score | fp32 | error bar of one run | mean difference | its own error | within |\n|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        values = " | ".join(f"{row[key]:.4f}" for key in ("fp32", "error_bar", "difference", "difference_error"))
        print(f"| {name} | {values} | {'yes' if row['within'] else 'NO'} |")
    path = Path(args.demo) / f"quality_{args.precision}.json"
    found = {
        "precision": args.precision,
        "scale": args.scale,
        "num_samples": args.num_samples,
        "rows": rows,
        "runs": runs,
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["within"] for row in rows.values()) else 1


def compared(usual: Sequence[Scores], faster: Sequence[Scores]) -> dict[str, dict[str, float]]:
    """Per score: mean of `usual`, its deviation between runs (the error bar), mean difference at equal seeds and that mean's
    standard error, and whether the difference stays within the error bar."""
    rows = {}
    for name in SCORES:
        values = [run[name] for run in usual]
        moved = [b[name] - a[name] for a, b in zip(usual, faster, strict=True)]
        bar, shift = stdev(values), mean(moved)
        rows[name] = {"fp32": mean(values), "error_bar": bar, "difference": shift}
        rows[name] |= {"difference_error": stdev(moved) / len(moved) ** 0.5, "within": abs(shift) <= bar}
    return rows


def measured(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The scores of every run, by format. The classifier whose features are compared computes in float32 for both."""
    demo = Path(args.demo)
    found: dict[str, list[dict[str, float]]] = {"fp32": [], args.precision: []}
    with tempfile.TemporaryDirectory() as folder:
        real, _ = _features(demo, demo / "data" / "train", folder, args.device)
        for seed in range(args.seeds):
            for precision, scores in found.items():
                out = Path(folder) / f"{precision}_{seed}"
                words = f"sample --seed {seed} --precision {precision} --labels balanced --batch_size 100 --grid 0"
                words += f" --num_samples {args.num_samples} --timestep_respacing {args.timestep_respacing}"
                words += f" --classifier_scale {args.scale} --device {args.device}"
                paths = ["--model_path", demo / "diffusion", "--classifier_path", demo / "classifier", "--out", out]
                _run(*words.split(), *paths)
                made, accuracy = _features(demo, next(out.glob("samples_*.npz")), folder, args.device)
                scores.append({**_scores(made, real), "accuracy": accuracy})
    return found


def _features(demo: Path, images: Path, folder: str, device: str) -> tuple[object, float]:
    """What `guided-diffusion features` makes of images: features of the demo's classifier, and the share that it calls rightly."""
    import numpy as np

    out = f"{folder}/features.npz"
    _run("features", images, "--classifier_path", demo / "classifier", "--out", out, "--device", device)
    with np.load(out) as found:
        return found["features"], float(np.mean(found["predicted"] == found["arr_1"])) if "arr_1" in found else 0.0


def _scores(made: object, real: object) -> dict[str, float]:
    from evaluations.metrics import frechet_distance_of_features
    from evaluations.neighbours import neighbours

    near = neighbours(made, real)
    distance = float(frechet_distance_of_features(made, real))
    return {"fd": distance, "precision": float(near.precision), "recall": float(near.recall)}


def _run(*words: object) -> None:
    from guided_diffusion.cli.main import main as command

    if command([str(word) for word in words]):
        raise RuntimeError(f"`guided-diffusion {words[0]}` failed; what it said is above")


if __name__ == "__main__":
    raise SystemExit(main())
