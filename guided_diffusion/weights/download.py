"""Fetching a released file: from the cache folder, else downloaded and checked."""

from __future__ import annotations

import logging
import os

from ..runtime import storage
from .files import load_weights
from .identify import SIGNATURES, signature
from .released import Preset

_log = logging.getLogger(__name__)


def fetch(preset: Preset, cache: str, *, timeout: float = 30.0) -> str:
    """The path of the released file: as it lies in `cache`, else downloaded into it with a progress bar.

    A download is checked twice: its length against the server's word, and its tensors' names and shapes against the released
    layout (2021 published no checksums; the sha256 of what came is logged). ConnectionError says which file to place where.
    """
    target = os.path.join(cache, preset.file)
    if not os.path.isfile(target):
        try:
            storage.download(preset.url, target, check=lambda path: check(path, preset), timeout_s=timeout)
        except OSError as error:
            raise ConnectionError(
                f"cannot download {preset.url} ({error}). Bring the file from a machine that can, and place it at {target}"
            ) from None
    return target


def check(path: str, preset: Preset) -> str:
    """sha256 of a released file; ValueError unless its tensors have the names and shapes of that release."""
    shapes = {name: tuple(value.shape) for name, value in load_weights(path).items()}
    if preset.name not in SIGNATURES.get(signature(shapes), ()):
        raise ValueError(
            f"{path} does not have the names and shapes of {preset.file}; the download is damaged or another file"
        )
    digest = storage.sha256_of(path)
    _log.info("%s: sha256 %s, names and shapes as released", preset.file, digest)
    return digest
