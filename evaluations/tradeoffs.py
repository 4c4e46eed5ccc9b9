"""Many settings of one sampling command side by side: their scores as a table, and pictures of what is traded for what.

A row is a dict of a setting (`sampler`, `steps`, `scale`), its cost (`calls` per image, `seconds_per_image`) and its `scores`,
{name: {"value": ..., "error": ...}}: what sweep.json holds of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import Panel, Point, draw_panels
from .report import Report, Score
from .scoring import evaluate
from .settings import Settings
from .uncertainty import mean_se

Row = dict[str, Any]


def add_scores(
    rows: Sequence[Row], reference: Any, sets: Sequence[Any], settings: Settings, right: Sequence[Any] = ()
) -> Report | None:
    """Score the set of samples of each row, and add `scores` to the rows; None in all processes but the first, as of `evaluate`.

    The Frechet distance of features from files is called FD. `right`: for each row whether a classifier calls its images rightly, bool
    `[N]`, or None; its mean is the score Accuracy.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report has them
        report = evaluate(reference, list(sets), settings)
    for k, one in enumerate(report.sets if report else ()):
        scores = list(one.scores)
        if right and right[k] is not None:
            scores.append(Score("Accuracy", float(right[k].mean()), *mean_se(right[k], "binomial over samples")[:2]))
        rows[k]["scores"] = {
            score.name.replace("FD npz", "FD"): {"value": score.value, "error": score.error} for score in scores
        }
    return report


def table(rows: Sequence[Row]) -> str:
    """The text of a table with one line for each row; one standard error behind each score, after ±."""
    names = max((list(row.get("scores", {})) for row in rows), key=len)
    cells = [["sampler", "steps", "scale", "calls", "s/image", *names]]
    for row in rows:
        seconds = row.get("seconds_per_image")
        cells.append([row["sampler"], str(row["steps"]), f"{row['scale']:g}", str(row["calls"]), f"{seconds or '-'}"])
        for name in names:
            score = row["scores"].get(name)
            cells[-1].append("-" if score is None else _with_error(**score))
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def conclude(rows: Sequence[Row], report: Report | None, folder: str | Path) -> list[str]:
    """The lines that end a sweep: table, warnings, and files, of which this writes evaluation.json and two pictures."""
    files, lines = ["sweep.json", "pictures.png"], [table(rows)]
    if report is None:
        lines.append("not scored: give --reference, or --classifier_path and --data_dir")
    else:
        report.write(Path(folder) / "evaluation.json")
        files += ["evaluation.json", *draw(rows, folder)]
        lines += [f"note: {text}".replace("FD npz", "FD") for text in report.warnings]
        if "FD" in rows[0]["scores"]:
            lines.append("FD is FID-like: Frechet's distance as in FID, in the features of the classifier")
        if len(files) == 3:
            lines.append("no plots without matplotlib: pip install matplotlib")
    return [*lines, f"in {folder}: {', '.join(files)}, and a folder for each setting"]


def draw(rows: Sequence[Row], folder: str | Path) -> list[str]:
    """Write `frontier.png` (distance and precision against recall, a curve over the scales) and `calls.png` (distance against calls, a
    curve over the numbers of steps); returns their names, none without matplotlib."""
    distance = next(name for name in rows[0]["scores"] if name.startswith("F"))
    frontier = [Panel("Recall", name, _curves(rows, "steps", "Recall", name)) for name in (distance, "Precision")]
    cost = Panel("calls of the network per image", distance, _curves(rows, "scale", "calls", distance))
    drawn = {"frontier.png": frontier, "calls.png": [cost]}
    return [name for name, panels in drawn.items() if draw_panels(panels, Path(folder) / name)]


def _curves(rows: Sequence[Row], of: str, x: str, y: str) -> dict[str, list[Point]]:
    """One curve for each sampler and value of `of`; a point's text is the scale, where a curve goes over the scales."""
    curves: dict[str, list[Point]] = {}
    for row in rows:
        values = {"calls": {"value": row["calls"], "error": None}, **row["scores"]}
        text = f"{row['scale']:g}" if of == "steps" else ""
        point = Point(values[x]["value"], values[y]["value"], values[x]["error"], values[y]["error"], text)
        name = f"{row['sampler']}, " + (f"{row['steps']} steps" if of == "steps" else f"scale {row['scale']:g}")
        curves.setdefault(name, []).append(point)
    return curves
