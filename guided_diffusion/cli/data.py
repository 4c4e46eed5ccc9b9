"""`guided-diffusion data check DIR` and `guided-diffusion data pack DIR OUT`: look at pictures before a run, and prepare them once."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from .arguments import Parser

if TYPE_CHECKING:
    from ..data.listing import Records

_SHOWN_CLASSES, _SHOWN_SIZES, _SHOWN_FILES = 20, 10, 50


def main(argv: list[str]) -> int:
    """`argv` after the word `data`; the exit code."""
    commands = {"check": check, "pack": pack}
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: guided-diffusion data {{{','.join(commands)}}} ...\n\n{__doc__}")
        return 0 if argv else 2
    if argv[0] not in commands:
        raise ValueError(f"data: unknown command {argv[0]!r}; must be one of {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


class Look(NamedTuple):
    """What `check` wants to know of one picture; `error` is empty for a readable one."""

    size: tuple[int, int]  # width, height
    mode: str
    error: str


def check(argv: Sequence[str]) -> int:
    """Decode every picture and print what is there. Exit code 1 if some cannot be read."""
    parser = Parser("guided-diffusion data check", description=check.__doc__)
    _add_source(parser)
    arguments = parser.parse_args(argv)

    from ..data.listing import list_records

    records = list_records(arguments.source, labels=arguments.labels)
    _print_records(records)
    if records.kind == "packed":
        return _check_packed(records, quiet=arguments.quiet)
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    unreadable = []
    for look in _progress(_looks(records, arguments.workers), len(records), arguments.quiet):
        if look.error:
            unreadable.append(look.error)
        else:
            sizes[look.size] += 1
            modes[look.mode] += 1
    _print_sizes(sizes)
    print(f"modes: {', '.join(f'{mode} {count}' for mode, count in modes.most_common()) or 'none'}")
    return _print_unreadable(unreadable)


def pack(argv: Sequence[str]) -> int:
    """Crop every picture once, as training would (center crop), and write plain arrays that load without decoding."""
    parser = Parser("guided-diffusion data pack", description=pack.__doc__)
    _add_source(parser)
    parser.add_argument("out", help="new folder to write")
    parser.add_argument(
        "--size",
        type=_size,
        required=True,
        help="side in pixels, or HEIGHTxWIDTH; for random crops 1.25 x the training size",
    )
    parser.add_argument(
        "--channels", type=int, default=3, choices=(1, 2, 3, 4), help="1 grey, 2 grey + alpha, 3 RGB, 4 RGBA"
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out pictures that cannot be read instead of stopping"
    )
    arguments = parser.parse_args(argv)

    from ..data import packed
    from ..data.listing import list_records

    records = list_records(arguments.source, labels=arguments.labels)
    _print_records(records)
    bar = _bar(len(records), arguments.quiet)
    with bar:
        done = packed.pack(
            records,
            arguments.out,
            arguments.size,
            channels=arguments.channels,
            workers=arguments.workers,
            on_error="skip" if arguments.skip_unreadable else "raise",
            progress=bar.update,
        )
    print(f"packed {len(done)} images to {done.root}: {done.preprocessing}")
    for reason in packed.list_skipped(done.root)[:_SHOWN_FILES]:
        print(f"  left out: {reason}")
    return 0


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="folder of images, .zip with dataset.json, (folder of) WebDataset .tar, LSUN lmdb, packed folder"
    )
    parser.add_argument(
        "--labels", default="auto", help="auto, folders, prefix, none, or a csv/json file (default: auto)"
    )
    parser.add_argument("--workers", type=int, default=4, help="threads that decode (default: 4)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a side like 64 or HEIGHTxWIDTH like 64x96")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _bar(total: int, quiet: bool):  # type: ignore[no-untyped-def]  # tqdm has no types, and is loaded only here
    from tqdm import tqdm

    return tqdm(total=total, disable=quiet, unit="image", file=sys.stderr)


def _progress(looks: Iterator[Look], total: int, quiet: bool) -> Iterator[Look]:
    with _bar(total, quiet) as bar:
        for look in looks:
            yield look
            bar.update(1)


def _looks(records: Records, workers: int) -> Iterator[Look]:
    from ..data import images
    from ..data.sources import Reader

    reader = Reader(records.kind, records.root)

    def look(path: str) -> Look:
        try:
            with reader.opened(path) as image:
                images.as_array(image, 3)  # what training would do
                return Look(image.size, image.mode, "")
        except ValueError as error:
            return Look((0, 0), "", str(error))

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(records), 1024):
            yield from pool.map(look, records.paths[start : start + 1024])


def _check_packed(records: Records, quiet: bool) -> int:
    from ..data import packed

    assert records.stored_size is not None
    print(f"size: all {records.stored_size[1]}x{records.stored_size[0]} (width x height); {records.preprocessing}")
    with _bar(len(records), quiet) as bar:
        return _print_unreadable(packed.verify(records.root, bar.update))


def _print_records(records: Records) -> None:
    print(f"{len(records)} images in {records.root} ({records.kind})")
    if records.left_out:
        print(records.left_out)
    if records.labels is None:
        print("labels: none")
        return
    import numpy as np

    counts = np.bincount(records.labels, minlength=len(records.class_names))
    print(
        f"labels: {len(counts)} classes, from {records.label_source}; {counts.min()} to {counts.max()} images per class"
    )
    for number, (name, count) in enumerate(zip(records.class_names[:_SHOWN_CLASSES], counts)):
        print(f"  {number:5d}  {name:30s} {count}")
    if len(counts) > _SHOWN_CLASSES:
        print(f"  ... and {len(counts) - _SHOWN_CLASSES} more")
    if (counts == 0).any():
        print(f"  {int((counts == 0).sum())} classes have no image")
    if records.empty_folders:
        shown = ", ".join(map(repr, records.empty_folders[:_SHOWN_FILES]))
        print(f"  {len(records.empty_folders)} folders hold no image: {shown}")


def _print_sizes(sizes: Counter[tuple[int, int]]) -> None:
    if not sizes:
        return
    shorter = [min(size) for size in sizes]
    widths, heights = zip(*sizes)
    print(
        f"sizes (width x height): {len(sizes)} different; width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}, "
        f"shorter side {min(shorter)} to {max(shorter)}"
    )
    most = sizes.most_common(_SHOWN_SIZES)
    for (width, height), count in most:
        print(f"  {f'{width}x{height}':>12s}  {count:8d}  {'#' * max(1, round(40 * count / most[0][1]))}")
    if len(sizes) > len(most):
        print(f"  ... and {len(sizes) - len(most)} other sizes")


def _print_unreadable(reasons: Sequence[str]) -> int:
    print(f"unreadable: {len(reasons)}")
    for reason in reasons[:_SHOWN_FILES]:
        print(f"  {reason}")
    if len(reasons) > _SHOWN_FILES:
        print(f"  ... and {len(reasons) - _SHOWN_FILES} more")
    return 1 if reasons else 0
