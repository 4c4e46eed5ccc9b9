"""A folder of image files, at any depth; local or remote."""

from __future__ import annotations

from collections.abc import Mapping

from ...runtime import storage
from .source import Read, Source


class Folder(Source):
    """The address of an image is its path."""

    kind = "files"
    labels_beside, threads_share = False, True

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        return files

    def open(self) -> Read:
        return storage.read_bytes

    def describe(self, path: str) -> str:
        return path
