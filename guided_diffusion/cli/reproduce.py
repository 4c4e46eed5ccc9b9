"""`reproduce`: sample with released weights and compute a published score, with a manifest of everything that could change it."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime import storage
from ..weights.later import LATER, Later
from ..weights.released import PRESETS, Preset, Recipe, Scores, fetch, get
from .arguments import Parser, int_or_auto


def targets() -> dict[str, tuple[Preset, Recipe | Later]]:
    """Name -> model and way of sampling of each published score; those published later have the names of `LATER`."""
    named: dict[str, tuple[Preset, Recipe | Later]] = {
        preset.figure(recipe): (preset, recipe) for preset in PRESETS.values() for recipe in preset.recipes
    }
    return named | {name: (get(later.model), later) for name, later in LATER.items() if later.flags}


def main(argv: Sequence[str], program: str) -> int:
    """`guided-diffusion reproduce NAME --num_samples 50000 --reference REF.npz`."""
    known = targets()
    parser = Parser(program, __doc__)
    parser.add_argument("name", help=f"one of {', '.join(known)}")
    parser.flag("num_samples", 50000, "images to make and score")
    parser.flag("batch_size", 16, "images per pass and process, or auto", type=int_or_auto)
    parser.flag("reference", "", "reference npz of the data set; without it images are made but not scored")
    parser.flag("inception", "", "Inception weights (default: looked for as the evaluator does)")
    parser.flag("allow_other_weights", False, "accept Inception weights other than the original ones")
    parser.flag("model_path", "", "the released model (default: from the cache, or downloaded)")
    parser.flag("classifier_path", "", "the released classifier (default: likewise)")
    parser.flag("upsampler_path", "", "the released upsampler, for two stages (default: likewise)")
    parser.flag("precision", "", "fp32, bf16 or fp16 (default: as released)")
    parser.flag("out", "", "folder (default runs/reproduce/NAME)")
    parser.flag("seed", 0, "seed of noise and labels")
    parser.flag("device", "auto", "auto, cpu or cuda")
    args = parser.parse_args(argv)
    if args.name not in known:
        raise ValueError(f"there is no published figure called {args.name!r}; there are {', '.join(known)}")
    preset, recipe = known[args.name]
    out = Path(args.out or f"runs/reproduce/{args.name}")

    from ..sampling.jobs import finished_npz
    from . import sample, upsample

    flags = {"out": str(out), **_flags(preset, recipe, args)}
    two = isinstance(recipe, Recipe) and recipe.base
    (upsample.cascade if two else sample.main)([f"--{flag}={value}" for flag, value in flags.items()], program)
    stages = [out / "base", out / "upsampled"] if two else [out]
    npz = finished_npz(str(stages[-1]))
    source, caveat = (recipe.source, recipe.caveat) if isinstance(recipe, Later) else (_PAPER, recipe.note)
    told = {"source": source, "caveat": caveat}
    manifest = {"recipe": args.name, "model": preset.file, **told, **_manifest(flags, out, stages, npz)}
    if args.reference:
        evaluation = _evaluate(npz, out, args)
        if not evaluation:  # only the main process has the report
            return 0
        manifest |= {"evaluation": evaluation, "comparison": _compare(recipe, evaluation)}
        print(comparison_table(manifest["comparison"]))
        print("\n".join(f"{what:10s} {text}" for what, text in told.items() if text))
    else:
        print("not scored: no --reference was given")
    storage.write_json_atomic(out / "manifest.json", manifest)
    print(f"wrote {out / 'manifest.json'}")
    return 0


def _flags(preset: Preset, recipe: Recipe | Later, args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `sample`, or of `cascade`, for a published score. Downloads weights that are neither given nor in the cache."""
    cache = storage.cache_folder()
    if isinstance(recipe, Recipe) and recipe.base:
        second = {
            "upsampler_path": args.upsampler_path or fetch(preset, cache),
            "upsampler_timestep_respacing": recipe.respacing,
            "upsampler_use_ddim": recipe.use_ddim,
        }
        return {**_flags(get(recipe.small), recipe.base, args), **second}
    flags = {name: getattr(args, name) for name in ("num_samples", "batch_size", "seed", "device", "precision")}
    flags["model_path"] = args.model_path or fetch(preset, cache)
    if isinstance(recipe, Later):
        words = recipe.flags.split()
        flags |= {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2])}
        guided = recipe.guided
    else:
        flags |= {"timestep_respacing": recipe.respacing, "use_ddim": recipe.use_ddim, "classifier_scale": recipe.scale}
        guided = bool(recipe.scale)
    if guided:
        flags["classifier_path"] = args.classifier_path or fetch(get(preset.classifier), cache)
    return flags


def _manifest(flags: dict[str, Any], out: Path, stages: Sequence[Path], npz: str) -> dict[str, Any]:
    """Flags, receipt of each stage's folder (weights, seed, precision ...), label draw, quantisation, versions and hardware of this run."""
    import torch

    from ..runtime.devices import versions
    from ..sampling.jobs import RECEIPT

    receipts = [stage / RECEIPT for stage in stages]
    processor = platform.processor() or platform.machine()
    return {
        "flags": [word for flag, value in flags.items() for word in (f"--{flag}", str(value))],
        "sampling": {str(path.relative_to(out)): json.loads(path.read_text(encoding="utf-8")) for path in receipts},
        "label_draw": "uniform over the classes, one draw per image from the image's own stream",
        "quantisation": "((x + 1) * 127.5) clamped to [0, 255] and truncated, as in 2021",
        "samples_sha256": storage.sha256_of(npz),
        "versions": versions(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
    }


def _evaluate(npz: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The evaluator's report (scores, standard errors, provenance), also written as `evaluation.json`. Empty except on rank 0."""
    from evaluations.report import classic_lines, extra_lines
    from evaluations.scoring import Settings, evaluate

    device = None if args.device == "auto" else args.device
    settings = Settings(args.inception or None, args.allow_other_weights, device=device, errors=True)
    evaluation = evaluate(args.reference, npz, settings)
    if evaluation is None:
        return {}
    print("\n".join(classic_lines(evaluation.sets[0]) + extra_lines(evaluation.sets[0])), flush=True)
    evaluation.write(out / "evaluation.json")
    return dict(json.loads(evaluation.to_json()))


# Where the scores of `Recipe` are from; and a field of its `expected` -> the evaluator's name of the score.
_PAPER = "Dhariwal & Nichol 2021 (arXiv 2105.05233), tables 5, 6 and 14"
_NAMES = {"fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}


def _compare(recipe: Recipe | Later, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows: metric, published value, measured value, and the standard error of the latter, if any."""
    scores = {score["name"]: score for score in evaluation["sets"][0]["scores"]}
    expected = recipe.expected._asdict() if isinstance(recipe.expected, Scores) else recipe.expected or {}
    rows = []
    for metric, published in expected.items():
        found = scores[_NAMES[metric]]
        rows.append({"metric": metric, "published": published, "measured": found["value"], "error": found["error"]})
    return rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """The text of a table of published and measured values."""
    lines = [f"{'metric':10s} {'published':>10s} {'measured':>10s} {'± error':>9s}"]
    for row in rows:
        measured, error = (f"{'-':>9s}" if row[k] is None else f"{row[k]:9.4f}" for k in ("measured", "error"))
        lines.append(f"{row['metric']:10s} {row['published']:10.4f}  {measured} {error}")
    return "\n".join(lines)
