"""Building blocks of configurations: fields with help, choices and limits; sections that are read from flags or dicts and checked."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar

Numbers = tuple[float, ...]
RENAMED = {"checkpoint": "recompute"}
"""Name in earlier versions -> present name. The earlier ones are still read, on the command line and in saved configurations."""
SWITCH: dict[str, Any] = {"auto": "auto", "on": True, "off": False}
"""Word of a flag that may be left to the program -> the argument it stands for."""
SWITCHES = ("compile", "cuda_graphs")
"""The flags with the words of `SWITCH`. In earlier versions they were True or False, which is still read as on or off."""
C = TypeVar("C", bound="Section")


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    auto: int | None = None,
    no_auto: str = "",
    table: str = "",
) -> Any:
    """A field and its flag.

    auto     the number that the word auto stands for on a command line
    no_auto  the error for the word auto, where users expect it and there is none
    table    MODULE:NAME of the dict whose keys are the choices, or several. Programs may add more, so the value is checked when it is used
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "low": low, "high": high}
    metadata |= {"auto": auto, "no_auto": no_auto, "table": table}
    return field(default=default, metadata=metadata)


def numbers(text: str | Iterable[Any], flag: str, *counts: int) -> Numbers:
    """ "0.5,1, 2" or a sequence -> (0.5, 1, 2); whole numbers come back as int.

    ValueError naming the flag where they are no numbers or, with `counts`, not as many as one of these.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    try:
        values = [float(part) for part in parts if str(part).strip()]
        if not all(map(math.isfinite, values)):
            raise ValueError("not finite")
    except ValueError:
        raise ValueError(f"--{flag} is {text!r}; it must be numbers separated by commas, such as 32,16,8") from None
    if counts and len(values) not in counts:
        raise ValueError(f"--{flag} is {text!r}; it must be {' or '.join(map(str, counts))} numbers")
    return tuple(int(value) if value == int(value) else value for value in values)


def options(text: str, flag: str) -> dict[str, Any]:
    """ "depth=6,width=384,norm=layer" -> {"depth": 6, "width": 384, "norm": "layer"}. ValueError names the flag."""
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, word = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--{flag} is {text!r}; it must be names with values, such as depth=6,width=384")
        values[name] = word
        with contextlib.suppress(ValueError, SyntaxError):  # a number or a truth value; else it is text
            values[name] = ast.literal_eval(word)
    return values


class Section:
    """A part of a configuration. `from_flags` and `from_dict` check what they read; call `validate` after `replace`."""

    def validate(self: C) -> C:
        """Return self if every value is possible, else raise ValueError naming flag, value and what is allowed."""
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if requirement := _broken_requirement(f, value):
                raise ValueError(f"--{f.name} is {value!r}; it must be {requirement}")
        self._check()
        return self

    def _check(self) -> None:
        """Raise ValueError if fields contradict each other."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_flags(cls: type[C], flags: Mapping[str, Any]) -> C:
        """Read the fields of this section from `flags`. Other flags are ignored; missing ones keep their default."""
        flags = as_now(flags)
        return cls(**{name: flags[name] for name in cls.names() if name in flags}).validate()

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`. ValueError for a key that is no field: a file of a newer version, or a typing error."""
        values = as_now(values)
        unknown = sorted(set(values) - set(cls.names()))
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(cls.names())}")
        return cls.from_flags(values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def _broken_requirement(f: Field[Any], value: Any) -> str:
    """The requirement of field `f` that `value` breaks, to complete "it must be ..."; "" if it breaks none."""
    kind, choices, low, high = type(f.default), *(f.metadata.get(key) for key in ("choices", "low", "high"))
    # An int is a valid float, but a bool, though a subclass of int, is no valid number.
    if kind in _TYPE_NAMES and type(value) is not kind and (kind, type(value)) != (float, int):
        return _TYPE_NAMES[kind]
    if choices and value not in choices:
        return f"one of {', '.join(map(repr, choices))}"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if (low is None or value >= low) and (high is None or value <= high):
        return ""
    bounds = {"at least": low, "at most": high}
    return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)


_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """{section: {flag: value}} or {flag: value} -> {flag: value}. Also reads a checkpoint's JSON, which has these under "config"."""
    values = values["config"] if isinstance(values.get("config"), Mapping) else values
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    return as_now(flat)


def as_now(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags by their present names and values, where `flags` may have those of an earlier version."""
    words = {True: "on", False: "off"}
    return {
        present_name(name, value): words[value] if name in SWITCHES and isinstance(value, bool) else value
        for name, value in flags.items()
    }


def present_name(name: str, value: Any) -> str:
    """The flag that an earlier version called `name`; `value` as typed or stored, as --grid with a number is --picture now."""
    return "picture" if name == "grid" and str(value).isdecimal() else RENAMED.get(name, name)
