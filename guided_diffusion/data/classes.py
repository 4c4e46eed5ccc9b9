"""Class names -> the class numbers of a network that is there already; never by position among the folders at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
    used, listed, prefix = np.unique(records.labels).tolist(), records.class_names, records.label_source == "prefix"
    words = [listed[k] if k < len(listed) else str(k) for k in used]
    # A table of numbers calls each class by its number; folders and prefixes are names, even if they look like numbers.
    are_names = prefix or records.label_source == "folders"
    by_number = not listed or (not are_names and listed == tuple(map(str, range(len(listed)))))
    as_many = len(listed) == count or (prefix and as_2021 and len(listed) < count)
    in_order = not names and not by_number and as_many and (prefix or not all(map(_is_number, words)))
    allowed = count if by_number or not names else 0  # numbers; 0: they would be names
    numbers: list[Any] = used if in_order else [number_of(word, names, allowed) for word in words]
    # Two classes that would become one ("7" and "07") are refused like unknown ones.
    unknown = [word for word, number in zip(words, numbers) if number is None]
    if unknown or len(set(numbers)) < len(used):
        has = f"has the classes {some(names)}" if names else f"has {count} classes without names"
        table = "give a table of path and class" + (" name" if names else f" number, 0 to {count - 1}")
        raise ValueError(
            f"{records.root} has the classes {some(unknown or words)}, which {whose} does not know: it {has}; "
            f"rename them, or {table} (--labels FILE.csv){remedy}"
        )
    notes = []
    if in_order:
        order = f"the {len(listed)} classes of {records.root} are its classes in sorted order, {some(listed)}"
        notes.append(f"{whose} has no class names: {order}")
    elif not set(words) <= set(names):
        notes.append(f"labels are class numbers of {whose}")
    elif numbers != used:
        notes.append(f"classes go by name: {some([f'{word} is {number}' for word, number in zip(words, numbers)])}")
    if absent := sorted(set(names) - {names[number] for number in numbers if number < len(names)}):
        notes.append(f"no images of {len(absent)} of its classes: {some(absent)}")
    new_number = np.zeros(max(used, default=0) + 1, dtype=np.int64)
    new_number[used] = numbers
    class_names = tuple(names) or (listed if in_order else tuple(map(str, range(count))))
    labels = new_number[records.labels]
    return replace(records, labels=labels, class_names=class_names, empty_folders=()), "; ".join(notes)


def some(names: Sequence[str]) -> str:
    """ "ant, bee, cat, dog, ... (10)"."""
    return f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''} ({len(names)})"


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


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
