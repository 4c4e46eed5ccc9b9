"""`guided-diffusion data check DIR` tests every image before a run; `guided-diffusion data pack DIR OUT` decodes and crops them once."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .arguments import Parser

if TYPE_CHECKING:
    from ..data.listing import Records


def main(argv: Sequence[str], program: str) -> int:
    """Run `data check` or `data pack` (argv: the words after `data`); returns the exit code."""
    commands = {"check": check, "pack": pack}
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program} {{{','.join(commands)}}} ...\n\n{__doc__}")
        return 0 if argv else 2
    if argv[0] not in commands:
        raise ValueError(f"data: unknown command {argv[0]!r}; must be one of {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def check(argv: Sequence[str]) -> int:
    """Decode every image and print what the folder holds. Exit code 1 if some images cannot be read."""
    args = _parser("check", check.__doc__).parse_args(argv)
    records, bar = _list_images(args)
    from ..data import check as checking

    with bar:
        findings = checking.check(records, workers=max(1, args.workers), progress=bar.update)
    print("\n".join(checking.describe_findings(records, findings)))
    return 1 if findings.unreadable else 0


def pack(argv: Sequence[str]) -> int:
    """Crop every image once, as training would (center crop), and write plain arrays that load without decoding."""
    parser = _parser("pack", pack.__doc__)
    parser.add_argument("out", help="new folder to write")
    side = "side in pixels, or HEIGHTxWIDTH; for random crops 1.25 x the training size"
    parser.flag("size", "", side, type=_size, required=True)
    parser.flag("channels", 3, "1 grey, 2 grey + alpha, 3 RGB, 4 RGBA", choices=(1, 2, 3, 4))
    parser.flag("skip-unreadable", False, "leave out images that cannot be read instead of stopping")
    args = parser.parse_args(argv)
    records, bar = _list_images(args)
    from ..data import packed

    on_error = "skip" if args.skip_unreadable else "raise"
    options = {"channels": args.channels, "workers": args.workers, "progress": bar.update}
    with bar:
        done = packed.pack(records, args.out, args.size, on_error=on_error, **options)
    print(f"packed {len(done)} images to {done.root}: {done.preprocessing}")
    for reason in packed.read_packed_index(done.root)["skipped"][:50]:
        print(f"  left out: {reason}")
    return 0


def _parser(command: str, description: str | None) -> Parser:
    parser = Parser(f"guided-diffusion data {command}", description, allow_abbrev=True)
    source = "folder of images, .zip with dataset.json, (folder of) WebDataset .tar, LSUN lmdb, packed folder"
    parser.add_argument("source", help=source)
    parser.flag("labels", "auto", "auto, folders, prefix, none, or a csv/json file")
    parser.flag("workers", 4, "threads that decode")
    parser.flag("quiet", False, "no progress bar")
    return parser


def _size(text: str) -> int | tuple[int, int]:
    if not re.fullmatch(r"\s*0*[1-9][0-9]*(\s*x\s*0*[1-9][0-9]*)?\s*", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a side like 64 or HEIGHTxWIDTH like 64x96")
    height, *width = (int(side) for side in text.lower().split("x"))
    return (height, width[0]) if width else height


def _list_images(args: argparse.Namespace) -> tuple[Records, Any]:
    """List and describe the images of `args.source`; returns their records and a progress bar over them."""
    from tqdm import tqdm

    from ..data.check import describe_records
    from ..data.listing import list_records

    records = list_records(args.source, labels=args.labels)
    print("\n".join(describe_records(records)))
    return records, tqdm(total=len(records), disable=args.quiet, unit="image", file=sys.stderr)
