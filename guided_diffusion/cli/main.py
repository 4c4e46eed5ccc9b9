"""The `guided-diffusion` command: its first word is a subcommand, the rest are that subcommand's arguments."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

from ..runtime import storage
from . import runs
from .arguments import near

# subcommand -> ("MODULE:FUNCTION", its keyword arguments, help); imported when it runs, so that --help does not load torch
COMMANDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "train": ("train:main", {"kind": "diffusion"}, "train a diffusion model on a folder of images"),
    "train-classifier": ("train:main", {"kind": "classifier"}, "train a classifier of noised images, for guidance"),
    "train-upsampler": ("train:main", {"kind": "super_resolution"}, "train a model that enlarges images"),
    "sample": ("sample:main", {}, "make images from weights, with or without guidance"),
    "sweep": ("sweep:main", {}, "samplers, steps and scales compared: samples, scores, table, pictures"),
    "noise-levels": ("sweep:noise_levels", {}, "where a classifier can guide: accuracy and gradient by noise level"),
    "upsample": ("upsample:main", {}, "enlarge samples or a folder of images"),
    "cascade": ("upsample:cascade", {}, "small images from noise, then enlarged, in one command"),
    "nll": ("likelihood:main", {}, "bits per dimension of images, with an error bar"),
    "data": ("data:main", {}, "look at a folder of images, or pack it"),
    "inspect": ("weight_files:inspect", {}, "what a file of weights is"),
    "convert": ("weight_files:convert", {}, "weights to and from safetensors and diffusers; measures the difference"),
    "ema": ("weight_files:ema", {}, "averages of weights of any length, after training"),
    "features": ("weight_files:features", {}, "what a classifier sees in images, as an npz that can be scored"),
    "zoo": ("weight_files:zoo", {}, "the models released in 2021: list, show, get"),
    "reproduce": ("reproduce:main", {}, "a published figure, from released weights to the score"),
    "doctor": ("doctor:main", {}, "check this machine: devices, processes, packages"),
    "demo": ("demo:main", {}, "the whole journey on handwritten digits, in minutes, without a download"),
}
# The scripts of 2021, with their flags and defaults: name -> ("MODULE:FUNCTION", its keyword arguments).
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "image_train": ("train:main", {"kind": "diffusion"}),
    "classifier_train": ("train:main", {"kind": "classifier"}),
    "super_res_train": ("train:main", {"kind": "super_resolution"}),
    "image_sample": ("sample:main", {}),
    "classifier_sample": ("sample:main", {"guided": True}),
    "super_res_sample": ("upsample:main", {}),
    "image_nll": ("likelihood:main", {}),
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
        name, options, _ = COMMANDS[words[0]]
        return _run(name, rest, f"guided-diffusion {words[0]}", **options)

    return runs.guarded(command, words[1:])


def script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run `scripts/NAME.py`; returns the exit code."""
    function, options = SCRIPTS[name]
    return runs.guarded(lambda words: _run(function, words, f"{name}.py", script=True, **options), argv)


def _run(name: str, argv: Sequence[str], program: str, **options: Any) -> int:
    return pkgutil.resolve_name(f"{__package__}.{name}")(argv, program, **options)


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
