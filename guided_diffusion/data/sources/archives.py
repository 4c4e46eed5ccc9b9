"""Zips with `dataset.json` (the data sets of EDM and StyleGAN), and tars as WebDataset writes them."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from ...runtime import storage
from ..labels import first, tidy
from .source import Read, Source, file_type, is_hidden, is_image

_MAX_LINKS = 8


class Zip(Source):
    """A zip of images. The address of an image is its name as it stands in the archive."""

    kind, ending, begins = "zip", ".zip", b"PK"

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        try:
            with storage.open_file(self.root, "rb") as file, zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
        except Exception as error:  # zipfile answers a damaged directory with BadZipFile, struct.error and others
            raise ValueError(f"{self.root!r}: not a readable zip file: {error}") from error
        members: dict[str, str] = {}
        for info in infos:
            if info.flag_bits & 1:
                raise ValueError(f"{self.root!r}: {info.filename!r} is encrypted; make the archive again without")
            if info.file_size > 1032 * info.compress_size + 64:  # deflate cannot do better than 1032:1
                size = f"claims {info.file_size} bytes, which is not possible; make the archive again"
                raise ValueError(f"{self.root!r}: {info.filename!r} {size}")
            _add_member(members, tidy(info.filename), info.filename, self.root)
        return dict(sorted(members.items(), key=lambda member: member[0].split("/")))

    def open(self) -> Read:
        return zipfile.ZipFile(storage.open_file(self.root, "rb")).read


class Tar(Source):
    """Uncompressed tars: one, a pattern of several, or a folder of them (a tar is then called a shard).

    The address of an image is `offset:size:tar`, a zero byte and its name in the tar, so reading it is one seek.
    """

    kind, ending, marker = "tar", ".tar", "*.tar"

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        tars = [name for name in files if "/" not in name and name.lower().endswith(".tar")]
        others += [file_type(name) for name in files if name not in tars]
        if not tars:
            self.root, tars = _shards(self.root)
        found: dict[str, str] = {}
        for tar in tars:
            shown_name = tar or posixpath.basename(self.root.replace(os.sep, "/"))
            for name, extent in _read_directory(self._tar_path(tar), others).items():
                found[f"{shown_name}/{name}"] = f"{extent}:{tar}\0{name}"
        return found

    def open(self) -> Read:
        files: dict[str, IO[Any]] = {}

        def read(address: str) -> bytes:
            offset, size, name = address.split(":", 2)
            tar = name.partition("\0")[0]
            if tar not in files:
                files[tar] = storage.open_file(self._tar_path(tar), "rb")
            files[tar].seek(int(offset))
            return bytes(files[tar].read(int(size)))

        return read

    def describe(self, path: str) -> str:
        return super().describe(path.split(":", 2)[2].replace("\0", "/").lstrip("/"))

    def folder_names(self, wanted: bool) -> Sequence[str]:
        # Tars are usually shards of one data set, so classes are the folders inside of them.
        inside = [path.partition("\0")[2] for path in self.paths]
        if not wanted or any("/" in name for name in inside):
            return inside
        # Without such folders: the folders of the tars (cat/00.tar and cat/01.tar are one class), else each tar is a class.
        folders = [posixpath.split(posixpath.dirname(name))[0] for name in self.names]
        beside = [posixpath.join(folder, posixpath.basename(name)) for folder, name in zip(folders, self.names)]
        return beside if len(set(folders)) > 1 else self.names

    def _tar_path(self, tar: str) -> str:
        return storage.join(self.root, tar) if tar else self.root


def _shards(root: str) -> tuple[str, list[str]]:
    """(folder, tars in it) of a pattern: `{000..012}` counts, `*` and `?` match existing files. For one tar (root, [""])."""
    if storage.exists(root):
        return root, [""]
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", root)
    if braces:
        begin, end = braces.groups()
        numbers = range(int(begin), int(end) + 1)
        found = [f"{root[: braces.start()]}{n:0{len(begin)}d}{root[braces.end() :]}" for n in numbers]
    else:
        found = sorted(glob.glob(root, recursive=True))
    missing = [name for name in found if not storage.exists(name)]
    if not found:
        raise ValueError(f"{root!r}: no such file, nor files that match it as a pattern")
    if missing:
        raise ValueError(f"{root!r}: {len(missing)} of {len(found)} shards are missing{first(missing)}")
    folder = posixpath.dirname(re.split(r"[{*?[]", root.replace(os.sep, "/"))[0])
    return folder or ".", [name[len(folder) :].replace(os.sep, "/").lstrip("/") for name in found]


def _read_directory(path: str, left_out: list[str]) -> dict[str, str]:
    """Name -> `offset:size` of each member of one tar. Links that lead to no member go to `left_out`."""
    try:
        with storage.open_file(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            infos = [info for info in archive if info.isfile() or info.islnk() or info.issym()]
            file.seek(archive.offset)
            more = file.read(1 << 20).strip(b"\0")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path!r}: not a readable uncompressed tar file: {error}") from error
    if more:
        cause = "is cut off, or goes on after its end as tars joined by cat do (tar --concatenate joins them)"
        raise ValueError(f"{path!r}: {cause}")
    members: dict[str, str] = {}
    extents: dict[str, str] = {}  # name -> offset:size
    links: dict[str, str] = {}  # name -> target
    for info in infos:
        name = tidy(info.name)
        if info.issparse():  # its bytes in the tar are not those of the file
            raise ValueError(f"{path!r}: {info.name!r} is stored with holes; make the tar again")
        if info.isfile():
            extents[name] = f"{info.offset_data}:{info.size}"
        else:  # a hard link gives the name of a member, a symbolic one a path from where it stands
            target = info.linkname if info.islnk() else posixpath.join(posixpath.dirname(name), info.linkname)
            links[name] = name if target.startswith("/") else tidy(target)
        _add_member(members, name, extents.get(name, ""), path)
    for name in [name for name in links if name in members]:
        del members[name]
        inside = _resolve_link(links, name, extents)
        members |= {new: extent for new, extent in inside.items() if not is_hidden(new)}
        left_out += [] if inside else [f"link {name!r}"]
    return members


def _resolve_link(links: Mapping[str, str], name: str, extents: Mapping[str, str]) -> dict[str, str]:
    """{name: extent} of the link `name`: of the member it leads to, or of all members below that folder, named as below the link."""
    target = links[name]
    for _ in range(_MAX_LINKS):  # a link may lead to another link; the limit ends circles
        target = links.get(target, target)
    if target in extents:
        return {name: extents[target]}
    if not target or f"{name}/".startswith(f"{target}/"):  # a folder that holds the link itself
        return {}
    return {name + old[len(target) :]: extent for old, extent in extents.items() if old.startswith(f"{target}/")}


def _add_member(members: dict[str, str], name: str, address: str, archive: str) -> None:
    """Add a member of an archive unless it is hidden. ValueError for an image whose name is there already."""
    if name in members and is_image(name):
        raise ValueError(f"{archive!r}: holds {name!r} twice; unpack the archive and pack each image once")
    if not is_hidden(name):
        members[name] = address
