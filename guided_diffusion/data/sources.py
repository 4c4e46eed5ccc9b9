"""Where pictures may lie: a folder of files, an EDM zip, WebDataset tars, an LSUN lmdb, or packed arrays (`packed.py`).

Two things per kind: how to list it (`list_source`) and how to read one picture of it (`Reader`).
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from ..runtime import storage
from . import images
from . import labels as tables

PACKED_INDEX = "packed.json"
KINDS = ("files", "zip", "tar", "lmdb", "packed")


class Source(NamedTuple):
    """A listing: how each picture is addressed, its name relative to the root, and the source's own labels (None: it has none)."""

    kind: str
    paths: tuple[str, ...]
    names: tuple[str, ...]
    labels: tables.Labels | None = None
    preprocessing: str = ""
    stored_size: tuple[int, int] | None = None


def list_source(root: str, extensions: Sequence[str]) -> Source:
    """Find out what `root` is and list it."""
    if not storage.isdir(root):
        kind = os.path.splitext(root)[1].lower()
        if kind == ".zip":
            return _list_zip(root, extensions)
        if kind == ".tar":
            return _list_tars(root, [os.path.basename(root)], extensions)
        raise ValueError(f"{root!r}: is a file; must be a folder, a .zip, a .tar, an lmdb folder or packed data")
    top = storage.listdir(root)
    if PACKED_INDEX in top:
        return _list_packed(root)
    if "data.mdb" in top:
        return _list_lmdb(root)
    tars = [name for name in top if name.lower().endswith(".tar")]
    if tars:
        return _list_tars(root, tars, extensions)
    paths = tuple(image_files(root, extensions))
    names = tuple(_relative(path, root) for path in paths)
    own = tables.from_file(storage.join(root, "dataset.json"), names) if "dataset.json" in top else None
    return Source("files", paths, names, own)


def image_files(root: str, extensions: Sequence[str]) -> list[str]:
    """Paths of all pictures below a folder, sorted folder by folder; extensions without the dot, in any case."""
    base = root.rstrip("/" + os.sep) or root
    return [path for path in storage.walk_files(base) if _is_image(_relative(path, base), extensions)]


def _relative(path: str, root: str) -> str:
    return path[len(root.rstrip("/" + os.sep)) :].replace(os.sep, "/").lstrip("/")


def _is_image(name: str, extensions: Sequence[str]) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") for part in parts) or "." not in parts[-1]:  # hidden: editor caches, macOS "._x.jpg"
        return False
    return parts[-1].rsplit(".", 1)[-1].lower() in extensions


def _list_zip(root: str, extensions: Sequence[str]) -> Source:
    try:
        with storage.open_file(root, "rb") as file, zipfile.ZipFile(file) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
            text = archive.read("dataset.json").decode("utf-8-sig") if "dataset.json" in members else None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{root!r}: not a readable zip file: {error}") from error
    names = tuple(sorted((name for name in members if _is_image(name, extensions)), key=lambda name: name.split("/")))
    if text is None:
        return Source("zip", names, names)
    source = f"{root}/dataset.json"
    table = tables.parse(text, source, is_json=True)
    return Source("zip", names, names, tables.NONE if table is None else tables.match(table, names, source))


def _list_tars(root: str, tars: Sequence[str], extensions: Sequence[str]) -> Source:
    """WebDataset: members that share a name up to the first dot belong together; `.cls` or `.json` ("label", "cls") is the class.

    A picture is addressed by `tar:offset:size:name`, so reading it is one seek.
    """
    paths, names, found = [], [], {}
    for tar in tars:
        whole = root if not storage.isdir(root) else storage.join(root, tar)
        try:
            with storage.open_file(whole, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                keys: dict[str, tables.Label] = {}
                pictures = []
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, _, last = member.name.rpartition("/")
                    key = f"{folder}/{last.split('.')[0]}"
                    if _is_image(member.name, extensions):
                        pictures.append((key, member))
                    elif last.endswith((".cls", ".json")):
                        content = archive.extractfile(member)
                        assert content is not None  # isfile() was asked above
                        label = _tar_label(content, is_json=last.endswith(".json"))
                        if label is not None:
                            keys[key] = label
        except tarfile.TarError as error:
            raise ValueError(f"{whole!r}: not a readable uncompressed tar file: {error}") from error
        for key, member in pictures:
            name = f"{tar}/{member.name}"
            paths.append(f"{member.offset_data}:{member.size}:{name}")
            names.append(name)
            if key in keys:
                found[name] = keys[key]
    labels = tables.match(found, names, f"{root} (.cls/.json members)") if found else tables.NONE
    return Source("tar", tuple(paths), tuple(names), labels)


def _tar_label(content: IO[bytes], *, is_json: bool) -> tables.Label | None:
    text = content.read().decode("utf-8").strip()
    if not is_json:
        return int(text) if text.isdigit() else text
    data = json.loads(text)
    for key in ("label", "cls", "class"):
        if isinstance(data, dict) and isinstance(data.get(key), (int, str)):
            return data[key]
    return None


def _lmdb(root: str) -> Any:
    try:
        import lmdb
    except ImportError as error:
        text = f"{root!r} is an lmdb (as LSUN comes) and needs the package lmdb: pip install lmdb, or this package with the extra [lmdb]"
        raise ImportError(text) from error
    return lmdb.open(root, readonly=True, lock=False, readahead=False, meminit=False, max_readers=100)


def _list_lmdb(root: str) -> Source:
    with _lmdb(root) as environment, environment.begin() as transaction:
        keys = tuple(
            bytes(key).decode("utf-8", "surrogateescape") for key in transaction.cursor().iternext(values=False)
        )
    return Source("lmdb", keys, keys, tables.NONE)


def _list_packed(root: str) -> Source:
    index = read_packed_index(root)
    names = tuple(str(k) for k in range(int(index["count"])))
    labels = tables.NONE
    if index["labels"] is not None:
        numbers = np.load(os.path.join(root, index["labels"]["file"]), allow_pickle=False)
        labels = tables.Labels(numbers, tuple(index["class_names"]), index["label_source"])
    height, width, _ = index["shape"]
    return Source("packed", names, names, labels, index["preprocessing"], (height, width))


def read_packed_index(root: str) -> dict[str, Any]:
    """The index of packed data; ValueError if it is of a version this code does not know."""
    index = json.loads(storage.read_bytes(storage.join(root, PACKED_INDEX)))
    if index.get("format") != 1:
        raise ValueError(
            f"{root!r}: packed data of format {index.get('format')!r}; this version reads format 1: pack it again"
        )
    if storage.is_remote(root):
        raise ValueError(f"{root!r}: packed data is memory-mapped; copy it to a local disk first")
    return index


class Reader:
    """Reads pictures of one source. Archives are opened on first use, and again in every process that is handed the reader."""

    def __init__(self, kind: str = "files", root: str = "") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
        self.kind, self.root = kind, root
        self._handles: dict[tuple[int, int, str], Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Reader], tuple[str, str]]:
        return Reader, (self.kind, self.root)

    def describe(self, path: str) -> str:
        """A name for error messages."""
        return path if self.kind == "files" else f"{self.root}: {path.split(':', 2)[-1]}"

    def read(self, path: str, channels: int = 3) -> np.ndarray:
        """One picture, uint8 `[H, W, channels]`; ValueError names one that cannot be read."""
        if self.kind == "packed":
            return self._packed(path, channels)
        return images.decode(self._bytes(path), self.describe(path), channels)

    def inspect(self, path: str) -> tuple[tuple[int, int], str]:
        """Decode one picture of an unpacked source: ((width, height), PIL mode as stored); ValueError if it cannot be read."""
        return images.inspect(self._bytes(path), self.describe(path))

    def _bytes(self, path: str) -> bytes:
        try:
            return {"files": storage.read_bytes, "zip": self._zip, "tar": self._tar, "lmdb": self._lmdb}[self.kind](
                path
            )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise images.unreadable(self.describe(path), error) from error

    def _handle(self, name: str, make: Callable[[], Any], *, threads_share: bool = False) -> Any:
        # A file has one position, so every process and thread needs its own.
        key = (os.getpid(), 0 if threads_share else threading.get_ident(), name)
        with self._lock:
            if key not in self._handles:
                self._handles[key] = make()
            return self._handles[key]

    def _zip(self, path: str) -> bytes:
        archive = self._handle("", lambda: zipfile.ZipFile(storage.open_file(self.root, "rb")))
        return archive.read(path)

    def _tar(self, path: str) -> bytes:
        offset, size, name = path.split(":", 2)
        whole = self.root if not storage.isdir(self.root) else storage.join(self.root, name.split("/", 1)[0])
        file = self._handle(whole, lambda: storage.open_file(whole, "rb"))
        file.seek(int(offset))
        return file.read(int(size))

    def _lmdb(self, path: str) -> bytes:
        # lmdb forbids a second environment in a process, and is made for threads.
        environment = self._handle("", lambda: _lmdb(self.root), threads_share=True)
        with environment.begin() as transaction:
            value = transaction.get(path.encode("utf-8", "surrogateescape"))
        if value is None:
            raise KeyError("no such key")
        return bytes(value)

    def _packed(self, path: str, channels: int) -> np.ndarray:
        firsts, files = self._handle("index", self._packed_shards, threads_share=True)
        row = int(path)
        shard = int(np.searchsorted(firsts, row, side="right")) - 1
        whole = os.path.join(self.root, files[shard])
        array = self._handle(whole, lambda: np.load(whole, mmap_mode="r", allow_pickle=False), threads_share=True)
        picture = np.array(array[row - firsts[shard]])
        if picture.shape[2] == channels:
            return picture
        return images.as_array(images.from_array(picture), channels)

    def _packed_shards(self) -> tuple[np.ndarray, list[str]]:
        shards = read_packed_index(self.root)["shards"]
        counts = [shard["count"] for shard in shards]
        return np.cumsum([0, *counts])[:-1], [shard["file"] for shard in shards]
