"""`evaluator.py compare A.json B.json`: list what differs between two reports, the most important difference first.

The order is how much a difference is likely to change a score: another encoder changes everything, another library version almost
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .commands import Parser
from .report import read_report

# (keys of the entry in a report, its name, how a difference in it affects scores)
_EXPLAIN: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("encoder", "name"), "encoder", "scores of different encoders have nothing to do with each other"),
    (("encoder", "weights_sha256"), "weights of the encoder", "other weights, other features, other scores"),
    (("encoder", "resize"), "resize rule", "another resize moves FID by tenths to several units"),
    (("encoder", "dtype"), "precision of the network", "bfloat16 moves features by about 5e-3"),
    (("encoder", "compiled"), "compilation of the network", "the last bits of features"),
    (("reference", "sha256"), "reference", "another reference is another yardstick"),
    (("reference", "statistics"), "origin of the reference statistics", "a whole data set or the file's own images"),
    (("reference", "count"), "number of reference images", "precision and recall depend on it, and FID where computed"),
    (("reference", "notes"), "conversion of the reference images", "pixels were changed on reading"),
    (("set", "samples", "count"), "number of samples", "FID falls as about 1/N; 50,000 is the custom"),
    (("set", "samples", "shape"), "size of the samples", "images of another size are resized differently"),
    (("set", "samples", "statistics"), "origin of the sample statistics", "read from the file or from its images"),
    (("set", "samples", "notes"), "conversion of the samples", "pixels were changed on reading"),
    (("settings", "k"), "k", "more neighbours, larger balls, higher precision and recall"),
    (("settings", "pr_dtype"), "precision of distances", "float16 reads 0.001 to 0.003 higher"),
    (("settings", "split_size"), "split size of the Inception Score", "smaller splits, lower score"),
    (("settings", "frechet"), "rule of the Frechet distance", ""),
    (("settings", "neighbours"), "rule of the neighbours", ""),
    (("settings", "splits"), "rule of the splits", ""),
    (("set", "samples", "sha256"), "samples", "other images: this difference is what the scores are about"),
    (("versions", "device"), "device", "moves the last digits of features (about 1e-6)"),
    (("versions", "torch"), "version of torch", "moves at most the last digits"),
    (("versions", "numpy"), "version of numpy", "moves at most the last digits"),
    (("versions", "machine"), "kind of machine", "moves at most the last digits"),
)


def compare(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> tuple[list[str], bool]:
    """Lines of text, set by set in the order of the files; and whether nothing differs that can affect a score."""
    lines, same = [], len(first["sets"]) == len(second["sets"])
    if not same:
        lines = [f"{names[0]} has {len(first['sets'])} sets of samples, {names[1]} has {len(second['sets'])}"]
    for a, b in zip(first["sets"], second["sets"]):
        lines += [f"A: {names[0]}: {a['samples']['name']}", f"B: {names[1]}: {b['samples']['name']}"]
        head = "first difference"
        for path, what, meaning in _EXPLAIN:
            one, other = _entry({**first, "set": a}, path), _entry({**second, "set": b}, path)
            if one != other:
                why = f" ({meaning})" if meaning else ""
                lines.append(f"{head}: {what}: A {_abbreviated(one)}, B {_abbreviated(other)}{why}")
                head, same = "also", False
        if head != "also":
            lines.append("nothing that can affect a score differs")
        of_b = {score["name"]: score for score in b["scores"]}
        lines += [_score_line(score, of_b[score["name"]]) for score in a["scores"] if score["name"] in of_b]
    return lines, same


def _score_line(a: dict[str, Any], b: dict[str, Any]) -> str:
    if a["value"] is None or b["value"] is None:
        return f"{a['name']}: A {a['value']}, B {b['value']}"
    line = f"{a['name']}: A {a['value']!r}, B {b['value']!r}, A - B = {a['value'] - b['value']:.6g}"
    if a["error"] is None or b["error"] is None:
        return line
    error = float((a["error"] ** 2 + b["error"] ** 2) ** 0.5)
    return line + f" +- {error:.2g} (sets taken as independent)"


def main(arguments: Sequence[str]) -> int:
    """Run the command: print the comparison. Status 0 when nothing differs that can affect a score, else 1."""
    parser = Parser(prog="evaluator.py compare", description="List what differs between two reports.")
    parser.add_argument("first", help="report written with --json")
    parser.add_argument("second", help="another one")
    asked = parser.parse_args(arguments)
    names = os.path.basename(asked.first), os.path.basename(asked.second)
    lines, same = compare(read_report(asked.first), read_report(asked.second), names)
    print("\n".join(lines))
    return 0 if same else 1


def _entry(report: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _abbreviated(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:12]}..." if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text
