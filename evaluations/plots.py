"""Pictures of a report: FID against the number of samples, precision against recall. Needs matplotlib."""

from __future__ import annotations

import os

from .report import Report


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
