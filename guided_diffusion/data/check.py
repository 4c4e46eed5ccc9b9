"""Check images before a run (their classes, sizes and modes, and whether each can be decoded) and report it as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import images, packed
from .listing import Records
from .sources import open_source
from .sources.source import Progress

if TYPE_CHECKING:
    from PIL import Image as PILImage


_SHOWN_CLASSES, _SHOWN_SIZES, _SHOWN_FILES = 20, 10, 50


class Findings(NamedTuple):
    """How many of the images that can be decoded have each size and each PIL mode; the errors of the others."""

    sizes: Counter[tuple[int, int]]  # (width, height)
    modes: Counter[str]
    unreadable: list[str]


def check(records: Records, *, workers: int = 4, progress: Progress = None) -> Findings:
    """Decode every image as training would, by `workers` threads; of packed data, compare checksums instead.

    `progress(n)` is called when n more images are done.
    """
    findings = Findings(Counter(), Counter(), [])
    if records.kind == "packed":
        findings.unreadable.extend(packed.verify(records.root, progress))
        return findings
    source = open_source(records.kind, records.root)
    for result in source.each(records.paths, _size_and_mode, workers, progress):
        if isinstance(result, ValueError):
            findings.unreadable.append(str(result))
        else:
            findings.sizes[result[0]] += 1
            findings.modes[result[1]] += 1
    return findings


def _size_and_mode(image: PILImage.Image) -> tuple[tuple[int, int], str]:
    images.as_array(image, 3)
    return image.size, image.mode


def describe_records(records: Records) -> Iterator[str]:
    """Lines for the terminal: the number of images, the files left out, and the number of images of each class."""
    yield f"{len(records)} images in {records.root} ({records.kind})"
    if records.left_out:
        yield records.left_out
    if records.labels is None:
        yield "labels: none"
        return
    counts = np.bincount(records.labels, minlength=len(records.class_names)).tolist()
    spread = f"{min(counts)} to {max(counts)} images per class"
    yield f"labels: {len(counts)} classes, from {records.label_source}; {spread}"
    classes = [f"{k:5d}  {name:30s} {counts[k]}" for k, name in enumerate(records.class_names)]
    yield from _some(classes, _SHOWN_CLASSES, "more")
    if 0 in counts:
        yield f"  {counts.count(0)} classes have no image"
    if records.empty_folders:
        shown = ", ".join(map(repr, records.empty_folders[:_SHOWN_FILES]))
        yield f"  {len(records.empty_folders)} folders hold no image: {shown}"


def describe_findings(records: Records, findings: Findings) -> Iterator[str]:
    """Lines for the terminal: the most frequent sizes, the modes, and the files that cannot be read with the reasons."""
    sizes = findings.sizes.most_common()
    if records.stored_size:
        height, width = records.stored_size
        yield f"size: all {width}x{height} (width x height); {records.preprocessing}"
    elif sizes:
        widths, heights = zip(*findings.sizes)
        sides = {"width": widths, "height": heights, "shorter side": list(map(min, findings.sizes))}
        ranges = ", ".join(f"{side} {min(values)} to {max(values)}" for side, values in sides.items())
        yield f"sizes (width x height): {len(sizes)} different; {ranges}"
        most = sizes[0][1]
        bars = [f"{f'{w}x{h}':>12s}  {count:8d}  {'#' * max(1, round(40 * count / most))}" for (w, h), count in sizes]
        yield from _some(bars, _SHOWN_SIZES, "other sizes")
    if not records.stored_size:
        yield f"modes: {', '.join(f'{mode} {count}' for mode, count in findings.modes.most_common()) or 'none'}"
    yield f"unreadable: {len(findings.unreadable)}"
    yield from _some(findings.unreadable, _SHOWN_FILES, "more")


def _some(lines: Sequence[str], count: int, rest: str) -> Iterator[str]:
    yield from (f"  {line}" for line in lines[:count])
    if len(lines) > count:
        yield f"  ... and {len(lines) - count} {rest}"
