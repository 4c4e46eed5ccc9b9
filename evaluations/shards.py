"""Finished features on disk: shards that survive an interruption and are shared by processes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .inception import NUM_CLASSES, POOL_FEATURES, SPATIAL_FEATURES
from .npy import Npz


class Features(NamedTuple):
    """Float32 features of N images in order; see `InceptionOutputs`."""

    pool: np.ndarray
    """[N, 2048]"""
    spatial: np.ndarray
    """[N, 2023]"""
    logits: np.ndarray
    """[N, 1008], without bias"""

    @property
    def num_images(self) -> int:
        return len(self.pool)


class Shards:
    """Finished features in a folder: one npz file per range of images, named by the key of everything they rest on."""

    def __init__(self, folder: Path, key: str, ranges: list[tuple[int, int]]) -> None:
        self.folder, self.key, self.ranges = folder, key, ranges
        self.notes: list[str] = []
        """What was told of the images of all shards read so far."""

    def path(self, span: tuple[int, int]) -> Path:
        return self.folder / f"features-{self.key[:16]}-{span[0]:09d}-{span[1]:09d}.npz"

    def write(self, span: tuple[int, int], features: Features, notes: Sequence[str] = ()) -> None:
        """Write one shard whole or not at all: temporary name, flush to disk, rename. `notes`: told of its images."""
        assert features.num_images == span[1] - span[0]
        handle, partial = tempfile.mkstemp(prefix=".features-", suffix=".part", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                key = np.frombuffer(bytes.fromhex(self.key), np.uint8)
                told = np.frombuffer(json.dumps(list(notes), allow_nan=False).encode(), np.uint8)
                np.savez(file, key=key, notes=told, **features._asdict())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path(span))
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    def read(self, span: tuple[int, int]) -> Features | None:
        """One shard, or None where it is absent, damaged (checksums are compared) or of something else."""
        path = self.path(span)
        if not path.is_file():
            return None
        count = span[1] - span[0]
        shapes = {"pool": POOL_FEATURES, "spatial": SPATIAL_FEATURES, "logits": NUM_CLASSES}
        arrays: Npz | None = None
        try:
            arrays = Npz(path)
            if arrays["key"].read(0, 32).tobytes().hex() != self.key:
                return None
            values = []
            for name, width in shapes.items():
                if arrays[name].header.shape != (count, width) or arrays[name].header.dtype != np.float32:
                    return None
                values.append(arrays[name].read(0, count))
            told = json.loads(arrays["notes"].read(0, arrays["notes"].header.shape[0]).tobytes())
            self.notes += [note for note in map(str, told) if note not in self.notes]
            return Features(*values)
        except (ValueError, KeyError, OSError):
            return None
        finally:
            if arrays is not None:
                arrays.close()

    def _life(self, rank: int) -> Path:
        return self.folder / f".features-{self.key[:16]}-{rank}.alive"

    def show_life(self, rank: int) -> None:
        """A sign to the process that waits: this one goes on, however long a shard takes."""
        self._life(rank).touch()

    def end_life(self, rank: int) -> None:
        """Take the sign away."""
        self._life(rank).unlink(missing_ok=True)

    def _signs(self, size: int) -> list[int]:
        """Something that changes as long as others work: how many shards there are, and when others gave a sign."""
        signs = [sum(self.path(span).is_file() for span in self.ranges)]
        for rank in range(size):
            with suppress(OSError):
                signs.append(self._life(rank).stat().st_mtime_ns)
        return signs

    def wait(self, span: tuple[int, int], rank: int, size: int, timeout_s: float) -> Features:
        """One shard, waiting for the process that makes it; TimeoutError when no other gave a sign for `timeout_s`."""
        seen: list[int] = []
        since, pause = time.monotonic(), 0.02
        while (features := self.read(span)) is None:
            if (signs := self._signs(size)) != seen:
                seen, since = signs, time.monotonic()
            if time.monotonic() - since > timeout_s:
                absent = [(i % size, other) for i, other in enumerate(self.ranges) if self.read(other) is None]
                told = ", ".join(f"process {who}: images {a}..{b - 1}" for who, (a, b) in absent[:5])
                more = ", ..." if len(absent) > 5 else ""
                raise TimeoutError(
                    f"{len(absent)} of {len(self.ranges)} feature shards did not come to {self.folder} in "
                    f"{timeout_s:g} s ({told}{more}). Look for an error in these processes, or for other settings "
                    "than here. Finished shards are kept, so the same command goes on from here."
                )
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        return features
