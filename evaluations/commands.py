"""What the four commands share: parsing, common options, and checks of output paths before the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from guided_diffusion.runtime import launchers

from .settings import Settings


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def add_common(self) -> None:
        """The options of all commands that compute features."""
        add = self.add_argument
        add("--weights", help="Inception weights (.pb or .pth); default: working directory, cache, else download")
        add("--allow_other_weights", action="store_true", help="accept weights that are not the published ones")
        add("--batch_size", type=int, help="images read at a time; changes no number (default 64)")
        add("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
        add("--shard_dir", metavar="FOLDER", help="keep features there: to resume, to share work, for later runs")
        add("--quiet", dest="progress", action="store_false", help="no progress bars")


def settings_of(asked: argparse.Namespace) -> Settings:
    """The settings of a parsed command line; options that are not given keep the defaults of `Settings`."""
    given = {field.name: getattr(asked, field.name, None) for field in fields(Settings)}
    return Settings(**{name: value for name, value in given.items() if value is not None})


def place() -> launchers.Place:
    """Rank and number of processes from the variables of torchrun, Open MPI, MPICH/Intel MPI or srun; one process without them."""
    return launchers.discover(os.environ)


def announce_place() -> None:
    """Print a line on stderr if the environment says that there are several processes: it may be wrong, left over in a shell or job."""
    world = place()
    if world.size == 1:
        return
    rank, size = world.variables
    then = f"it waits for the shares of {world.size - 1} more" if world.rank == 0 else "process 0 prints the scores"
    print(
        f"process {world.rank} of {world.size}, as {rank}={world.rank} and {size}={world.size} say: {then}. "
        f"To run alone, unset {rank} and {size}",
        file=sys.stderr,
        flush=True,
    )


def check_file(option: str, path: str | None, inputs: Sequence[str | None]) -> None:
    """ValueError when `path` is given and cannot be written, or is the same file as one of `inputs`."""
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{option} {path}: there is no folder to write it into; make {folder!r} first")
    if os.path.isdir(path):
        raise ValueError(f"{option} {path}: is a folder; give the name of a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: no permission to write into {folder!r}")
    if os.path.exists(path) and any(name and os.path.exists(name) and os.path.samefile(path, name) for name in inputs):
        raise ValueError(f"{option} {path}: would replace a file that is read; give another name")


def check_folder(option: str, path: str | None) -> None:
    """ValueError when `path` is given and is neither a writable folder nor can be created."""
    if not path:
        return
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise ValueError(f"{option} {path}: {existing!r} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{option} {path}: no permission to write into {existing!r}")
