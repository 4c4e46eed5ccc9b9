"""`--import`: programs of the user that add networks, schedules, weights and the like to the tables before a command runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from typing import Any

_HELP = (
    "program (FILE.py, or a module's name) to run first: it may add to ARCHITECTURES, SCHEDULES ... (docs/extending.md)"
)


class ImportProgram(argparse.Action):
    """The flag: what it names is imported as soon as it is read."""

    def __init__(self, option_strings: Any, dest: str) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, metavar="FILE", help=_HELP)

    def __call__(self, parser: Any, namespace: Any, program: Any, option_string: Any = None) -> None:
        if program.endswith(".py"):
            _import_file(program)
            return
        try:
            importlib.import_module(program)
        except ModuleNotFoundError as error:
            if error.name != program.partition(".")[0]:
                raise
            raise ValueError(f"--import {program}: there is no such module; give FILE.py or an installed one") from None


def _import_file(path: str) -> None:
    name = os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise ValueError(f"--import {path}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    # What it defines can be found again by its name, here and in processes that read images: pickle does so.
    sys.modules[name] = module
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    spec.loader.exec_module(module)


def names_of(table: str) -> tuple[str, ...]:
    """The keys of a table given as MODULE:NAME; loads the module."""
    module, _, name = table.partition(":")
    return tuple(getattr(importlib.import_module(f"..{module}", __package__), name))
