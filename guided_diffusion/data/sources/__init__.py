"""Kinds of image sources: folders and archives. A new kind is one file here and one entry in `SOURCES`; every command can then read it."""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Mapping

from ...runtime import storage
from ..labels import first
from .archives import Tar, Zip
from .arrays import Packed
from .lmdb import Lmdb
from .source import EXTENSIONS, Folder, Source, is_image, walk

SOURCES: dict[str, type[Source]] = {kind.kind: kind for kind in (Folder, Zip, Tar, Lmdb, Packed)}
_PATTERN = "*?[{"  # a path with one of these may be a pattern for several files


def open_source(kind: str, root: str) -> Source:
    """A source of known kind, to read addresses that `list_source` returned earlier; for kind "files" the root is not used."""
    if kind not in SOURCES:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(SOURCES)}")
    return SOURCES[kind](root)


def list_source(root: str) -> Source:
    """Find out what `root` is and list it. ValueError if it holds no images, or if it is not clear which are meant."""
    if not root:
        raise ValueError("unspecified data directory: give the folder or archive that holds the images")
    files = {name: path for path, name in walk(root)} if storage.isdir(root) else {}
    source = (_kind_of_folder(root, files) if storage.isdir(root) else _kind_of_file(root))(root).fill(files)
    if not source.paths:
        looked = ", ".join("." + extension for extension in EXTENSIONS)
        nested = "; archives in archives or below the folder are not opened"
        more = f"; {source.left_out}{nested}" if source.left_out else ""
        raise ValueError(f"{root!r}: no images found; looked for {looked} at all depths{more}")
    return source


def _kind_of_folder(root: str, files: Mapping[str, str]) -> type[Source]:
    top = {name.lower(): name for name in files if "/" not in name}
    marked = {kind: fnmatch.filter(top, kind.marker) for kind in SOURCES.values() if kind.marker}
    kinds = {kind: repr(top[names[0]]) for kind, names in marked.items() if names}
    loose = [name for name in files if is_image(name)]
    kinds_held = [*([f"{len(loose)} images{first(loose)}"] if loose else []), *kinds.values()]
    if len(kinds_held) > 1:
        remedy = "give the path of what is meant, or move the other away"
        raise ValueError(f"{root!r} holds {' and beside them '.join(kinds_held)}; {remedy}")
    return next(iter(kinds), Folder)


def _kind_of_file(root: str) -> type[Source]:
    exists = storage.exists(root)
    with storage.open_file(root, "rb") if exists else io.BytesIO() as file:
        head = file.read(16)
    found = [kind for kind in SOURCES.values() if kind.ending and root.lower().endswith(kind.ending)]
    found += [kind for kind in SOURCES.values() if kind.begins and head.startswith(kind.begins)]
    if found and (exists or any(mark in root for mark in _PATTERN)):
        return found[0]
    if not exists:
        raise ValueError(f"{root!r}: no such folder or file")
    endings = " or ".join(kind.ending for kind in SOURCES.values() if kind.ending)
    raise ValueError(f"{root!r}: is a file; must be a folder, or end with {endings}")
