"""Where the images come from: npz, npy, a folder or zip of pictures, tar shards, or batches as they are made.

Everything reaches the network as uint8 [N, H, W, 3]. What is not so is either converted, and the conversion told in
`notes`, or refused with the reason: a float array in [0, 1] taken for 0..255 gives a score that looks like one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from guided_diffusion.runtime import storage

from .conversions import check_bounds, declared_bounds, plan, refuse_binary, refuse_one_image
from .npy import DiskArray, Npz

STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
_SCAN_BYTES = 1 << 26
MAX_BATCH_BYTES = 1 << 25  # of pictures that wait to be resized, however many were asked for


class ImageSource:
    """Images in a fixed order; the base of all kinds of input."""

    name: str = ""
    count: int | None = None
    """How many images; None while that is not known (batches as they are made)."""
    conversion: str = ""
    """What decides about the pixels beside the content (a declared value range, a crop): part of their identity."""

    def __init__(self, name: str, count: int | None) -> None:
        self.name = name
        self.count = count
        self.notes: list[str] = []

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(H, W, 3) after conversion; None when sizes differ or are not known yet."""
        return None

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """uint8 [n, H, W, 3] with 1 <= n <= batch_size, images [start, stop) in order, one size per batch.

        Large images come in smaller batches, so that a batch or two need little memory.
        """
        raise NotImplementedError

    def labels(self) -> np.ndarray | None:
        """int64 [N] class of each image, or None. ValueError for labels that are no classes: read them only if needed."""
        return None

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number, where classes are numbered by name within this set; else none."""
        return ()

    def want_labels(self) -> None:
        """Labels will be needed: refuse bad ones now, before the images are read."""
        self.labels()

    def statistics(self) -> dict[str, np.ndarray] | None:
        """Precomputed float64 mu, sigma (pool) and, where there are any, mu_s, sigma_s (spatial); None without `mu`."""
        return None

    def sha256(self) -> str:
        """Identity of the content: of the file, or of the names and contents of all members in order."""
        raise NotImplementedError

    def tell(self, note: str) -> None:
        """Remember a conversion for the report, once."""
        if note not in self.notes:
            self.notes.append(note)


def open_images(source: Any, *, value_range: tuple[float, float] | None = None) -> ImageSource:
    """Open a path (npz, npy, folder, zip, tar shards), an array, or any iterable of image batches.

    `value_range` says what floats mean, (0, 1) or (-1, 1); without it the whole array is scanned once to find out.
    Raises ValueError for anything that cannot be read as images.
    """
    if isinstance(source, ImageSource):
        return source
    if not isinstance(source, (str, os.PathLike)):
        array = _as_array(source)
        if array is not None:
            return ArraySource("array in memory", MemoryArray(array), value_range=value_range)
        if isinstance(source, Iterable):
            return IterableSource(source, value_range=value_range)
        raise ValueError(f"cannot read images from {type(source).__name__}; give a path, an array or batches of uint8")
    text = storage.expand(source)
    if not (storage.exists(text) or text.endswith(".tar")):
        raise ValueError(f"there is no file or folder {text!r} (working directory {os.getcwd()})")
    if not os.path.isfile(text) or text.lower().endswith(".tar"):
        return _pictures(text)
    with open(text, "rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return ArraySource(text, DiskArray(text), value_range=value_range)
    if start[:1] == b"\x80":
        raise ValueError(f"{text} is a Python pickle, which can run code when read; save images with numpy.savez")
    if text.endswith(".npz") or _holds_arrays(text):
        return _from_npz(text, value_range)
    if start[:2] == b"PK" or text.lower().endswith(".zip"):
        return _pictures(text)
    raise ValueError(
        f"{text} is no known kind of image file (it starts with {start!r}); "
        "npz, npy, .zip of images, .tar shards or a folder can be read"
    )


def _pictures(text: str) -> ImageSource:
    from .pictures import PictureSource

    return PictureSource(text)


def _holds_arrays(path: str) -> bool:
    """Whether a zip file is one of arrays. ValueError for one of pictures as well, of which either may be meant."""
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    arrays = sorted({"arr_0.npy", "mu.npy"}.intersection(names))
    if arrays:
        from guided_diffusion.data.sources import EXTENSIONS

        pictures = [name for name in names if name.lower().endswith(tuple(f".{ending}" for ending in EXTENSIONS))]
        if pictures:
            raise ValueError(
                f"{path} holds {arrays[0]} and beside it {len(pictures)} images (first: {pictures[0]!r}); pack what is meant into "
                "a file of its own"
            )
    return bool(arrays)


def _from_npz(text: str, value_range: tuple[float, float] | None) -> ImageSource:
    arrays = Npz(text)
    if "arr_0" in arrays:
        source = ArraySource(text, arrays["arr_0"], others=arrays, value_range=value_range)
        if "mu" not in arrays and (rest := [key for key in STATISTICS if key in arrays]):
            source.tell(f"holds {', '.join(rest)} without mu: not used, all statistics come from the images")
        return source
    if "mu" in arrays:
        return StatisticsSource(text, arrays)
    raise ValueError(
        f"missing arr_0 in npz file {text} (it holds {sorted(arrays) or 'nothing'}); "
        "numpy.savez(path, images) saves images as arr_0"
    )


def _as_array(source: Any) -> np.ndarray | None:
    if hasattr(source, "detach"):  # a torch tensor, without importing torch here
        source = source.detach().cpu()
        source = (source.float() if str(source.dtype) == "torch.bfloat16" else source).numpy()  # which numpy lacks
    return source if isinstance(source, np.ndarray) else None


class MemoryArray:
    """An array in memory with the reading interface of `DiskArray`."""

    def __init__(self, array: np.ndarray) -> None:
        if array.dtype.hasobject or array.dtype.kind not in "buif":
            raise ValueError(f"an array of {array.dtype} holds no images")
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]


class ArraySource(ImageSource):
    """Images in one array: npz member, npy file or memory."""

    def __init__(
        self,
        name: str,
        array: DiskArray | MemoryArray,
        *,
        others: Mapping[str, DiskArray] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        header = array.header if isinstance(array, DiskArray) else array
        shape, dtype = header.shape, header.dtype
        if len(shape) == 0 or shape[0] == 0:
            raise ValueError(f"{name} holds no images (shape {shape})")
        super().__init__(name, shape[0])
        self._array = array
        self._others = others or {}
        self._item_bytes = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
        refuse_one_image(name, dtype, shape)
        plan(name, np.dtype(np.uint8), shape, None)  # refuse a wrong layout before a long scan
        bounds = None if dtype == np.uint8 else declared_bounds(value_range, dtype) or self._scan(shape[0])
        self._bounds = bounds if value_range is not None else None
        self.conversion = f"range {self._bounds}" if self._bounds else ""
        self._conversion = plan(name, dtype, shape, bounds)
        self.notes += self._conversion.notes
        if dtype == np.uint8:
            refuse_binary(name, array.read(0, max(1, min(64, _SCAN_BYTES // self._item_bytes))))

    def _scan(self, count: int) -> tuple[float, float]:
        low, high = np.inf, -np.inf
        step = max(1, _SCAN_BYTES // self._item_bytes)
        for at in range(0, count, step):
            part = self._array.read(at, at + step)
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                return np.nan, np.nan
            low, high = min(low, float(part.min())), max(high, float(part.max()))
        return low, high

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._conversion.height, self._conversion.width, 3

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        assert self.count is not None
        stop = self.count if stop is None else min(stop, self.count)
        step = max(1, min(batch_size, MAX_BATCH_BYTES // self._item_bytes))
        for at in range(start, stop, step):
            images = self._array.read(at, min(at + step, stop))
            check_bounds(self.name, images, self._bounds)
            yield self._conversion.apply(images)

    def labels(self) -> np.ndarray | None:
        assert self.count is not None
        return read_labels(self.name, self._others, self.count)

    def statistics(self) -> dict[str, np.ndarray] | None:
        return read_statistics(self.name, self._others)

    def sha256(self) -> str:
        if isinstance(self._array, DiskArray):
            return file_sha256(self.name)
        digest = hashlib.sha256(f"{self._array.shape} {self._array.dtype.str}\n".encode())
        for at in range(0, len(self._array.array), step := max(1, _SCAN_BYTES // self._item_bytes)):
            digest.update(np.ascontiguousarray(self._array.read(at, at + step)).tobytes())
        return digest.hexdigest()


class StatisticsSource(ImageSource):
    """An npz file with precomputed statistics and no images: enough for FID and sFID, not for precision and recall."""

    def __init__(self, name: str, arrays: Mapping[str, DiskArray]) -> None:
        super().__init__(name, 0)
        self._arrays = arrays
        self.tell("statistics only: there are no images in this file")

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        return iter(())

    def statistics(self) -> dict[str, np.ndarray] | None:
        return read_statistics(self.name, self._arrays)

    def sha256(self) -> str:
        return file_sha256(self.name)


class IterableSource(ImageSource):
    """Batches as they come, for scoring while sampling: arrays or tensors, or pairs of images and labels.

    Read once, from the start; `count`, `labels` and `sha256` are known when all has been read.
    """

    def __init__(self, batches: Iterable[Any], *, value_range: tuple[float, float] | None = None) -> None:
        super().__init__("batches", None)
        self._batches = batches
        self._range = value_range
        self._digest = hashlib.sha256()
        self._labels: list[np.ndarray | ValueError] = []
        self._labels_wanted = False
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
        entry: tuple[int, ...] | None = None
        for item in self._batches:
            pair = isinstance(item, (tuple, list)) and len(item) == 2  # a DataLoader gives lists
            images, labels = item if pair else (item, None)
            array = _as_array(images)
            if array is None:
                raise ValueError(
                    "a batch must be an array or tensor of uint8 images, or a pair of these and labels, got "
                    f"{type(images).__name__}"
                )
            if array.shape[1:] != entry:
                refuse_one_image("a batch", array.dtype, array.shape)
                entry = array.shape[1:]
            bounds = None if array.dtype == np.uint8 else declared_bounds(self._range, array.dtype)
            if array.dtype != np.uint8 and bounds is None:
                raise ValueError(f"a batch holds {array.dtype}; give uint8, or say value_range=(0, 1) or (-1, 1)")
            check_bounds(self.name, array, bounds)
            conversion = plan(self.name, array.dtype, array.shape, bounds)
            if array.dtype == np.uint8 and total == 0:
                refuse_binary("a batch", array)
            array = np.array(conversion.apply(array))  # a copy: the maker of the batch may use its memory again
            for note in conversion.notes:
                self.tell(note)
            self._shape = (conversion.height, conversion.width, 3)
            self._digest.update(f"{array.shape}\n".encode() + array.tobytes())
            if labels is not None:
                self._labels.append(_batch_labels(labels, len(array)))
                if self._labels_wanted and isinstance(self._labels[-1], ValueError):
                    raise self._labels[-1]
            total += len(array)
            for at in range(0, len(array), batch_size):
                yield array[at : at + batch_size]
        if total == 0:
            raise ValueError("the iterable gave no images")
        self.count = total

    def labels(self) -> np.ndarray | None:
        good = [batch for batch in self._labels if not isinstance(batch, ValueError)]
        for batch in self._labels:
            if isinstance(batch, ValueError):
                raise batch
        labels = np.concatenate(good) if good else None
        if labels is not None and self.count is not None and len(labels) != self.count:
            raise ValueError(f"{len(labels)} labels came with {self.count} images")
        return labels

    def want_labels(self) -> None:
        self._labels_wanted = True

    def sha256(self) -> str:
        if self.count is None:
            raise ValueError("the identity of batches is known when all of them have been read")
        return self._digest.hexdigest()


def _batch_labels(labels: Any, count: int) -> np.ndarray | ValueError:
    """int64 [count], or what is wrong with them, to be raised if they are needed."""
    try:
        array = _as_array(labels)
        array = np.array(labels if array is None else array)
    except (ValueError, TypeError) as error:
        return ValueError(f"the labels of a batch cannot be read: {error}")
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min(initial=0) < 0:
        return ValueError(
            f"labels of shape {array.shape} and dtype {array.dtype} came with a batch of {count} images; "
            "labels are class numbers from 0, one for each image"
        )
    return array.astype(np.int64)


def read_labels(name: str, arrays: Mapping[str, DiskArray], count: int) -> np.ndarray | None:
    """int64 [count] from `arr_1`, None without it; ValueError for anything but one class number for each entry."""
    if "arr_1" not in arrays:
        return None
    stored = arrays["arr_1"]
    if stored.header.shape != (count,) or stored.header.dtype.kind not in "iu":
        raise ValueError(
            f"arr_1 in {name} has shape {stored.header.shape} and dtype {stored.header.dtype}; labels are whole "
            f"numbers, one for each of the {count} images"
        )
    labels = stored.read(0, count).astype(np.int64)
    if labels.min(initial=0) < 0:
        raise ValueError(f"arr_1 in {name} holds the label {labels.min()}; classes are numbered from 0")
    return labels


def read_statistics(name: str, arrays: Mapping[str, DiskArray]) -> dict[str, np.ndarray] | None:
    """Float64 mu, sigma and, where the file has both, mu_s, sigma_s; None without `mu`.

    ValueError for `mu` without `sigma`, and for what has another shape or is not finite.
    """
    if "mu" not in arrays:
        return None
    if "sigma" not in arrays:
        raise ValueError(f"{name} holds mu without sigma; a precomputed mean needs its covariance")
    both = "mu_s" in arrays and "sigma_s" in arrays
    found = {}
    for key in STATISTICS if both else ("mu", "sigma"):
        header, shape = arrays[key].header, STATISTICS[key]
        if header.shape != shape or header.dtype.kind != "f":
            raise ValueError(
                f"{key} in {name} has shape {header.shape} and dtype {header.dtype}, expected {shape} floats: features "
                "of the Inception network of 2015. Statistics of another network cannot be compared with them"
            )
        found[key] = arrays[key].read(0, shape[0]).astype(np.float64)
        if not np.isfinite(found[key]).all():
            raise ValueError(f"{key} in {name} holds values that are not finite")
    return found


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
