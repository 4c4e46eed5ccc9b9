"""Finished features on disk, in shards, so that an interrupted run can resume and processes can share the work."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from guided_diffusion.runtime import storage

from .inception import POOL_FEATURES, SPATIAL_FEATURES
from .npy import Npz


class Features(NamedTuple):
    """Float32 features of N images in order."""

    pool: np.ndarray
    """[N, d]; of Inception [N, 2048]"""
    spatial: np.ndarray | None = None
    """[N, 2023] of Inception, else None"""


class Shards:
    """Finished features in a folder: one npz file per range of images. key: a hash of all that the features depend on."""

    def __init__(self, folder: Path, key: str, ranges: list[tuple[int, int]]) -> None:
        self.folder, self.key, self.ranges = folder, key, ranges
        self.notes: list[str] = []
        """Notes about the images of all shards read so far."""

    def path(self, span: tuple[int, int]) -> Path:
        return self.folder / f"features-{self.key[:16]}-{span[0]:09d}-{span[1]:09d}.npz"

    def write(self, span: tuple[int, int], features: Features, notes: Sequence[str] = ()) -> None:
        """Write one shard, with the notes about its images."""
        assert len(features.pool) == span[1] - span[0] and features.spatial is not None
        key = np.frombuffer(bytes.fromhex(self.key), np.uint8)
        text = np.frombuffer(json.dumps(list(notes), allow_nan=False).encode(), np.uint8)
        with storage.atomic_write(self.path(span)) as file:
            np.savez(file, key=key, notes=text, pool=features.pool, spatial=features.spatial)

    def read(self, span: tuple[int, int]) -> Features | None:
        """One shard, or None if it is absent, damaged (by its checksums) or has another key."""
        try:
            arrays = Npz(self.path(span))
            if arrays["key"][:].tobytes().hex() != self.key:
                return None
            pool, spatial = arrays["pool"][:], arrays["spatial"][:]
            notes = json.loads(arrays["notes"][:].tobytes())
        except (ValueError, KeyError, OSError):
            return None
        count = span[1] - span[0]
        if pool.shape != (count, POOL_FEATURES) or spatial.shape != (count, SPATIAL_FEATURES):
            return None
        self.notes += [note for note in map(str, notes) if note not in self.notes]
        return Features(pool, spatial)

    def _life(self, rank: int) -> Path:
        return self.folder / f".features-{self.key[:16]}-{rank}.alive"

    def show_life(self, rank: int) -> None:
        """Touch a file that tells process 0 that this process is still working, however long a shard takes."""
        self._life(rank).touch()

    def end_life(self, rank: int) -> None:
        """Remove the file of `show_life`."""
        self._life(rank).unlink(missing_ok=True)

    def _signs(self, size: int) -> list[int]:
        """Signs that other processes work: the number of finished shards, and the times of the last calls of `show_life`."""
        signs = [sum(self.path(span).is_file() for span in self.ranges)]
        for rank in range(size):
            with suppress(OSError):
                signs.append(self._life(rank).stat().st_mtime_ns)
        return signs

    def wait(self, span: tuple[int, int], rank: int, size: int, timeout_s: float) -> Features:
        """One shard, waiting for the process that makes it; TimeoutError when `_signs` did not change for `timeout_s`."""
        seen: list[int] = []
        since, pause = time.monotonic(), 0.02
        while (features := self.read(span)) is None:
            if (signs := self._signs(size)) != seen:
                seen, since = signs, time.monotonic()
            if time.monotonic() - since > timeout_s:
                absent = [(i % size, other) for i, other in enumerate(self.ranges) if self.read(other) is None]
                shown = ", ".join(f"process {who}: images {a}..{b - 1}" for who, (a, b) in absent[:5])
                more = ", ..." if len(absent) > 5 else ""
                raise TimeoutError(
                    f"{len(absent)} of {len(self.ranges)} feature shards did not come to {self.folder} in "
                    f"{timeout_s:g} s ({shown}{more}). Look for an error in these processes, or for other settings "
                    "than here. Finished shards are kept, so the same command goes on from here."
                )
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        return features
