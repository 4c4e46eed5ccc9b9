"""Flags: a parser made from configs. Loads no torch."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

from ..config.fields import RENAMED
from .extensions import ImportProgram, names_of
from .flag_dicts import str2bool


class UsageError(ValueError):
    """A flag that does not exist or has an impossible value; the message is for the user."""


class Parsed(NamedTuple):
    """What the user asked for."""

    flags: dict[str, Any]  # every flag: typed, else from --config, else the default
    typed: dict[str, Any]  # only those on the command line or in --config


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process; every command has --import."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument("--import", action=ImportProgram)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def parse(
    argv: Sequence[str] | None,
    configs: Sequence[type],
    *,
    program: str,
    description: str,
    extra: Mapping[str, tuple[Any, str]] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Parsed:
    """Read flags that belong to the dataclasses `configs` and to `extra` (name -> (default, help)).

    `--config FILE` gives values from a JSON file: flags, sections, or the file beside a checkpoint. Typed flags win over
    the file, the file over `defaults`, those over the configs' own. `--save-interval` and `--save_interval` are one flag.
    """
    known = _table(configs, {**COMMON, **(extra or {})}, defaults or {})
    parser = Parser(prog=program, description=description, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument("--config", metavar="FILE", help="JSON file with values for the flags below")
    helps = not {"-h", "--help"}.isdisjoint(sys.argv[1:] if argv is None else argv)
    for name, (default, help, choices, auto, table) in known.items():
        if table and helps:
            choices = names_of(table)
        told = f"{help}" + (f" [{', '.join(str(c) or 'empty' for c in choices)}]" if choices else "")
        told = (told + f" (default {default!r})").replace("%", "%%")
        if isinstance(default, bool):  # a bare --flag says True
            options: dict[str, Any] = {"type": str2bool, "metavar": "bool", "nargs": "?", "const": True}
        elif auto is not None:
            options = {"type": int_or_auto, "metavar": "int" if isinstance(auto, str) else "int|auto"}
        else:
            options = {"type": type(default), "metavar": type(default).__name__}
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=told, **options)
    renamed = {f"--{old}": f"--{now}" for old, now in RENAMED.items() if now in known}
    arguments, unknown = parser.parse_known_args(_underscored(sys.argv[1:] if argv is None else argv, renamed))
    if unknown:
        raise UsageError(_unknown(unknown[0], known))
    typed = {key: value for key, value in vars(arguments).items() if key != "config"}
    if arguments.config:
        from ..config import changed, laid_over
        from ..runtime.launchers import first_of_machine

        stored, given = _from_file(arguments.config, known), typed
        typed = laid_over(stored, given)
        now = {**{name: entry.default for name, entry in known.items()}, **typed}
        for sentence in changed(stored, given, now) if first_of_machine(os.environ) else ():
            print(f"note: --config {arguments.config}: {sentence}", file=sys.stderr)
    typed = {name: _without_auto(name, value, known[name].auto) for name, value in typed.items()}
    for name, value in typed.items():
        choices = known[name].choices
        if choices and value not in choices:
            raise UsageError(
                f"--{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}{near(value, choices)}"
            )
    return Parsed({**{name: entry.default for name, entry in known.items()}, **typed}, typed)


def int_or_auto(text: str) -> int | str:
    """A whole number, or the word auto as it is."""
    if text.lower() == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def _without_auto(name: str, value: Any, auto: int | str | None) -> Any:
    """`value`, or the number that the word auto stands for; UsageError where `auto` says why it stands for none."""
    if auto is None or not isinstance(value, str) or value.lower() != "auto":
        return value
    if isinstance(auto, str):
        raise UsageError(f"--{name} is 'auto', but {auto}")
    return auto


# Flags of every command that starts processes.
COMMON: dict[str, tuple[Any, str]] = {
    "device": ("auto", "auto, cpu or cuda"),
    "debug": (False, "show where an error came from"),
}


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=120)


class _Entry(NamedTuple):
    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    auto: int | str | None = None  # as in config.fields.flag, like the next
    table: str = ""


def _table(
    configs: Sequence[type], extra: Mapping[str, tuple[Any, str]], defaults: Mapping[str, Any]
) -> dict[str, _Entry]:
    known: dict[str, _Entry] = {}
    for config in configs:
        for f in fields(config):
            if f.name not in known:
                told: dict[str, Any] = {key: f.metadata.get(key) for key in ("choices", "auto", "table")}
                known[f.name] = _Entry(defaults.get(f.name, f.default), f.metadata.get("help", ""), **told)
    known.update({name: _Entry(defaults.get(name, default), help) for name, (default, help) in extra.items()})
    return known


def _underscored(argv: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """--save-interval=5 -> --save_interval=5, and `renamed` flags by their present name; values stay as they are."""
    fixed = []
    for word in argv:
        name, equals, value = word.partition("=")
        name = "--" + name[2:].replace("-", "_") if name.startswith("--") else name
        fixed.append(renamed.get(name, name) + equals + value)
    return fixed


def _from_file(path: str, known: Mapping[str, _Entry]) -> dict[str, Any]:
    from ..config import flatten
    from ..runtime import storage

    try:
        values = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {path}: there is no such file") from None
    except ValueError as error:
        raise UsageError(f"--config {path} is no JSON file: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold an object of flags or sections, not a {type(values).__name__}")
    values = values["config"] if isinstance(values.get("config"), dict) else values
    # In the file of another command (a training run's, given to `sample`) the sections on data and training are not meant.
    foreign = [
        name for name in ("data", "train") if isinstance(values.get(name), dict) and set(values[name]) - set(known)
    ]
    if set(values) <= {"model", "diffusion", "data", "train"} and "data_dir" not in known:
        values = {name: section for name, section in values.items() if name not in foreign}
    flat = {
        name: storage.expand(value) if isinstance(value, str) and value.startswith("~") else value
        for name, value in flatten(values).items()
    }
    if isinstance(values.get("train"), dict):  # a stored run's: what it was once started from is no instruction
        flat.pop("resume_checkpoint", None)
    for name in flat:
        if name not in known:
            raise UsageError(f"--config {path}: {_unknown('--' + name, known)}")
    return flat


def _unknown(word: str, known: Mapping[str, _Entry]) -> str:
    name = word.partition("=")[0]
    if not name.startswith("--"):
        return f"{word!r} is neither a flag nor the value of one; flags are spelled --name value"
    return f"there is no flag {name}{near(name[2:], known, '--')}"


def near(value: object, allowed: Iterable[object], prefix: str = "") -> str:
    """ " (did you mean ...?)" where one of the `allowed` is similar, else nothing."""
    found = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {prefix}{found[0]}?)" if found else ""
