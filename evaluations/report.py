"""Reports: scores and their receipt, as the lines of 2021, as tables, as JSON.

Two scores can only be compared if both receipts are known. A receipt holds all that a score depends on: hashes of weights,
reference and samples, counts, resize rule, precisions, k, splits, versions and device.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from guided_diffusion.runtime import storage

if TYPE_CHECKING:
    from .metrics import Extrapolation

FORMAT = 1
CLASSIC = ("Inception Score", "FID", "sFID", "Precision", "Recall")


@dataclass(frozen=True)
class Score:
    """One number; `error` is one standard error, found by `method`."""

    name: str
    value: float
    error: float | None = None
    method: str | None = None


@dataclass(frozen=True)
class ClassScores:
    """Scores of the images of one class; None where the reference has no labels or too few images."""

    label: int
    samples: int
    references: int | None
    precision: float
    density: float
    recall: float | None = None
    fid: float | None = None
    kid: float | None = None


@dataclass(frozen=True)
class Set:
    """A set of images: its hash and number, where its statistics are from, and notes on conversions."""

    name: str
    sha256: str
    count: int
    shape: tuple[int, ...] | None = None
    statistics: str = "from its images"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetReport:
    """All scores of one set of samples."""

    samples: Set
    scores: tuple[Score, ...]
    per_class: tuple[ClassScores, ...] = ()
    fid_infinity: Extrapolation | None = None

    def score(self, name: str) -> Score | None:
        """The score of that name, or None."""
        return next((score for score in self.scores if score.name == name), None)


@dataclass(frozen=True)
class DifferenceReport:
    """First minus second set in one score, with its standard error."""

    score: str
    first: str
    second: str
    value: float
    error: float
    paired: bool


@dataclass(frozen=True)
class Report:
    """All results of one evaluation, and its receipt."""

    reference: Set
    sets: tuple[SetReport, ...]
    settings: dict[str, Any]
    encoder: dict[str, Any]
    versions: dict[str, str]
    differences: tuple[DifferenceReport, ...] = ()
    warnings: tuple[str, ...] = ()
    format: int = FORMAT

    def to_json(self) -> str:
        """JSON text; numbers that are not finite become null, because JSON has no word for them."""
        return storage.to_json(asdict(self), indent=2) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON whole or not at all."""
        storage.write_bytes_atomic(path, self.to_json().encode())


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A report written by `Report.write`, as plain JSON values. ValueError for any other file."""
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a report: {error}") from error
    sets = report.get("sets") if isinstance(report, dict) and report.get("format") == FORMAT else None
    kept = sets if isinstance(sets, list) else []
    if not kept or not all(isinstance(one, dict) and {"samples", "scores"} <= one.keys() for one in kept):
        raise ValueError(f"{path} is no report of this evaluator (format {FORMAT}); write one with --json")
    return report


def versions(device: str) -> dict[str, str]:
    """Versions of the libraries, and the machine and device, which affect the last digits of scores."""
    import numpy
    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "device": device,
    }
    if device.startswith("cuda"):
        found["device"] = f"{device} {torch.cuda.get_device_name(torch.device(device))}"
        found["cuda"] = str(torch.version.cuda)
    return found


def classic_lines(report: SetReport) -> list[str]:
    """The result lines of the 2021 command, every digit printed."""
    return [f"{name}: {score.value!r}" for name in CLASSIC if (score := report.score(name)) is not None]


def extra_lines(report: SetReport) -> list[str]:
    """Further scores, error bars, the extrapolation and the table of classes."""
    distance = next((score.name for score in report.scores if score.name.startswith("FD ")), "FID")
    lines = [f"{score.name}: {score.value!r}" for score in report.scores if score.name not in CLASSIC]
    lines += [f"{s.name} standard error: {s.error!r} ({s.method})" for s in report.scores if s.error is not None]
    if report.fid_infinity is not None:
        line = report.fid_infinity
        points = ", ".join(f"{count}: {value:.4f}" for count, value in zip(line.counts, line.values))
        fit = f"residual {line.residual:.3g}, {distance} at N: {points}"
        lines.append(f"{distance} infinity: {line.infinity!r} ({fit})")
        if line.error is not None:
            lines.append(f"{distance} infinity standard error: {line.error!r} (propagated from that of {distance})")
    if report.per_class:
        lines += ["", *class_table(report.per_class, distance)]
    return lines


def class_table(classes: Sequence[ClassScores], distance: str = "FID") -> list[str]:
    """One line per class, worst precision first; `distance` is the name of the Frechet distance."""
    columns = (
        *(("class", "label", "d"), ("samples", "samples", "d"), ("references", "references", "d")),
        *((name, name, ".4f") for name in ("precision", "recall", "density")),
        *((distance, "fid", ".3f"), ("KID", "kid", ".5f")),
    )
    rows = [[head for head, _, _ in columns]]
    for row in sorted(classes, key=lambda row: (row.precision, row.label)):
        values = [(getattr(row, name), form) for _, name, form in columns]
        rows.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def difference_lines(differences: Sequence[DifferenceReport]) -> list[str]:
    """One line per score and pair of sets."""
    return [
        f"{d.score}: {d.first} - {d.second} = {d.value:.6g} +- {d.error:.2g}"
        f"{f' ({abs(d.value) / d.error:.1f} standard errors' if d.error > 0 else ' (no error'}"
        f"{', images matched by position: image i of both is assumed to have the same seed and label)' if d.paired else ')'}"
        for d in differences
    ]
