"""Which class a picture belongs to: from its folder, its name, or a table.

Everything works on names relative to the root, `/` between parts, and returns `Labels`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..runtime import storage

_SHOWN = 5
# EDM and StyleGAN write 00000/img00000000.png and say the classes in dataset.json: their folders are no classes.
_NUMBERED_FILE = re.compile(r"(?:^|.*/)\d{5}/img\d{8}\.\w+$")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "name")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "y", "target")

Label = int | str


class Labels(NamedTuple):
    """`numbers` int64 `[N]` or None without labels; class `k` is called `class_names[k]`; `source` says where they come from."""

    numbers: np.ndarray | None
    class_names: tuple[str, ...]
    source: str


NONE = Labels(None, (), "none")


def from_names(values: Sequence[str], source: str) -> Labels:
    """Number classes in the sorted order of their names."""
    class_names = tuple(sorted(set(values)))
    number = {name: k for k, name in enumerate(class_names)}
    return Labels(np.fromiter((number[value] for value in values), np.int64, len(values)), class_names, source)


def by_prefix(names: Sequence[str]) -> Labels:
    """The text before the first `_` of the file name, as in 2021 (a name without `_` is its own class, extension and all)."""
    return from_names([name.rsplit("/", 1)[-1].split("_")[0] for name in names], "prefix")


def by_folder(names: Sequence[str]) -> Labels:
    """The folder, relative to the root. ValueError if a picture lies in the root itself."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(
            f"labels='folders': {len(loose)} of {len(names)} images lie in no sub-folder{first(loose)}; "
            "move them into one folder per class, or use labels='prefix', 'none' or a csv/json file"
        )
    return from_names([name.rsplit("/", 1)[0] for name in names], "folders")


def detect(names: Sequence[str]) -> Labels:
    """Folders where every picture lies in one of at least two; else prefixes where they look like classes; else none."""
    if names and all(_NUMBERED_FILE.match(name) for name in names):
        return NONE
    if all("/" in name for name in names):
        labels = by_folder(names)
        if len(labels.class_names) > 1:
            return labels
    if all("_" in name.rsplit("/", 1)[-1] for name in names):
        labels = by_prefix(names)
        # One prefix is a camera ("IMG_0001"), a prefix of its own per file a serial number ("0001_small").
        if 1 < len(labels.class_names) < len(names):
            return labels
    return NONE


def from_file(path: str, names: Sequence[str]) -> Labels:
    """Read a `.csv` (path,label; header optional) or `.json` (`{"labels": [[path, label], ...]}` or `{path: label}`) table.

    ValueError if the table and the pictures do not match one to one.
    """
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        allowed = "'auto', 'folders', 'prefix', 'none' or the path of a csv/json file"
        raise ValueError(f"labels={path!r}: no such file; must be {allowed}") from None
    table = parse(text, path, is_json=path.lower().endswith(".json"))
    return NONE if table is None else match(table, names, path)


def parse(text: str, source: str, *, is_json: bool) -> dict[str, Label] | None:
    """The text of a label table -> {name: label}; None if it says that there are no labels (EDM's `"labels": null`)."""
    rows = _json_rows(text, source) if is_json else _csv_rows(text, source)
    if rows is None:
        return None
    table: dict[str, Label] = {}
    for name, label in rows:
        key = name.replace("\\", "/").removeprefix("./")
        if table.setdefault(key, label) != label:
            raise ValueError(f"{source}: {key!r} has two labels, {table[key]!r} and {label!r}")
    return table


def _json_rows(text: str, source: str) -> list[tuple[str, Label]] | None:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None
    if isinstance(data, dict) and "labels" in data and not isinstance(data["labels"], (str, int)):
        data = data["labels"]
        if data is None:
            return None
    rows = list(data.items()) if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, (list, tuple)) and len(row) == 2 for row in rows):
        raise ValueError(f'{source}: must be {{"labels": [[path, label], ...]}} or {{path: label, ...}}')
    for name, label in rows:
        if not isinstance(name, str) or isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"{source}: entry [{name!r}, {label!r}]: must be a path and a class number or name")
    return [(name, label) for name, label in rows]


def _csv_rows(text: str, source: str) -> list[tuple[str, Label]]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row and any(cell.strip() for cell in row)]
    path_at, label_at = 0, 1
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    if any(cell in _PATH_COLUMNS for cell in head) and any(cell in _LABEL_COLUMNS for cell in head):
        path_at = next(k for k, cell in enumerate(head) if cell in _PATH_COLUMNS)
        label_at = next(k for k, cell in enumerate(head) if cell in _LABEL_COLUMNS)
        rows = rows[1:]
    short = [",".join(row) for row in rows if len(row) <= max(path_at, label_at)]
    if short:
        raise ValueError(f"{source}: {len(short)} rows lack a path or a label{first(short)}")
    cells = [(row[path_at].strip(), row[label_at].strip()) for row in rows]
    # Numbers only if all are: 'n01440764' beside '7' are two names.
    numeric = all(re.fullmatch(r"\d+", label) for _, label in cells)
    return [(name, int(label) if numeric else label) for name, label in cells]


def match(table: Mapping[str, Label], names: Sequence[str], source: str) -> Labels:
    """Put a table beside the pictures. Class numbers stay as they are; names are numbered in sorted order."""
    known = set(names)
    missing = [name for name in table if name not in known]
    unlabeled = [name for name in names if name not in table]
    if missing or unlabeled:
        problems = []
        if missing:
            problems.append(f"{len(missing)} of its {len(table)} entries name no image{first(missing)}")
        if unlabeled:
            problems.append(f"{len(unlabeled)} of {len(names)} images have no label{first(unlabeled)}")
        raise ValueError(f"{source}: {'; '.join(problems)}; paths are relative to the data folder")
    values = [table[name] for name in names]
    if all(isinstance(value, int) for value in values):
        numbers = np.array(values, dtype=np.int64)
        if len(numbers) and numbers.min() < 0:
            raise ValueError(f"{source}: label {numbers.min()}: class numbers start at 0")
        count = int(numbers.max()) + 1 if len(numbers) else 0
        return Labels(numbers, tuple(str(k) for k in range(count)), source)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{source}: mixes class numbers and class names; use one kind")
    return from_names([str(value) for value in values], source)


def first(items: Iterable[str]) -> str:
    """' (first: a, b, c)' for an error message."""
    listed = list(items)
    return f" (first: {', '.join(repr(item) for item in listed[:_SHOWN])}{', ...' if len(listed) > _SHOWN else ''})"
