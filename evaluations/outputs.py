"""What is asked, and files that will be written: what cannot be is refused before the work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def check_file(option: str, path: str, inputs: Sequence[str] = ()) -> None:
    """ValueError when `path` cannot be written, or is one of the files that are read."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{option} {path}: there is no folder to write it into; make {folder!r} first")
    if os.path.isdir(path):
        raise ValueError(f"{option} {path}: is a folder; give the name of a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: no permission to write into {folder!r}")
    if os.path.exists(path) and any(os.path.exists(name) and os.path.samefile(path, name) for name in inputs):
        raise ValueError(f"{option} {path}: would replace a file that is read; give another name")


def check_folder(option: str, path: str) -> None:
    """ValueError when `path` is not a folder that can be written, and cannot be made either."""
    found = os.path.abspath(path)
    while not os.path.lexists(found):
        found = os.path.dirname(found)
    if not os.path.isdir(found):
        raise ValueError(f"{option} {path}: {found!r} is a file; give a folder")
    if not os.access(found, os.W_OK):
        raise ValueError(f"{option} {path}: no permission to write into {found!r}")
