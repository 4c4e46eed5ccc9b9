"""Pictures of a report: FID against the number of samples, precision against recall. Needs matplotlib."""

from __future__ import annotations

import os
from typing import Any

from .report import Report, SetReport


def check(path: str) -> None:
    """ValueError when `draw` cannot write a file of this name, or cannot draw at all."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    ending, known = os.path.splitext(path)[1].lower().lstrip("."), FigureCanvasAgg.filetypes
    if ending and ending not in known:
        raise ValueError(
            f"--plot {path}: a picture cannot be of the kind {ending!r}; allowed are {', '.join(sorted(known))}"
        )


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """Write one PNG (or PDF, SVG, by the name's ending) with both pictures of all sets of samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, one in enumerate(report.sets):
        color, name = f"C{number % 10}", os.path.basename(one.samples.name)
        _frechet(left, one, color, name)
        _tradeoff(right, one, color, name)
    distances = {score.name for one in report.sets for score in one.scores if _is_distance(score.name)}
    left.set(xlabel="samples N", ylabel=", ".join(sorted(distances)))
    left.margins(y=0.15)
    right.set(xlabel="recall", ylabel="precision")
    right.grid(alpha=0.3)
    left.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.suptitle(f"against {os.path.basename(report.reference.name)}", fontsize="medium")
    figure.savefig(path, dpi=150)


def _is_distance(name: str) -> bool:
    return name == "FID" or name.startswith("FD ")


def _frechet(axes: Any, one: SetReport, color: str, name: str) -> None:
    found = next((score for score in one.scores if _is_distance(score.name)), None)
    if found is not None:
        axes.errorbar([one.samples.count], [found.value], yerr=found.error, fmt="o", color=color, capsize=3, label=name)
    if one.fid_infinity is not None:
        line = one.fid_infinity
        axes.plot(line.counts, line.values, ".-", color=color, alpha=0.6)
        axes.axhline(line.infinity, color=color, linestyle=":", label=f"{name}, N to infinity")
    axes.legend(fontsize="small")


def _tradeoff(axes: Any, one: SetReport, color: str, name: str) -> None:
    precision, recall = one.score("Precision"), one.score("Recall")
    if precision is None or recall is None:
        return
    axes.errorbar(
        [recall.value],
        [precision.value],
        xerr=recall.error,
        yerr=precision.error,
        fmt="o",
        color=color,
        capsize=3,
        label=name,
    )
