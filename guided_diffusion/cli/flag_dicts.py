"""Flags from dicts of defaults, as the 2021 scripts read them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def str2bool(v: str | bool) -> bool:
    """Read a boolean as the 2021 scripts did: yes true t y 1, no false f n 0, in any case."""
    if isinstance(v, bool):
        return v
    if v.lower() in _TRUE:
        return True
    if v.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"boolean value expected, not {v!r}; say one of {' '.join(_TRUE + _FALSE)}")


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add one `--key` per entry, of the type of its default; None reads as text, booleans through `str2bool`."""
    for key, default in default_dict.items():
        read: Any = str2bool if isinstance(default, bool) else str if default is None else type(default)
        parser.add_argument(f"--{key}", default=default, type=read)


def args_to_dict(args: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The attributes `keys` of parsed arguments (or any object) as a dict."""
    return {key: getattr(args, key) for key in keys}
