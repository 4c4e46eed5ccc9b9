"""The `guided-diffusion` command: one word chooses what to do, the rest are that command's flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ..runtime import storage
from . import runs
from .arguments import near

# word -> (module, function, what it does); modules are loaded when chosen, so that --help needs no torch
COMMANDS = {
    "train": (".train", "main", "train a diffusion model on a folder of images"),
    "train-classifier": (".train", "main_classifier", "train a classifier of noised images, for guidance"),
    "train-upsampler": (".upsample", "main_train", "train a model that enlarges images"),
    "sample": (".sample", "main", "make images from weights, with or without guidance"),
    "upsample": (".upsample", "main", "enlarge samples or a folder of images"),
    "cascade": (".cascade", "main", "small images from noise, then enlarged, in one command"),
    "nll": (".likelihood", "main", "bits per dimension of images, with an error bar"),
    "data": (".data", "main", "look at a folder of images, or pack it"),
    "inspect": (".inspect", "main", "what a file of weights is"),
    "convert": (".convert", "main", "weights to and from safetensors and diffusers, with the difference measured"),
    "features": (".features", "main", "what a classifier sees in images, as an npz that can be scored"),
    "zoo": (".zoo", "main", "the models released in 2021: list, show, get"),
    "reproduce": (".reproduce", "main", "a published figure, from released weights to the score"),
    "doctor": (".doctor", "main", "check this machine: devices, processes, packages"),
    "demo": (".demo", "main", "the whole journey on handwritten digits, in minutes, without a download"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `guided-diffusion COMMAND ...`; returns the exit code."""
    words = storage.command_words(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else runs.USER_ERROR
    if words[0] == "--version":
        print(_version())
        return 0

    def command(rest: Sequence[str] | None) -> int:
        if words[0] not in COMMANDS:
            raise ValueError(f"there is no command {words[0]!r}{near(words[0], COMMANDS)}; see guided-diffusion --help")
        module, function, _ = COMMANDS[words[0]]
        return int(getattr(import_module(module, __package__), function)(rest) or 0)

    return runs.guarded(command, words[1:])


def usage() -> str:
    """The text of --help."""
    lines = [f"  {word:18s}{what}" for word, (_, _, what) in COMMANDS.items()]
    first = "usage: guided-diffusion COMMAND [--flag value ...]"
    return "\n".join([first, "", *lines, "", "guided-diffusion COMMAND --help lists a command's flags"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("guided-diffusion")
    except PackageNotFoundError:
        return "guided-diffusion (not installed, run from its folder)"
