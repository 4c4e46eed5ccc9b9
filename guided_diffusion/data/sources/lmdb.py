"""An lmdb of encoded images, as LSUN comes: every value is an image, its key the name. Needs the package lmdb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...runtime import storage
from ..labels import NONE, Labels
from .source import Read, Source, is_hidden

_TEXT = ("utf-8", "surrogateescape")


class Lmdb(Source):
    """The address of an image is its key."""

    kind, marker, all_images = "lmdb", "data.mdb", True
    threads_share = True  # lmdb is thread-safe, and a process may open a file only once

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        with _environment(self.root) as environment, environment.begin() as transaction:
            keys = [bytes(key).decode(*_TEXT) for key in transaction.cursor().iternext(values=False)]
        return {key: key for key in keys if not is_hidden(key)}

    def own_labels(self) -> Labels:
        return NONE  # keys are arbitrary text, so a prefix or folder in them is no class

    def open(self) -> Read:
        environment = _environment(self.root)

        def read(key: str) -> bytes:
            with environment.begin() as transaction:
                value = transaction.get(key.encode(*_TEXT))
            if value is None:
                raise KeyError("no such key")
            return bytes(value)

        return read


def _environment(root: str) -> Any:
    try:
        import lmdb
    except ImportError as error:
        package = "the package lmdb: pip install lmdb, or this package with the extra [lmdb]"
        raise ImportError(f"{root!r} is an lmdb (as LSUN comes) and needs {package}") from error
    try:
        return lmdb.open(root, readonly=True, lock=False, readahead=False, meminit=False, max_readers=100)
    except lmdb.Error as error:
        raise ValueError(f"{storage.join(root, Lmdb.marker)}: not a readable lmdb: {error}") from error
