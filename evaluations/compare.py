"""`evaluator.py compare A.json B.json`: what differs between two reports, and which difference comes first.

Differences are looked at in the order in which they are likely to matter: another encoder explains everything, another
library version almost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .commands import Parser
from .report import read_report

# (where in the report, what it is, what it can do)
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


class Difference(NamedTuple):
    """One fact in which two reports differ."""

    what: str
    first: Any
    second: Any
    meaning: str


def differences(first: dict[str, Any], second: dict[str, Any], index: int = 0) -> list[Difference]:
    """All facts that differ between set `index` of two reports, weightiest first."""
    views = [{**report, "set": report["sets"][index]} for report in (first, second)]
    found = []
    for path, what, meaning in _EXPLAIN:
        a, b = (_look(view, path) for view in views)
        if a != b:
            found.append(Difference(what, a, b, meaning))
    return found


def lines(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> Iterator[str]:
    """The comparison as text, set by set in the order of the files."""
    if len(first["sets"]) != len(second["sets"]):
        yield f"{names[0]} has {len(first['sets'])} sets of samples, {names[1]} has {len(second['sets'])}"
    for index, (a, b) in enumerate(zip(first["sets"], second["sets"])):
        yield f"A: {names[0]}: {a['samples']['name']}"
        yield f"B: {names[1]}: {b['samples']['name']}"
        found = differences(first, second, index)
        if not found:
            yield "nothing that bears on a score differs"
        for number, one in enumerate(found):
            head = "first difference" if number == 0 else "also"
            why = f" ({one.meaning})" if one.meaning else ""
            yield f"{head}: {one.what}: A {_short(one.first)}, B {_short(one.second)}{why}"
        theirs = {score["name"]: score for score in b["scores"]}
        for score in a["scores"]:
            if score["name"] in theirs:
                yield _score_line(score, theirs[score["name"]])


def _score_line(a: dict[str, Any], b: dict[str, Any]) -> str:
    if a["value"] is None or b["value"] is None:
        return f"{a['name']}: A {a['value']}, B {b['value']}"
    line = f"{a['name']}: A {a['value']!r}, B {b['value']!r}, A - B = {a['value'] - b['value']:.6g}"
    if a["error"] is None or b["error"] is None:
        return line
    error = float((a["error"] ** 2 + b["error"] ** 2) ** 0.5)
    return line + f" +- {error:.2g} (sets taken as independent)"


def main(arguments: Sequence[str]) -> int:
    """The command: prints the comparison; status 0 when nothing differs that could explain two numbers, else 1."""
    parser = Parser(prog="evaluator.py compare", description="What sets two reports apart.")
    parser.add_argument("first", help="report written with --json")
    parser.add_argument("second", help="another one")
    asked = parser.parse_args(arguments)
    first, second = read_report(asked.first), read_report(asked.second)
    for line in lines(first, second, (os.path.basename(asked.first), os.path.basename(asked.second))):
        print(line)
    same = len(first["sets"]) == len(second["sets"])
    return 0 if same and not any(differences(first, second, i) for i in range(len(first["sets"]))) else 1


def _look(report: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:12]}..." if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text
