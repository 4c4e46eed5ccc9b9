"""Which class an image belongs to: from its folder, its name, or a table.

Everything works on names relative to the root, `/` between parts, and returns `Labels`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..runtime import storage

_SHOWN = 5
_TABLE = "dataset.json"
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "name")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "y", "target")
# Folders that are no classes: EDM writes 00000/img00000000.png and 001000/001234.png, FFHQ comes as 01000/01234.png.
_NUMBERED_FILE = re.compile(r"(?:.*/)?(\d{5,})/(?:img)?(\d{5,})\.\w+")
_LIKE_A_NUMBER = re.compile(r"[+\-\u2212]?\.?\d[\d.,' \xa0]*(?:e[+-]?\d+)?", re.IGNORECASE)
# At most 6 digits: a larger number is a date or an identifier, and a name for each class up to it would fill the memory.
_CLASS_NUMBER = re.compile(r"\+?0*(\d{1,6})(?:\.0*)?")
_MISSING = ("", *"nan <na> none null n/a #n/a".split())  # how pandas and spreadsheets write that there is no label

Label = int | str
# An entry of a table: its position in the file, for errors; the image; its label as read, not yet checked.
Entry = tuple[str, str, Any]


class Labels(NamedTuple):
    """`numbers` int64 `[N]` or None without labels; class `k` is called `class_names[k]`; `source` says where they come from."""

    numbers: np.ndarray | None
    class_names: tuple[str, ...]
    source: str


NONE = Labels(None, (), "none")


def tidy(name: str) -> str:
    """Normalise a name in a table or an archive to the path after unpacking: `/` between parts, no `./`, never outside the root."""
    return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")


def from_names(values: Sequence[str], source: str) -> Labels:
    """Number classes in the sorted order of their names."""
    class_names = tuple(sorted(set(values)))
    number = {name: k for k, name in enumerate(class_names)}
    return Labels(np.fromiter((number[value] for value in values), np.int64, len(values)), class_names, source)


def by_prefix(names: Sequence[str]) -> Labels:
    """Label each image by the text before the first `_` of its file name, as in 2021 (without `_`: by the name with its extension)."""
    return from_names([name.rsplit("/", 1)[-1].split("_")[0] for name in names], "prefix")


def by_folder(names: Sequence[str]) -> Labels:
    """Label each image by its folder, relative to the root. ValueError if an image lies in the root itself."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(
            f"labels='folders': {len(loose)} of {len(names)} images lie in no sub-folder{first(loose)}; "
            "move them into one folder per class, or use labels='prefix', 'none' or a csv/json file"
        )
    return from_names([name.rsplit("/", 1)[0] for name in names], "folders")


def detect(names: Sequence[str]) -> Labels:
    """Labels by folder if all images lie in folders, two or more; else by prefix if prefixes look like classes; else none."""
    numbered = [_NUMBERED_FILE.fullmatch(name) for name in names]
    if all(match is not None and match[2].startswith(match[1].rstrip("0")) for match in numbered):
        return NONE  # folders that only split numbered files into chunks: the folder's number, without end zeros, begins each file's
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


def from_file(path: str, names: Sequence[str], content: bytes | None = None) -> Labels:
    """Read a `.csv` (path,label; header optional) or `.json` (`{"labels": [[path, label], ...]}` or `{path: label}`) table.

    `content`: that of the file, if it was read already. `NONE` if the table says so itself (EDM's `"labels": null`). ValueError if
    the table and the images do not match one to one.
    """
    try:
        text = _decode(storage.read_bytes(path) if content is None else content, path)
    except (FileNotFoundError, IsADirectoryError):
        allowed = "'auto', 'folders', 'prefix', 'none' or the path of a csv/json file"
        raise ValueError(f"labels={path!r}: no such file; must be {allowed}") from None
    entries = _json_entries(text, path) if path.lower().endswith(".json") else _csv_entries(text, path)
    return NONE if entries is None else _match(_parse(entries, path), names, path)


def label_files(members: Iterable[str], names: Sequence[str], *, beside: bool) -> list[str]:
    """The members of a source that may hold labels: dataset.json; with `beside` also `.cls` and `.json` files with the key of an image.

    WebDataset's rule: names up to the first dot are the key, and members that share it belong together.
    """
    keys = {_key(name) for name in names} if beside else set()
    return [n for n in members if _is_table(n) or (n.endswith((".cls", ".json")) and _key(n) in keys)]


def from_members(
    root: str, members: Mapping[str, str], names: Sequence[str], read: Callable[[str], bytes]
) -> Labels | None:
    """The labels in what `label_files` found (name -> the address that `read` reads); None if there are none."""
    if not members:
        return None
    tables = sorted(filter(_is_table, members), key=len)
    if len(tables) == 1 and all(name.startswith(tables[0].removesuffix(_TABLE)) for name in names):
        return from_file(f"{root}/{tables[0]}", names, read(members[tables[0]]))
    if tables:
        fault = "one of several tables of labels" if tables[1:] else "a table of labels for some of the images only"
        remedy = (
            f"put one {_TABLE} above all images, or name the source of labels: --labels TABLE, folders, prefix or none"
        )
        raise ValueError(f"{root}/{tables[0]} is {fault}{first(tables)}; {remedy}")
    beside: dict[str, list[str]] = {}  # key and ending -> the label files with them
    for member in members:
        beside.setdefault(_key(member) + posixpath.splitext(member)[1], []).append(member)
    entries: list[Entry] = []
    for name in names:
        for ending in (".cls", ".json"):
            same_stem = posixpath.splitext(name)[0] + ending
            files = [same_stem] if same_stem in members else beside.get(_key(name) + ending, [])
            if len(files) > 1:
                several = f"may belong to several files{first(files)}; give it one of its own name"
                raise ValueError(f"{root}: {name!r} {several}")
            label = _label(read(members[files[0]]), f"{root}: {files[0]}") if files else None
            if label is not None:
                entries.append((files[0], name, label))
                break
    source = f"{root} (.cls/.json members)"
    return _match(_parse(entries, source), names, source) if entries else None


def _label(content: bytes, source: str) -> Any:
    """The label in a file beside an image; None if there is none."""
    text = _decode(content, source)
    if not source.endswith(".json"):
        return text
    data = _json(text, source)
    if isinstance(data, dict):
        return next((data[key] for key in ("label", "cls", "class") if key in data), None)
    return None if isinstance(data, str) else data  # a JSON file that is only a string holds a caption


def _is_table(name: str) -> bool:
    return name.endswith(_TABLE) and posixpath.basename(name) == _TABLE


def _key(name: str) -> str:
    folder, last = posixpath.split(name)
    return f"{folder}/{last.split('.')[0]}"


def _decode(data: bytes, source: str) -> str:
    """The text of a table: UTF-8, or UTF-16 if it begins with that byte order mark. ValueError names the first row that is not."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        row, wrong = data[: error.start].count(b"\n") + 1, data[error.start : error.start + 1]
        raise ValueError(f"{source}, row {row}: {wrong!r} is not {encoding} text; save the table as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{source}: holds zero bytes, which no UTF-8 text does; save the table as UTF-8")
    return text


def _parse(entries: Sequence[Entry], source: str) -> dict[str, Label]:
    """Lines of a table -> {name: label}: all labels are whole numbers, or all are names. ValueError names a line that is neither.

    A number may be written `3`, `"3"` or `3.0`. One bad line must not turn numbers into names: they would be numbered anew.
    """
    numeric = any(_LIKE_A_NUMBER.fullmatch(_text(label)) for _, _, label in entries)
    kind = "whole number from 0 to 999999, as the others are" if numeric else "class number or name"
    table: dict[str, Label] = {}
    for where, name, value in entries:
        text, number = _text(value), _CLASS_NUMBER.fullmatch(_text(value))
        several = isinstance(value, (list, dict)) or text[:1] + text[-1:] in ("[]", "{}")
        if (numeric and not number) or several or text.lower() in _MISSING:
            more = " (an image has one class, not several)" if several else ""
            raise ValueError(f"{source}, {where}: the label of {name!r} is {value!r}; it must be a {kind}{more}")
        label = int(number[1]) if number else text
        if table.setdefault(tidy(name), label) != label:
            raise ValueError(f"{source}, {where}: {name!r} has two labels, {table[tidy(name)]!r} and {label!r}")
    return table


def _text(label: Any) -> str:
    return str(label).strip() if isinstance(label, (str, int, float)) and not isinstance(label, bool) else ""


def _json(text: str, source: str, of_pairs: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    try:
        return json.loads(text, object_pairs_hook=of_pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None


def _json_entries(text: str, source: str) -> list[Entry] | None:
    # Lists of pairs, because a dict would silently keep only the last of two labels of one image.
    data = _json(text, source, list)
    # {"labels": [...]} as EDM writes it; with a text or number as its value, "labels" is the name of an image.
    for row in data if isinstance(data, list) else ():
        if isinstance(row, tuple) and row[0] == "labels" and not isinstance(row[1], (str, int)):
            data = row[1]
    if data is None:
        return None
    if not isinstance(data, list) or not all(isinstance(row, (list, tuple)) and len(row) == 2 for row in data):
        raise ValueError(f'{source}: must be {{"labels": [[path, label], ...]}} or {{path: label, ...}}')
    for name, label in data:
        if not isinstance(name, str):
            raise ValueError(f"{source}: entry [{name!r}, {label!r}]: must be a path and a class number or name")
    return [(f"entry {k}", name, label) for k, (name, label) in enumerate(data, 1)]


def _csv_entries(text: str, source: str) -> list[Entry]:
    tables = []
    for separator in (",", "\t", ";"):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        except csv.Error as error:
            raise ValueError(f"{source}: not a csv table: {error}") from None
        tables.append([(line, row) for line, row in rows if any(row)])
    # The separator under which the first line names the columns, else under which it has several cells.
    rows = max(tables, key=lambda rows: (_columns(rows) is not None, bool(rows) and len(rows[0][1]) > 1))
    columns = _columns(rows)
    if columns is None and (wide := [each for each in rows if any(each[1][2:])]):
        line, row = wide[0]
        raise ValueError(
            f"{source}, row {line}: {','.join(row)!r} has {len(row)} columns, and no first line says which is which: begin the "
            f"table with their names, path,label and others (allowed: {', '.join(_PATH_COLUMNS)}; {', '.join(_LABEL_COLUMNS)})"
        )
    path_at, label_at = columns or (0, 1)
    rows = rows[1:] if columns else rows
    for line, row in rows:
        if len(row) <= max(path_at, label_at):
            raise ValueError(f"{source}, row {line}: {','.join(row)!r} lacks a path or a label")
    return [(f"row {line}", row[path_at], row[label_at]) for line, row in rows]


def _columns(rows: Sequence[tuple[int, Sequence[str]]]) -> tuple[int, int] | None:
    """(column of the path, column of the label) by a header line; None if there is no header."""
    head = [cell.lower() for cell in rows[0][1]] if rows else []
    paths = [k for k, cell in enumerate(head) if cell in _PATH_COLUMNS]
    labels = [head.index(name) for name in _LABEL_COLUMNS if name in head]  # label before class_name
    return (paths[0], labels[0]) if paths and labels else None


def _match(table: Mapping[str, Label], names: Sequence[str], source: str) -> Labels:
    """The labels of the images `names`, in that order. Class numbers stay as they are; class names are numbered in sorted order.

    Paths in the table are relative to the root, or to a folder below it: leading folders of images are dropped until all paths agree.
    """
    keys = list(names)
    while not (len(keys) == len(table) and all(key in table for key in keys)):
        keys = [key.partition("/")[2] for key in keys]
        if not all(keys) or len(set(keys)) < len(keys):
            known = set(names)
            missing = [name for name in table if name not in known]
            unlabeled = [name for name in names if name not in table]
            problems = {f"{len(missing)} of its {len(table)} entries name no image": missing}
            problems[f"{len(unlabeled)} of {len(names)} images have no label"] = unlabeled
            shown = "; ".join(problem + first(which) for problem, which in problems.items() if which)
            raise ValueError(f"{source}: {shown}; paths are relative to the data folder")
    values = [table[key] for key in keys]
    if all(isinstance(value, str) for value in values):
        return from_names([str(value) for value in values], source)
    numbers = np.array(values, dtype=np.int64)
    return Labels(numbers, tuple(str(k) for k in range(int(numbers.max()) + 1)), source)


def first(items: Iterable[str]) -> str:
    """' (first: a, b, c)' for an error message."""
    listed = list(items)
    return f" (first: {', '.join(repr(item) for item in listed[:_SHOWN])}{', ...' if len(listed) > _SHOWN else ''})"
