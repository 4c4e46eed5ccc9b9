"""Where pictures may lie: a folder of files, a zip, tars (WebDataset), an LSUN lmdb, or packed arrays (`packed.py`).

Two things per kind: how to list it (`list_source`) and how to read one picture of it (`Reader`). What is a picture, what is hidden and
where labels come from is the same for all kinds.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import posixpath
import re
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..runtime import storage
from . import images
from . import labels as tables

if TYPE_CHECKING:
    from PIL import Image as PILImage

EXTENSIONS = tuple(
    "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff ppm pgm pbm pnm jp2 j2k jpx jpf avif ico tga".split()
)
PACKED_INDEX = "packed.json"
KINDS = ("files", "zip", "tar", "lmdb", "packed")
_LMDB = "data.mdb"
_TABLE = "dataset.json"
_CLUTTER = ("__MACOSX", "Thumbs.db", "desktop.ini")  # left by file managers, as names that begin with a dot are
_MAX_SHARDS = 1_000_000
_MAX_LINKS = 8
_SHOWN = 8


class Source(NamedTuple):
    """A listing: how each picture is addressed, and its name relative to the root."""

    kind: str
    root: str
    paths: tuple[str, ...]
    names: tuple[str, ...]
    own_labels: Callable[[], tables.Labels | None]  # reads the labels that the source brings along; None: it has none
    left_out: str = ""  # a sentence about the files that are not read
    preprocessing: str = ""
    stored_size: tuple[int, int] | None = None

    def labels(self, wanted: str = "auto") -> tables.Labels:
        """The class of each picture, from what is wanted (see `listing.list_records`); nothing else is read."""
        if wanted == "none":
            return tables.NONE
        if wanted == "prefix":
            return tables.by_prefix(self.names)
        # Tars are shards as a rule: the folders inside of them are meant.
        inside = [path.partition("\0")[2] for path in self.paths] if self.kind == "tar" else self.names
        if wanted == "folders":
            return tables.by_folder(inside if any("/" in name for name in inside) else self._below_shards())
        if wanted != "auto":
            return tables.from_file(wanted, self.names)
        return self.own_labels() or tables.detect(inside)

    def _below_shards(self) -> Sequence[str]:
        """Names without the tars, where these lie in folders themselves: cat/00.tar and cat/01.tar are of one class."""
        folders = [posixpath.split(posixpath.dirname(name))[0] for name in self.names]
        if self.kind != "tar" or len(set(folders)) < 2:
            return self.names
        return [posixpath.join(folder, posixpath.basename(name)) for folder, name in zip(folders, self.names)]


def list_source(root: str, extensions: Sequence[str] = EXTENSIONS) -> Source:
    """Find out what `root` is and list it. ValueError if it holds no pictures, or if it is not clear which are meant."""
    if not root:
        raise ValueError("unspecified data directory: give the folder or archive that holds the images")
    if storage.isdir(root):
        found = _list_folder(root, extensions)
    elif root.lower().endswith(".tar"):
        found = _list_tars(*_shards(root), extensions)
    elif not storage.exists(root):
        raise ValueError(f"{root!r}: no such folder or file")
    elif root.lower().endswith(".zip") or _begins(root, b"PK"):
        found = _list_zip(root, extensions)
    else:
        raise ValueError(
            f"{root!r}: is a file; must be a folder, a .zip, an uncompressed .tar, an lmdb folder or packed data"
        )
    if not found.paths:
        looked = ", ".join("." + extension for extension in extensions)
        raise ValueError(
            f"{root!r}: no images found; looked for {looked} at all depths"
            + (f"; {found.left_out}; archives in archives or below the folder are not opened" if found.left_out else "")
        )
    return found


def _begins(path: str, start: bytes) -> bool:
    with storage.open_file(path, "rb") as file:
        return bool(file.read(len(start)) == start)


def image_files(root: str, extensions: Sequence[str] = EXTENSIONS) -> list[str]:
    """Paths of all pictures below a folder, sorted folder by folder; extensions without the dot, in any case."""
    return [path for path, name in _walk(root) if _is_image(name, extensions)]


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """(path, name relative to the root) of all files below a folder that are not hidden."""
    base = root.rstrip("/" + os.sep) or root
    for path in storage.walk_files(base):
        name = path[len(base.rstrip("/" + os.sep)) :].replace(os.sep, "/").lstrip("/")
        if not _is_hidden(name):
            yield path, name


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in _CLUTTER for part in name.split("/"))


def _is_image(name: str, extensions: Sequence[str]) -> bool:
    return posixpath.basename(name).rpartition(".")[2].lower() in extensions and "." in name


def _is_table(name: str) -> bool:
    return posixpath.basename(name) == _TABLE


def _told(left_out: Iterable[str]) -> str:
    """A sentence about files that are left out, by what each seems to be."""
    counts = Counter(left_out)
    shown = ", ".join(f"{what} {count}" for what, count in counts.most_common(_SHOWN))
    files = "1 file was" if counts.total() == 1 else f"{counts.total()} files were"
    return f"{files} left out: {shown}{', ...' if len(counts) > _SHOWN else ''}" if counts else ""


def _ending(name: str) -> str:
    found = re.search(r"(\.tar)?\.[^./]+$", name.lower())
    return found[0] if found else "without an ending"


def _list_folder(root: str, extensions: Sequence[str]) -> Source:
    files = {name: path for path, name in _walk(root)}
    pictures = [name for name in files if _is_image(name, extensions)]
    tars = [name for name in files if "/" not in name and name.lower().endswith(".tar")]
    stores = [name for name in (PACKED_INDEX, _LMDB) if name in files] + tars[:1]
    if len(stores) + bool(pictures) > 1:
        held = [f"{len(pictures)} images{tables.first(pictures)}"] if pictures else []
        raise ValueError(
            f"{root!r} holds {' and beside them '.join([*held, *map(repr, stores)])}; give the path of what is meant, or move the "
            "other away"
        )
    if PACKED_INDEX in files:
        return _list_packed(root)
    if _LMDB in files:
        return _list_lmdb(root)
    if tars:
        return _list_tars(root, tars, extensions, [_ending(name) for name in files if name not in tars])
    return _listed("files", root, files, extensions)


def _listed(
    kind: str, root: str, members: Mapping[str, str], extensions: Sequence[str], left_out: Iterable[str] = ()
) -> Source:
    """A listing from all files there are, name -> address."""
    names = tuple(name for name in members if _is_image(name, extensions))
    labels = (_TABLE,) if kind == "files" else (".cls", ".json")
    keys = set() if kind == "files" else {_key(name) for name in names}
    used = {*names, *(n for n in members if n.endswith(labels) and (_is_table(n) or _key(n) in keys))}
    broken: list[str] = []
    if kind == "files":  # a link that leads nowhere may have been a whole class, so it is named
        broken = [n for n, path in members.items() if os.path.islink(path) and not os.path.exists(path)]
    endings = [_ending(name) for name in members if name not in used and name not in broken]
    told = _told([*left_out, *(f"broken link {name!r}" for name in broken if name not in used), *endings])

    def own_labels() -> tables.Labels | None:
        reader = Reader(kind, root)
        found = sorted(filter(_is_table, members), key=len)
        whole = [table for table in found if all(name.startswith(table.removesuffix(_TABLE)) for name in names)]
        if len(found) == len(whole) == 1:
            return tables.from_bytes(reader.encoded(members[found[0]]), f"{root}/{found[0]}", names, is_json=True)
        if found:
            fault = "one of several tables of labels" if whole else "a table of labels for some of the images only"
            raise ValueError(
                f"{root}/{found[0]} is {fault}{tables.first(found)}; put one {_TABLE} above all images, or say where labels come "
                "from: --labels TABLE, folders, prefix or none"
            )
        return None if kind == "files" else _labels_beside(root, reader, members, names)

    return Source(kind, root, tuple(members[name] for name in names), names, own_labels, told)


def _labels_beside(root: str, reader: Reader, members: Mapping[str, str], names: Sequence[str]) -> tables.Labels | None:
    """WebDataset: members that share a name up to the first dot belong together; `.cls`, else `.json` ("label", "cls"), is the class."""
    held: dict[str, dict[str, list[str]]] = {".cls": {}, ".json": {}}
    for name in members:
        for ending in held:
            if name.endswith(ending):
                held[ending].setdefault(_key(name), []).append(name)
    entries = []
    for name in names:
        for ending, tellers in held.items():
            teller = _teller(name, ending, tellers.get(_key(name), []), root)
            label = None if teller is None else _label(reader.encoded(members[teller]), f"{root}: {teller}", ending)
            if label is not None:
                entries.append(tables.Entry(f"{teller}", name, label))
                break
    source = f"{root} (.cls/.json members)"
    return tables.match(tables.parse(entries, source), names, source) if entries else None


def _teller(name: str, ending: str, tellers: Sequence[str], root: str) -> str | None:
    """The member that tells the class of a picture: of its own name, else the only one that shares its key."""
    own = posixpath.splitext(name)[0] + ending
    if own in tellers or not tellers:
        return own if tellers else None
    if len(tellers) > 1:
        raise ValueError(
            f"{root}: {name!r} may belong to {tables.first(tellers).strip(' ()')}; give it one of its own name"
        )
    return tellers[0]


def _key(name: str) -> str:
    folder, last = posixpath.split(name)
    return f"{folder}/{last.split('.')[0]}"


def _label(content: bytes, source: str, ending: str) -> Any:
    text = tables.decode(content, source)
    if ending == ".cls":
        return text
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None
    if isinstance(data, dict):
        return next((data[key] for key in ("label", "cls", "class") if key in data), None)
    return None if isinstance(data, str) else data  # a lone text is a caption


def _add(members: dict[str, str], name: str, address: str, archive: str, extensions: Sequence[str]) -> None:
    """Put a member of an archive to the others, unless it is hidden. ValueError for a picture that is there already."""
    if _is_hidden(name):
        return
    if name in members and _is_image(name, extensions):
        raise ValueError(f"{archive!r}: holds {name!r} twice; unpack the archive and pack each picture once")
    members[name] = address


def _list_zip(root: str, extensions: Sequence[str]) -> Source:
    try:
        with storage.open_file(root, "rb") as file, zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except OSError:
        raise
    except Exception as error:  # a damaged directory is answered with a dozen kinds: BadZipFile, struct.error, ...
        raise ValueError(f"{root!r}: not a readable zip file: {error}") from error
    members: dict[str, str] = {}
    for info in infos:
        if info.flag_bits & 1:
            raise ValueError(f"{root!r}: {info.filename!r} is encrypted; unpack the archive and pack it again without")
        if info.file_size > info.compress_size * 1032 + 64:  # deflate cannot do better than 1032:1
            raise ValueError(f"{root!r}: {info.filename!r} claims {info.file_size} bytes, which is not possible")
        _add(members, tables.tidy(info.filename), info.filename, root, extensions)
    ordered = dict(sorted(members.items(), key=lambda member: member[0].split("/")))
    return _listed("zip", root, ordered, extensions)


def _shards(root: str) -> tuple[str, list[str]]:
    """A tar: (root, [""]). A pattern, `{000..012}` counted, `*` and `?` matched: (folder, tars in it)."""
    if storage.exists(root):
        return root, [""]
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", root)
    if braces:
        first, last = braces.groups()
        numbers = range(int(first), min(int(last), int(first) + _MAX_SHARDS) + 1)
        found = [f"{root[: braces.start()]}{n:0{len(first)}d}{root[braces.end() :]}" for n in numbers]
    else:
        found = sorted(glob.glob(root, recursive=True))
    missing = [name for name in found if not storage.exists(name)]
    if not found:
        raise ValueError(f"{root!r}: no such file, nor a pattern of some")
    if missing:
        raise ValueError(f"{root!r}: {len(missing)} of {len(found)} shards are missing{tables.first(missing)}")
    folder = posixpath.dirname(re.split(r"[{*?[]", root.replace(os.sep, "/"))[0])
    return folder or ".", [name[len(folder) :].replace(os.sep, "/").lstrip("/") for name in found]


def _list_tars(root: str, tars: Sequence[str], extensions: Sequence[str], left_out: Iterable[str] = ()) -> Source:
    """A picture is addressed by `offset:size:tar`, a zero byte and its name in the tar, so reading it is one seek."""
    members: dict[str, str] = {}
    unread = list(left_out)
    for tar in tars:
        whole = storage.join(root, tar) if tar else root
        for name, place in _tar_members(whole, unread, extensions).items():
            members[f"{tar or posixpath.basename(root.replace(os.sep, '/'))}/{name}"] = f"{place}:{tar}\0{name}"
    return _listed("tar", root, members, extensions, unread)


def _tar_members(whole: str, unread: list[str], extensions: Sequence[str]) -> dict[str, str]:
    """Name -> `offset:size` of what a tar holds. Links stand for the members that they lead to; other links go to `unread`."""
    end = storage.size(whole)
    try:
        with storage.open_file(whole, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            infos = [info for info in archive if info.isfile() or info.islnk() or info.issym()]
            file.seek(archive.offset)
            goes_on = file.read(1 << 20).strip(b"\0")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{whole!r}: not a readable uncompressed tar file: {error}") from error
    if goes_on:
        raise ValueError(
            f"{whole!r}: is cut off, or goes on after its end as tars joined by cat do (tar --concatenate joins them)"
        )
    members: dict[str, str] = {}
    places: dict[str, str] = {}
    links: dict[str, str] = {}
    for info in infos:
        name = tables.tidy(info.name)
        if info.issparse() or info.offset_data + info.size > end:
            fault = "stored with holes" if info.issparse() else "cut off"
            raise ValueError(f"{whole!r}: {info.name!r} is {fault}; make the tar again")
        if info.isfile():
            places[name] = f"{info.offset_data}:{info.size}"
        else:  # a hard link names a member, a symbolic one a path from where it stands
            target = info.linkname if info.islnk() else posixpath.join(posixpath.dirname(name), info.linkname)
            links[name] = name if target.startswith("/") else tables.tidy(target)
        _add(members, name, places.get(name, ""), whole, extensions)
    for name in [name for name in links if name in members]:
        target = links[name]
        for _ in range(_MAX_LINKS):  # links to links, with an end to circles
            target = links.get(target, target)
        if target in places:
            members[name] = places[target]
            continue
        del members[name]
        above = f"{name}/".startswith(f"{target}/") or not target
        inside = {} if above else {name + n[len(target) :]: n for n in places if n.startswith(f"{target}/")}
        members |= {new: places[old] for new, old in inside.items() if not _is_hidden(new)}
        unread += [] if inside else [f"link {name!r}"]
    return members


def _lmdb(root: str) -> Any:
    try:
        import lmdb
    except ImportError as error:
        text = f"{root!r} is an lmdb (as LSUN comes) and needs the package lmdb: pip install lmdb, or this package with the extra [lmdb]"
        raise ImportError(text) from error
    try:
        return lmdb.open(root, readonly=True, lock=False, readahead=False, meminit=False, max_readers=100)
    except lmdb.Error as error:
        raise ValueError(f"{storage.join(root, _LMDB)}: not a readable lmdb: {error}") from error


def _list_lmdb(root: str) -> Source:
    with _lmdb(root) as environment, environment.begin() as transaction:
        keys = [bytes(key).decode("utf-8", "surrogateescape") for key in transaction.cursor().iternext(values=False)]
    names = tuple(key for key in keys if not _is_hidden(key))
    return Source("lmdb", root, names, names, lambda: tables.NONE)


def _list_packed(root: str) -> Source:
    index = read_packed_index(root)
    names = tuple(str(k) for k in range(int(index["count"])))

    def own_labels() -> tables.Labels:
        if index["labels"] is None:
            return tables.NONE
        path = os.path.join(root, index["labels"]["file"])
        try:
            numbers = np.load(path, allow_pickle=False)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; pack the data again") from None
        if numbers.shape != (len(names),) or numbers.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: {numbers.dtype} of shape {numbers.shape}; must be {len(names)} whole numbers: pack the data again"
            )
        return tables.Labels(numbers, tuple(index["class_names"]), index["label_source"])

    height, width, _ = index["shape"]
    return Source("packed", root, names, names, own_labels, "", index["preprocessing"], (height, width))


def read_packed_index(root: str) -> dict[str, Any]:
    """The index of packed data; ValueError if it is another file, or of a version this code does not know."""
    path = storage.join(root, PACKED_INDEX)
    try:
        index = json.loads(storage.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of packed data: {error}") from None
    if not isinstance(index, dict) or "format" not in index:
        raise ValueError(f"{path}: not the index of packed data that `data pack` writes; give another folder")
    if index["format"] != 1:
        raise ValueError(
            f"{root!r}: packed data of format {index['format']!r}; this version reads format 1: pack it again"
        )
    shape, shards, labels = index.get("shape"), index.get("shards"), index.get("labels")
    whole = (
        isinstance(index.get("count"), int)
        and isinstance(shape, list)
        and len(shape) == 3
        and isinstance(shards, list)
        and all(isinstance(entry, dict) and {"file", "count", "sha256"} <= entry.keys() for entry in shards)
        and (labels is None or (isinstance(labels, dict) and {"file", "sha256"} <= labels.keys()))
        and {"preprocessing", "class_names", "label_source", "skipped"} <= index.keys()
    )
    if not whole:
        raise ValueError(f"{path}: not the index of packed data that `data pack` writes; give another folder")
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
        if self.kind == "files":
            return path
        name = path.split(":", 2)[-1].replace("\0", "/").lstrip("/") if self.kind == "tar" else path
        return f"{self.root}: {name}"

    def read(self, path: str, channels: int = 3) -> np.ndarray:
        """One picture, uint8 `[H, W, channels]`; ValueError names one that cannot be read."""
        if self.kind == "packed":
            return self._packed(path, channels)
        with self.opened(path) as image:
            return images.as_array(image, channels)

    def opened(self, path: str) -> contextlib.AbstractContextManager[PILImage.Image]:
        """One picture of an unpacked source as stored, decoded by PIL; ValueError if it cannot be read."""
        return images.opened(self.encoded(path), self.describe(path))

    def size(self, path: str) -> tuple[int, int]:
        """(height, width) of one picture of an unpacked source, from its head alone."""
        return images.stored_size(self.encoded(path), self.describe(path))

    def encoded(self, path: str) -> bytes:
        """The file at an address, a picture or another; of packed data, the pixels."""
        read = {"files": storage.read_bytes, "zip": self._zip, "tar": self._tar, "lmdb": self._lmdb}
        if self.kind == "packed":
            return self._pixels(path).tobytes()
        try:
            return read[self.kind](path)
        except Exception as error:  # damaged archives are answered with a dozen kinds: BadZipFile, zlib.error, ...
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
        tar = name.partition("\0")[0]
        whole = storage.join(self.root, tar) if tar else self.root
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
        picture = self._pixels(path)
        if picture.shape[2] == channels:
            return picture
        return images.as_array(images.from_array(picture), channels)

    def _pixels(self, path: str) -> np.ndarray:
        firsts, files = self._handle("index", self._packed_shards, threads_share=True)
        row = int(path)
        shard = int(np.searchsorted(firsts, row, side="right")) - 1
        whole = os.path.join(self.root, files[shard])
        array = self._handle(whole, lambda: np.load(whole, mmap_mode="r", allow_pickle=False), threads_share=True)
        return np.array(array[row - firsts[shard]])

    def _packed_shards(self) -> tuple[np.ndarray, list[str]]:
        shards = read_packed_index(self.root)["shards"]
        counts = [shard["count"] for shard in shards]
        return np.cumsum([0, *counts])[:-1], [shard["file"] for shard in shards]
