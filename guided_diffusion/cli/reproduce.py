"""`reproduce`: one published number, from the released weights to the score, with a manifest of everything that could move it."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..weights.released import PRESETS, Preset, Recipe, get
from .arguments import Parser, int_or_auto


class Target(NamedTuple):
    """A published figure under a short name."""

    preset: Preset
    recipe: Recipe


def targets() -> dict[str, Target]:
    """Short names of all published figures: imagenet256-guided, imagenet256-unguided, imagenet256-guided-ddim25, lsun-cat …"""
    found: dict[str, Target] = {}
    for preset in PRESETS.values():
        if preset.kind != "diffusion":
            continue
        size = str(preset.flags["image_size"])
        if preset.name.startswith("lsun_"):
            base = preset.name.replace("_", "-")
        else:
            base = f"imagenet{size}" + ("-uncond" if preset.name.endswith("_uncond") else "")
        for recipe in preset.recipes:
            name = base
            if not preset.name.startswith("lsun_"):
                name += "-guided" if recipe.scale else "-unguided"
            steps = recipe.respacing
            if steps and steps != "250":
                name += f"-{steps}" if steps.startswith("ddim") else "-sweep"
            elif preset.name.startswith("lsun_") and steps:
                name += f"-{steps}"
            found[name] = Target(preset, recipe)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion reproduce NAME --num_samples 50000 --reference REF.npz`."""
    known = targets()
    parser = Parser(prog="guided-diffusion reproduce", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", help=f"one of {', '.join(known)}")
    parser.add_argument("--num_samples", type=int, default=50000, help="images to make and score (default 50000)")
    parser.add_argument(
        "--batch_size", type=int_or_auto, default=16, help="images per pass and process, or auto (default 16)"
    )
    parser.add_argument(
        "--reference", default="", help="reference npz of the data set; without it images are made but not scored"
    )
    parser.add_argument("--inception", default="", help="Inception weights (default: looked for as the evaluator does)")
    parser.add_argument("--allow_other_weights", action="store_true", help="accept Inception weights of others")
    parser.add_argument("--model_path", default="", help="the released model (default: from the cache, or downloaded)")
    parser.add_argument("--classifier_path", default="", help="the released classifier (default: likewise)")
    parser.add_argument("--precision", default="", help="fp32, bf16 or fp16 (default: as released)")
    parser.add_argument("--out", default="", help="folder (default runs/reproduce/NAME)")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and labels (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args(argv)
    if args.name not in known:
        raise ValueError(f"there is no published figure called {args.name!r}; there are {', '.join(known)}")
    target = known[args.name]
    out = Path(args.out or f"runs/reproduce/{args.name}")

    from ..runtime import storage
    from ..sampling.generate import finished_npz
    from ..weights.download import fetch
    from . import sample

    cache = storage.cache_folder()
    model = args.model_path or fetch(target.preset, cache)
    flags = [
        *("--model_path", model, "--num_samples", str(args.num_samples), "--batch_size", str(args.batch_size)),
        *("--timestep_respacing", target.recipe.respacing, "--use_ddim", str(target.recipe.use_ddim)),
        *("--classifier_scale", f"{target.recipe.scale:g}", "--seed", str(args.seed), "--device", args.device),
        *("--out", str(out), "--precision", args.precision),
    ]
    if target.recipe.scale:
        flags += ["--classifier_path", args.classifier_path or fetch(get(target.preset.classifier), cache)]
    code = sample.main(flags)
    if code:
        return code
    npz = Path(finished_npz(str(out)))
    manifest = manifest_of(args.name, target, flags, out, npz)
    if args.reference:
        manifest["evaluation"] = evaluate(args.reference, str(npz), out, args)
        manifest["comparison"] = compare(target.recipe, manifest["evaluation"])
        print(comparison_table(manifest["comparison"]))
    else:
        print("not scored: no --reference was given")
    path = out / "manifest.json"
    storage.write_json_atomic(path, manifest)
    print(f"wrote {path}")
    return 0


def manifest_of(name: str, target: Target, flags: Sequence[str], out: Path, npz: Path) -> dict[str, Any]:
    """Weights, flags, seeds, label draw, dtype, quantisation, versions and hardware of this run."""
    import numpy
    import torch

    from ..runtime import storage
    from ..sampling.generate import RECEIPT

    receipt = json.loads((out / RECEIPT).read_text(encoding="utf-8"))
    return {
        "recipe": name,
        "model": target.preset.file,
        "flags": list(flags),
        "sampling": {RECEIPT: receipt},
        "label_draw": "uniform over the classes, one draw per image from the image's own stream",
        "quantisation": "((x + 1) * 127.5) clamped to [0, 255] and truncated, as in 2021",
        "samples_sha256": storage.sha256_of(str(npz)),
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version()},
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
    }


def evaluate(reference: str, npz: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The evaluator's own JSON: scores, error bars and provenance."""
    from evaluations.evaluator import main as evaluator

    report = out / "evaluation.json"
    words = [reference, npz, "--json", str(report), "--errors"]
    if args.inception:
        words += ["--weights", args.inception]
    if args.allow_other_weights:
        words.append("--allow_other_weights")
    if args.device != "auto":
        words += ["--device", args.device]
    code = evaluator(words)
    if code:
        raise ValueError(f"the evaluator ended with code {code}; its message is above")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


# The evaluator's names of the published figures.
_NAMES = {"fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}


def compare(recipe: Recipe, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows: metric, published, measured, and the standard error of the measured one where there is one."""
    if recipe.expected is None:
        return []
    scores = {score["name"]: score for score in evaluation["sets"][0]["scores"]}
    rows = []
    for metric, published in recipe.expected._asdict().items():
        found = scores[_NAMES[metric]]
        rows.append({"metric": metric, "published": published, "measured": found["value"], "error": found["error"]})
    return rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Published beside measured."""
    lines = [f"{'metric':10s} {'published':>10s} {'measured':>10s} {'± error':>9s}"]
    for row in rows:
        measured, error = (f"{'-':>9s}" if row[k] is None else f"{row[k]:9.4f}" for k in ("measured", "error"))
        lines.append(f"{row['metric']:10s} {row['published']:10.4f}  {measured} {error}")
    return "\n".join(lines)
