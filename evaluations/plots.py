"""Pictures: of a report, FID against the number of samples and precision against recall; and curves of any numbers. Needs matplotlib."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from guided_diffusion.runtime import storage

from .report import Report


class Point(NamedTuple):
    """A point of a curve, with standard errors and the text beside it."""

    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None
    text: str = ""


class Panel(NamedTuple):
    """One picture of curves: the names of its axes, the points of each curve by its name, which axes (x, y, xy) are logarithmic."""

    x: str
    y: str
    curves: Mapping[str, Sequence[Point]]
    title: str = ""
    logarithmic: str = ""


def draw_panels(panels: Sequence[Panel], path: str | os.PathLike[str]) -> bool:
    """Write panels side by side as one PNG; False, and nothing is written, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, points in panel.curves.items():
            x, y, x_error, y_error, texts = zip(*points)
            errors: dict[str, Any] = {"xerr": _bars(x_error), "yerr": _bars(y_error)}
            marked = {"marker": "o", "markersize": 4, "capsize": 2} if len(points) < 50 else {}
            axes.errorbar(x, y, **errors, **marked, linewidth=1, elinewidth=0.5, label=name)
            for place in zip(texts, zip(x, y)):
                axes.annotate(*place, xytext=(4, 4), textcoords="offset points", fontsize="x-small")
        axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
        for axis in panel.logarithmic:
            getattr(axes, f"set_{axis}scale")("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with storage.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return True


def draw_progress(columns: Mapping[str, str], path: str | os.PathLike[str]) -> bool:
    """Columns of training logs over the steps, a panel for each file progress.csv -> its columns, separated by spaces; as `draw_panels`.

    Losses, which span powers of ten, are drawn on a logarithmic axis.
    """
    panels = []
    for file, names in columns.items():
        with open(file, newline="", encoding="utf-8") as lines:
            table = list(csv.DictReader(lines))
        curves = {
            name: [Point(float(row["step"]), float(row[name])) for row in table if row.get(name)]
            for name in names.split()
        }
        axes = "y" if "mse" in names else ""
        title = os.path.basename(os.path.dirname(file))
        panels.append(Panel("step", "", {name: points for name, points in curves.items() if points}, title, axes))
    return draw_panels(panels, path)


def draw_levels(levels: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> bool:
    """Accuracy and gradient of a classifier by noise level, as `guided-diffusion noise-levels` measures them; as `draw_panels`."""
    panels = []
    for name, axes in (("accuracy", "x"), ("gradient", "xy"), ("shift", "x")):
        points = [Point(row["sigma"], row[name], None, row.get(f"{name}_error")) for row in levels]
        panels.append(Panel("noise level sigma/alpha", name, {name: points}, logarithmic=axes))
    return draw_panels(panels, path)


def _bars(errors: Sequence[float | None]) -> list[float] | None:
    return None if None in errors else [error or 0.0 for error in errors]


def check(path: str) -> None:
    """ValueError if matplotlib is not installed or cannot write a file with this ending."""
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
    distances = set()
    for number, one in enumerate(report.sets):
        name = os.path.basename(one.samples.name)
        style = {"color": f"C{number % 10}", "fmt": "o", "capsize": 3, "label": name}
        distance = next((score for score in one.scores if score.name == "FID" or score.name.startswith("FD ")), None)
        if distance is not None:
            distances.add(distance.name)
            left.errorbar([one.samples.count], [distance.value], yerr=distance.error, **style)
        if (line := one.fid_infinity) is not None:
            left.plot(line.counts, line.values, ".-", color=style["color"], alpha=0.6)
            left.axhline(line.infinity, color=style["color"], linestyle=":", label=f"{name}, N to infinity")
        precision, recall = one.score("Precision"), one.score("Recall")
        if precision is not None and recall is not None:
            right.errorbar([recall.value], [precision.value], xerr=recall.error, yerr=precision.error, **style)
    left.set(xlabel="samples N", ylabel=", ".join(sorted(distances)))
    left.margins(y=0.15)
    right.set(xlabel="recall", ylabel="precision")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"against {os.path.basename(report.reference.name)}", fontsize="medium")
    figure.savefig(path, dpi=150)
