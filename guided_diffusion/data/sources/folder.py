"""A folder of image files, at any depth; local or remote."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ...runtime import storage
from .source import Read, Source, is_image


class Folder(Source):
    """The address of an image is its path."""

    kind = "files"
    labels_beside, threads_share = False, True

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        # A link that leads nowhere may have been a whole class, so it is named, not counted by its ending.
        links = [name for name, path in files.items() if os.path.islink(path) and not os.path.exists(path)]
        broken = {name: f"broken link {name!r}" for name in links if not is_image(name)}
        others += broken.values()
        return {name: path for name, path in files.items() if name not in broken}

    def open(self) -> Read:
        return storage.read_bytes

    def describe(self, path: str) -> str:
        return path
