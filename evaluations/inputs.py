"""Sources of images: npz, npy, a folder or zip of pictures, tar shards, an array in memory, or an iterable of batches.

Images that are not uint8 [N, H, W, 3] are either converted, with a note for the report, or raise ValueError with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from guided_diffusion.data.sources import is_image
from guided_diffusion.runtime import storage

from .conversions import Bounds, check_bounds, declared_bounds, plan, refuse_binary, refuse_one_image
from .npy import DiskArray, Npz
from .sources import MAX_BATCH_BYTES, ImageSource, PictureSource
from .statistics import Stored, validated

STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
SCAN_BYTES = 1 << 26
Array = DiskArray | np.ndarray


def open_images(source: Any, *, value_range: Bounds | None = None) -> ImageSource:
    """Open a path (npz, npy, folder, zip, tar shards), an array, or any iterable of image batches.

    `value_range` says what floats mean, (0, 1) or (-1, 1); without it the whole array is scanned once to find out.
    Raises ValueError for anything that cannot be read as images.
    """
    if isinstance(source, ImageSource):
        return source
    if not isinstance(source, (str, os.PathLike)):
        array = _as_array(source)
        if array is not None:
            return ArraySource("array in memory", array, value_range, {})
        if isinstance(source, Iterable):
            return IterableSource(source, value_range=value_range)
        raise ValueError(f"cannot read images from {type(source).__name__}; give a path, an array or batches of uint8")
    path = storage.expand(source)
    if not (storage.exists(path) or path.endswith(".tar")):
        raise ValueError(f"there is no file or folder {path!r} (working directory {os.getcwd()})")
    if not os.path.isfile(path) or path.lower().endswith(".tar"):
        return PictureSource(path)
    with open(path, "rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return ArraySource(path, DiskArray(path), value_range, {})
    if start[:1] == b"\x80":
        raise ValueError(f"{path} is a Python pickle, which can run code when read; save images with numpy.savez")
    if path.endswith(".npz") or _holds_arrays(path):
        return _from_npz(path, value_range)
    if start[:2] == b"PK" or path.lower().endswith(".zip"):
        return PictureSource(path)
    raise ValueError(
        f"{path} is no known kind of image file (it starts with {start!r}); "
        "npz, npy, .zip of images, .tar shards or a folder can be read"
    )


def _holds_arrays(path: str) -> bool:
    """Whether a zip file holds arrays. ValueError if it holds pictures too, since either may be meant."""
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    arrays = sorted({"arr_0.npy", "mu.npy"}.intersection(names))
    pictures = [name for name in names if is_image(name)]
    if arrays and pictures:
        raise ValueError(
            f"{path} holds {arrays[0]} and beside it {len(pictures)} images (first: {pictures[0]!r}); pack what is meant into "
            "a file of its own"
        )
    return bool(arrays)


def _from_npz(path: str, value_range: Bounds | None) -> ImageSource:
    arrays = Npz(path)
    if "arr_0" in arrays:
        source = ArraySource(path, arrays["arr_0"], value_range, arrays)
        if "mu" not in arrays and (rest := [key for key in STATISTICS if key in arrays]):
            source.note(f"holds {', '.join(rest)} without mu: not used, all statistics come from the images")
        return source
    if "mu" in arrays:
        statistics = FileSource(path, 0, arrays)
        statistics.note("statistics only: there are no images in this file")
        return statistics
    raise ValueError(
        f"missing arr_0 in npz file {path} (it holds {sorted(arrays) or 'nothing'}); "
        "numpy.savez(path, images) saves images as arr_0"
    )


def _as_array(source: Any) -> np.ndarray | None:
    if hasattr(source, "detach"):  # a torch tensor
        source = source.detach().cpu()
        source = (source.float() if str(source.dtype) == "torch.bfloat16" else source).numpy()  # which numpy lacks
    return source if isinstance(source, np.ndarray) else None


class FileSource(ImageSource):
    """One npz or npy file with its labels and statistics, if any. This base class has no images; subclasses read them."""

    def __init__(self, name: str, count: int, arrays: Mapping[str, DiskArray]) -> None:
        super().__init__(name, count)
        self._arrays = arrays

    def labels(self) -> np.ndarray | None:
        arrays = self._arrays
        return class_numbers(f"arr_1 in {self.name}", arrays["arr_1"], self.count or 0) if "arr_1" in arrays else None

    def statistics(self) -> Stored | None:
        return self._statistics

    @cached_property
    def _statistics(self) -> Stored | None:
        """mu and sigma and, where the file has both, mu_s and sigma_s; None without `mu`.

        ValueError for `mu` without `sigma`, and for arrays of another shape or that are no covariance.
        """
        name, arrays = self.name, self._arrays
        if "mu" not in arrays:
            return None
        if "sigma" not in arrays:
            raise ValueError(f"{name} holds mu without sigma; a precomputed mean needs its covariance")

        def read(key: str) -> np.ndarray:
            array, shape = arrays[key], STATISTICS[key]
            if array.shape != shape or array.dtype.kind != "f":
                raise ValueError(
                    f"{key} in {name} has shape {array.shape} and dtype {array.dtype}, expected {shape} floats: features "
                    "of the Inception network of 2015. Statistics of another network cannot be compared with them"
                )
            return array[:]

        pool = validated(read("mu"), read("sigma"), name=f"mu, sigma in {name}")
        if not {"mu_s", "sigma_s"} <= arrays.keys():
            return Stored(pool, None)
        return Stored(pool, validated(read("mu_s"), read("sigma_s"), name=f"mu_s, sigma_s in {name}"))

    def sha256(self) -> str:
        return storage.sha256_of(self.name)


class ArraySource(FileSource):
    """Images in one array: an npz member, an npy file or an array in memory. `others`: the npz file's arrays."""

    def __init__(self, name: str, array: Array, value_range: Bounds | None, others: Mapping[str, DiskArray]) -> None:
        shape, dtype = array.shape, array.dtype
        if dtype.hasobject or dtype.kind not in "buif":
            raise ValueError(f"an array of {dtype} holds no images")
        if len(shape) == 0 or shape[0] == 0:
            raise ValueError(f"{name} holds no images (shape {shape})")
        super().__init__(name, shape[0], others)
        self._array = array
        self._item_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
        self._scan_step = max(1, SCAN_BYTES // self._item_bytes)
        refuse_one_image(name, dtype, shape)
        plan(name, np.dtype(np.uint8), shape, None)  # refuse a wrong layout before a long scan
        bounds = None if dtype == np.uint8 else declared_bounds(value_range, dtype) or self._scan()
        self._bounds = bounds if value_range is not None else None
        self.conversion = f"range {self._bounds}" if self._bounds else ""
        self._conversion = plan(name, dtype, shape, bounds)
        self.notes += self._conversion.notes
        refuse_binary(name, array[: min(64, self._scan_step)])

    def _parts(self) -> Iterator[np.ndarray]:
        for at in range(0, self._array.shape[0], self._scan_step):
            yield self._array[at : at + self._scan_step]

    def _scan(self) -> Bounds:
        low, high = np.inf, -np.inf
        for part in self._parts():
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                return np.nan, np.nan
            low, high = min(low, float(part.min())), max(high, float(part.max()))
        return low, high

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._conversion.height, self._conversion.width, 3

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        stop = self._array.shape[0] if stop is None else min(stop, self._array.shape[0])
        step = max(1, min(batch_size, MAX_BATCH_BYTES // self._item_bytes))
        for at in range(start, stop, step):
            images = self._array[at : min(at + step, stop)]
            check_bounds(self.name, images, self._bounds)
            yield self._conversion.apply(images)

    def sha256(self) -> str:
        if isinstance(self._array, DiskArray):
            return super().sha256()
        digest = hashlib.sha256(f"{self._array.shape} {self._array.dtype.str}\n".encode())
        for part in self._parts():
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


class IterableSource(ImageSource):
    """An iterable of batches, for scoring while sampling: arrays or tensors, or pairs of images and labels.

    Can be read once only; `count`, `labels` and `sha256` are known when all batches have been read.
    """

    def __init__(self, batches: Iterable[Any], *, value_range: Bounds | None = None) -> None:
        super().__init__("batches", None)
        self._batches = batches
        self._range = value_range
        self._digest = hashlib.sha256()
        self._labels: list[np.ndarray] = []
        self._bad_labels: ValueError | None = None
        self._labels_wanted = False
        self._entry: tuple[int, ...] | None = None
        self._shape: tuple[int, int, int] | None = None
        self._started = False

    @property
    def shape(self) -> tuple[int, int, int] | None:
        return self._shape

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        if self._started or start or stop is not None:
            raise ValueError("batches that come from an iterable can be read once only, from the start to the end")
        self._started = True
        total = 0
        for item in self._batches:
            pair = isinstance(item, (tuple, list)) and len(item) == 2  # a DataLoader gives lists
            images, labels = item if pair else (item, None)
            array = self._converted(images, first=total == 0)
            if labels is not None:
                self._add_labels(labels, len(array))
            self._digest.update(f"{array.shape}\n".encode() + array.tobytes())
            total += len(array)
            for at in range(0, len(array), batch_size):
                yield array[at : at + batch_size]
        if total == 0:
            raise ValueError("the iterable gave no images")
        self.count = total

    def _converted(self, images: Any, *, first: bool) -> np.ndarray:
        array = _as_array(images)
        if array is None:
            raise ValueError(
                "a batch must be an array or tensor of uint8 images, or a pair of these and labels, got "
                f"{type(images).__name__}"
            )
        if array.shape[1:] != self._entry:
            refuse_one_image("a batch", array.dtype, array.shape)
            self._entry = array.shape[1:]
        if first:
            refuse_binary("a batch", array)
        bounds = None if array.dtype == np.uint8 else declared_bounds(self._range, array.dtype)
        if array.dtype != np.uint8 and bounds is None:
            raise ValueError(f"a batch holds {array.dtype}; give uint8, or say value_range=(0, 1) or (-1, 1)")
        check_bounds(self.name, array, bounds)
        conversion = plan(self.name, array.dtype, array.shape, bounds)
        for note in conversion.notes:
            self.note(note)
        self._shape = (conversion.height, conversion.width, 3)
        return np.array(conversion.apply(array))  # a copy: the caller may reuse the memory of the batch

    def _add_labels(self, labels: Any, count: int) -> None:
        try:
            array = _as_array(labels)
            self._labels.append(class_numbers("a batch", np.array(labels if array is None else array), count))
        except (ValueError, TypeError) as error:
            self._bad_labels = self._bad_labels or ValueError(f"the labels that came with a batch: {error}")
            if self._labels_wanted:
                raise self._bad_labels from error

    def labels(self) -> np.ndarray | None:
        if self._bad_labels is not None:
            raise self._bad_labels
        labels = np.concatenate(self._labels) if self._labels else None
        if labels is not None and self.count is not None and len(labels) != self.count:
            raise ValueError(f"{len(labels)} labels came with {self.count} images")
        return labels

    def want_labels(self) -> None:
        self._labels_wanted = True

    def sha256(self) -> str:
        if self.count is None:
            raise ValueError("the identity of batches is known when all of them have been read")
        return self._digest.hexdigest()


def class_numbers(name: str, labels: Array, count: int) -> np.ndarray:
    """Labels as int64 [count]; ValueError unless they are `count` whole numbers from 0."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{name} holds labels of shape {labels.shape} and dtype {labels.dtype}; labels are whole numbers, one for "
            f"each of the {count} images"
        )
    numbers = labels[:].astype(np.int64)
    if numbers.min(initial=0) < 0:
        raise ValueError(f"{name} holds the label {numbers.min()}; classes are numbered from 0")
    return numbers
