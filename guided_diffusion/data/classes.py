"""Map the classes of data to the class numbers of an existing network: by name, not by position among the folders of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .listing import Records, list_records, split_records

_SHOWN = 4


def number_of(word: str, names: Sequence[str], count: int) -> int | None:
    """The class number that `word` stands for in a network of `count` classes: a class name, else a class number; None if there is none.

    A number is refused if the class with that number is itself named by a number: with the classes "7", "8" and "9", "0" is none of them.
    """
    if word in names:
        return names.index(word)
    if not _is_number(word) or int(word) >= count:
        return None
    number = int(word)
    return None if number < len(names) and _is_number(names[number]) else number


def choose_classes(text: str, count: int, names: Sequence[str], where: str = "--classes") -> tuple[int, ...]:
    """ "3,7" or "cat,dog" -> class numbers; "" -> all `count` of them. A word that is both a name and a number is a name.

    ValueError for classes that do not exist; its message begins with `where`.
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
    """(records with the class numbers of a network, a note on what was done), for a network of `count` classes called `names`.

    Class names of the records are looked up in `names`. The records may lack classes of the network; a class unknown to it is a ValueError
    that calls the network `whose` and ends with `remedy`. Numbers in a table of labels are class numbers. Where the network has no class
    names (files of 2021), folders named by numbers are class numbers; other folders or prefixes, if they are `count`, are its classes in
    sorted order. `as_2021`: the run continues one of 2021, which numbered prefixes of file names so: then there may also be fewer.
    """
    if records.labels is None:
        return records, ""
    present, own_names = np.unique(records.labels).tolist(), records.class_names
    words = [own_names[k] if k < len(own_names) else str(k) for k in present]
    # In a table, numbers are class numbers; folders and prefixes are names, even where they look like numbers.
    by_prefix, by_folder = (records.label_source == source for source in ("prefix", "folders"))
    by_number = not own_names or (not (by_prefix or by_folder) and own_names == tuple(map(str, range(len(own_names)))))
    # A network without class names numbered its classes in sorted order: as many classes as it has are taken for these.
    as_many = len(own_names) == count or (by_prefix and as_2021 and len(own_names) < count)
    in_order = not names and not by_number and as_many and (by_prefix or not all(map(_is_number, words)))
    allowed = count if by_number or not names else 0  # class numbers accepted as words; 0: names only
    numbers: list[Any] = present if in_order else [number_of(word, names, allowed) for word in words]
    # Two words for one class ("7" and "07") are refused like unknown classes.
    unknown = [word for word, number in zip(words, numbers) if number is None]
    if unknown or len(set(numbers)) < len(present):
        has = f"has the classes {some(names)}" if names else f"has {count} classes without names"
        table = "give a table of path and class" + (" name" if names else f" number, 0 to {count - 1}")
        raise ValueError(
            f"{records.root} has the classes {some(unknown or words)}, which {whose} does not know: it {has}; "
            f"rename them, or {table} (--labels FILE.csv){remedy}"
        )
    notes = []
    if in_order:
        order = f"the {len(own_names)} classes of {records.root} are its classes in sorted order, {some(own_names)}"
        notes.append(f"{whose} has no class names: {order}")
    elif not set(words) <= set(names):
        notes.append(f"labels are class numbers of {whose}")
    elif numbers != present:
        notes.append(f"classes go by name: {some([f'{word} is {number}' for word, number in zip(words, numbers)])}")
    if absent := sorted(set(names) - {names[number] for number in numbers if number < len(names)}):
        notes.append(f"no images of {len(absent)} of its classes: {some(absent)}")
    new_number = np.zeros(max(present, default=0) + 1, dtype=np.int64)
    new_number[present] = numbers
    class_names = tuple(names) or (own_names if in_order else tuple(map(str, range(count))))
    labels = new_number[records.labels]
    return replace(records, labels=labels, class_names=class_names, empty_folders=()), "; ".join(notes)


def some(names: Sequence[str]) -> str:
    """The first names and their number: "ant, bee, cat, dog, ... (10)"."""
    return f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''} ({len(names)})"


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def hold_out(
    records: Records, val_data_dir: str, labels: str, *, fraction: float, seed: int
) -> tuple[Records, Records | None]:
    """(training, validation) records: validation is `val_data_dir`, else a `fraction` held out of `records`, else None."""
    if val_data_dir:
        held_out = list_records(val_data_dir, labels=labels)
        held_out, _ = renumber(held_out, records.class_names, len(records.class_names), records.root)
        held_out.require_labels()
        return records, held_out
    return split_records(records, fraction, seed) if fraction else (records, None)
