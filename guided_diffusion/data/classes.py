"""Class names -> the class numbers of a network that is there already; never by position among the folders at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .listing import Records, list_records, split_records

_SHOWN = 4


def number_of(word: str, names: Sequence[str], count: int) -> int | None:
    """The class that a word means to a network of `count` classes: one of `names`, else a number; None if it has no such class.

    A number means its class only where that class is not itself called by a number: of classes "7", "8" and "9", 0 is none.
    """
    if word in names:
        return names.index(word)
    if not _is_number(word) or int(word) >= count:
        return None
    number = int(word)
    return None if number < len(names) and _is_number(names[number]) else number


def choose_classes(text: str, count: int, names: Sequence[str], where: str = "--classes") -> tuple[int, ...]:
    """ "3,7" or "cat,dog" -> class numbers; "" -> all `count` of them. A name counts before a number.

    ValueError for classes that do not exist, beginning with `where`.
    """
    if not text:
        return tuple(range(count))
    if not count:
        raise ValueError(f"{where} is {text!r}, but this model knows no classes and there is no classifier")
    chosen = []
    for word in (part.strip() for part in text.split(",")):
        number = number_of(word, names, count)
        if number is None:
            known = f" or names such as {', '.join(names[:5])}" if names else ""
            raise ValueError(f"{where} has {word!r}; there are the numbers 0 to {count - 1}{known}")
        chosen.append(number)
    return tuple(chosen)


def renumber(
    records: Records, names: Sequence[str], count: int, whose: str, *, as_2021: bool = False, remedy: str = ""
) -> tuple[Records, str]:
    """(records with the class numbers of a network, what was done in words), for a network of `count` classes called `names`.

    The network knows its classes by name: those of the records are looked up; some may be absent, an unknown one is a ValueError
    that calls the network `whose` and ends with `remedy`. Numbers in a table are class numbers. A network without `names` (files of
    2021) knows numbers only: folders called by numbers are these, and as many classes as the network has are its classes in sorted
    order. `as_2021`: a run of 2021 goes on, whose classes are prefixes of file names in sorted order.
    """
    if records.labels is None:
        return records, ""
    used = np.unique(records.labels).tolist()
    own, prefix = records.class_names, records.label_source == "prefix"
    words = {k: own[k] if k < len(own) else str(k) for k in used}
    # A table of numbers calls each class by its number; folders and prefixes are names, even if they look like numbers.
    are_names = prefix or records.label_source == "folders"
    by_number = not own or (not are_names and own == tuple(map(str, range(len(own)))))
    as_many = len(own) == count or (prefix and as_2021 and len(own) < count)
    in_order = not names and not by_number and as_many and (prefix or not all(map(_is_number, words.values())))
    found: dict[int, int | None]
    if in_order:
        found = {k: k for k in used}
        order = f"the {len(own)} classes of {records.root} are its classes in sorted order, {some(own)}"
        note = f"{whose} has no class names: {order}"
    elif names and not by_number:
        found = {k: names.index(word) if word in names else None for k, word in words.items()}
        moved = any(k != found[k] for k in used)
        note = f"classes go by name: {some([f'{word} is {found[k]}' for k, word in words.items()])}" if moved else ""
    else:
        found = {k: number_of(word, names, count) for k, word in words.items()}
        note = "" if names and all(word in names for word in words.values()) else f"labels are class numbers of {whose}"
    # Two classes that would become one ("7" and "07") are refused like unknown ones.
    unknown = [words[k] for k in used if found[k] is None]
    if unknown or len(set(found.values())) < len(used):
        has = f"has the classes {some(names)}" if names else f"has {count} classes without names"
        table = "give a table of path and class" + (" name" if names else f" number, 0 to {count - 1}")
        raise ValueError(
            f"{records.root} has the classes {some(unknown or list(words.values()))}, which {whose} does not know: it {has}; "
            f"rename them, or {table} (--labels FILE.csv){remedy}"
        )
    absent = sorted(set(names) - {names[k] for k in found.values() if k is not None and k < len(names)})
    if absent:
        note += f"{'; ' if note else ''}no images of {len(absent)} of its classes: {some(absent)}"
    new_number = np.zeros(max(used, default=0) + 1, dtype=np.int64)
    new_number[used] = [found[k] for k in used]
    called = tuple(names) or (own if in_order else tuple(map(str, range(count))))
    return replace(records, labels=new_number[records.labels], class_names=called, empty_folders=()), note


def some(names: Sequence[str]) -> str:
    """ "ant, bee, cat, dog, ... (10)"."""
    return f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''} ({len(names)})"


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def training_records(
    data_dir: str, labels: str, *, known: Sequence[str] | None, count: int, whose: str, as_2021: bool, remedy: str
) -> tuple[Records, str]:
    """The labelled records of a folder, by the class numbers of the network that is trained on, and a note for the user or "".

    `known`: that network's classes, None for a new one; the others as in `renumber`.
    """
    records = list_records(data_dir, labels=labels)
    records.require_labels()
    return (records, "") if known is None else renumber(records, known, count, whose, as_2021=as_2021, remedy=remedy)


def hold_out(
    records: Records, val_data_dir: str, labels: str, *, fraction: float, seed: int
) -> tuple[Records, Records | None]:
    """(training, validation) records: the latter of a folder of their own, else a part of the former, else None."""
    if val_data_dir:
        held_out = list_records(val_data_dir, labels=labels)
        held_out, _ = renumber(held_out, records.class_names, len(records.class_names), records.root)
        held_out.require_labels()
        return records, held_out
    return split_records(records, fraction, seed) if fraction else (records, None)
