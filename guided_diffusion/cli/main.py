"""The `guided-diffusion` command: one word chooses what to do, the rest are that command's flags."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..runtime import storage
from . import runs
from .arguments import near

# word -> (module, options of its function main, what it does); modules are loaded when chosen, so that --help needs no torch
COMMANDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "train": ("train", {"kind": "diffusion"}, "train a diffusion model on a folder of images"),
    "train-classifier": ("train", {"kind": "classifier"}, "train a classifier of noised images, for guidance"),
    "train-upsampler": ("train", {"kind": "super_resolution"}, "train a model that enlarges images"),
    "sample": ("sample", {}, "make images from weights, with or without guidance"),
    "upsample": ("upsample", {}, "enlarge samples or a folder of images"),
    "cascade": ("cascade", {}, "small images from noise, then enlarged, in one command"),
    "nll": ("likelihood", {}, "bits per dimension of images, with an error bar"),
    "data": ("data", {}, "look at a folder of images, or pack it"),
    "inspect": ("inspect", {}, "what a file of weights is"),
    "convert": ("convert", {}, "weights to and from safetensors and diffusers, with the difference measured"),
    "features": ("features", {}, "what a classifier sees in images, as an npz that can be scored"),
    "zoo": ("zoo", {}, "the models released in 2021: list, show, get"),
    "reproduce": ("reproduce", {}, "a published figure, from released weights to the score"),
    "doctor": ("doctor", {}, "check this machine: devices, processes, packages"),
    "demo": ("demo", {}, "the whole journey on handwritten digits, in minutes, without a download"),
}
# The scripts of 2021, with its flags and defaults: name -> (module, options of its function main).
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "image_train": ("train", {"kind": "diffusion"}),
    "classifier_train": ("train", {"kind": "classifier"}),
    "super_res_train": ("train", {"kind": "super_resolution"}),
    "image_sample": ("sample", {}),
    "classifier_sample": ("sample", {"guided": True}),
    "super_res_sample": ("upsample", {}),
    "image_nll": ("likelihood", {}),
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

    def command(rest: Sequence[str]) -> int:
        if words[0] not in COMMANDS:
            raise ValueError(f"there is no command {words[0]!r}{near(words[0], COMMANDS)}; see guided-diffusion --help")
        module, options, _ = COMMANDS[words[0]]
        return _main_of(module)(rest, f"guided-diffusion {words[0]}", **options)

    return runs.guarded(command, words[1:])


def script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run `scripts/NAME.py`; returns the exit code."""
    module, options = SCRIPTS[name]
    return runs.guarded(lambda words: _main_of(module)(words, f"{name}.py", script=True, **options), argv)


def _main_of(module: str) -> Callable[..., int]:
    function: Callable[..., int] = import_module(f".{module}", __package__).main
    return function


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
