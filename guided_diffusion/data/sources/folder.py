"""A folder of image files, at any depth; local or remote."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ...runtime import storage
from ..labels import label_files
from .source import Read, Source, is_image


class Folder(Source):
    """The address of an image is its path."""

    kind = "files"
    labels_beside, threads_share = False, True

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        # A link that leads nowhere may have been a whole class, so it is named. That of an image or a table fails when it is read.
        links = [name for name, path in files.items() if not is_image(name) and os.path.islink(path)]
        broken = {name for name in links if not os.path.exists(files[name])}
        broken -= set(label_files(broken, (), beside=False))
        others += [f"broken link {name!r}" for name in sorted(broken)]
        return {name: path for name, path in files.items() if name not in broken}

    def open(self) -> Read:
        return storage.read_bytes

    def describe(self, path: str) -> str:
        return path
