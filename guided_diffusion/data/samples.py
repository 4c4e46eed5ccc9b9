"""Images of one size as input of upsamplers and classifiers: from an npz that a sample command wrote, or from a folder or archive."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime import storage
from .classes import renumber
from .images import Size, center_crop, height_width, to_float
from .listing import Records, list_records
from .sources import open_source

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """Images of one size, read when they are asked for.

    records  their paths and labels
    read     k -> image k, uint8 `[H, W, C]`
    about    a description for messages
    """

    records: Records
    read: Callable[[int], np.ndarray]
    about: str

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, ids: Sequence[int]) -> Tensor:
        """[B, C, H, W] in [-1, 1], for the samples `ids`: sample i is made of image i % N."""
        return to_float(torch.from_numpy(np.stack([self.read(i % len(self)) for i in ids])))

    def low_res(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """The input of an upsampler."""
        return {"low_res": self.batch(ids)}

    def identity(self) -> str:
        """SHA-256 of the npz, or of all image files and their names, order and labels."""
        records = self.records
        if records.kind == "npz":
            return storage.sha256_of(records.root)
        source = open_source(records.kind, records.root)
        content = "".join(hashlib.sha256(source.encoded(path)).hexdigest() for path in records.paths)
        return hashlib.sha256((content + records.digest()).encode()).hexdigest()

    def labels_for(self, count: int, names: Sequence[str], whose: str) -> np.ndarray:
        """The labels as class numbers of a network of `count` classes called `names`, as `renumber` finds them."""
        path, labels = self.records.root, self.records.labels
        assert labels is not None
        wrong = labels[(labels < 0) | (labels >= max(count, len(self.records.class_names)))]
        if len(wrong):
            raise ValueError(f"{path} has the label {int(wrong[0])}; the networks know the classes 0 to {count - 1}")
        records, note = renumber(self.records, names, count, whose)
        if note:
            _log.info(note)
        return records.require_labels()


def open_images(
    path: str, size: Size, channels: int, *, labels: str = "auto", class_names: Sequence[str] = ()
) -> Images:
    """The images of an npz, whose labels index `class_names`, or of a folder or archive as training lists it, center-cropped to `size`.

    `labels`: where the labels of a folder or archive come from, as in --labels.
    """
    if _is_npz(path):
        images, numbers = _read_npz(path, size, channels)
        about = "no labels" if numbers is None else f"labels of {len(set(numbers.tolist()))} classes"
        names = () if numbers is None else tuple(class_names)
        records = Records(("",) * len(images), numbers, names, "npz", "npz", path)
        return Images(records, lambda k: np.asarray(images[k]), about)
    records = list_records(path, labels=labels)
    source = open_source(records.kind, records.root)
    about = "cut and scaled to {}x{}; labels: {}".format(*height_width(size), records.label_source)
    return Images(records, lambda k: center_crop(source.read(records.paths[k], channels), size), about)


def _is_npz(path: str) -> bool:
    """Whether a path is to be read as an npz of samples, whatever its name: not so a folder, a tar, or a zip of pictures."""
    if path.endswith(".npz") or storage.isdir(path) or not storage.exists(path):
        return path.endswith(".npz")
    with storage.open_file(path) as file:
        if zipfile.is_zipfile(file):
            return "arr_0.npy" in zipfile.ZipFile(file).namelist()
    return not path.lower().endswith(".tar")


def _read_npz(path: str, size: Size, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 [N, height, width, channels], memory-mapped if possible; labels int64 [N] or None).

    ValueError if the file cannot be read, or holds other arrays.
    """
    try:
        source: Any = io.BytesIO(storage.read_bytes(path)) if storage.is_remote(path) else path
        with np.load(source, allow_pickle=False) as arrays:
            labels = arrays.get("arr_1")
            if "arr_0" not in arrays:
                raise ValueError(f"it has {', '.join(arrays) or 'nothing'} and no arr_0")
            images = _mapped(path) if isinstance(source, str) else None
            images = arrays["arr_0"] if images is None else images
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        what = "it holds no plain arrays" if "pickle" in str(error) else error  # numpy's advice is to read it unsafely
        raise ValueError(
            f"{path} cannot be read as an npz of samples ({what}); give one as sample commands write it, or a folder of images"
        ) from None
    shape = (*height_width(size), channels)
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        wanted = f"the model takes uint8 images [N, {', '.join(map(str, shape))}]"
        raise ValueError(f"{path} holds {images.dtype} images {list(images.shape)}; {wanted}")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        held = f"{len(images)} images and labels arr_1 of shape {list(labels.shape)} and type {labels.dtype}"
        raise ValueError(f"{path} has {held}; labels are whole numbers, one for each image")
    return images, None if labels is None else labels.astype(np.int64)


def _mapped(path: str) -> np.ndarray | None:
    """`arr_0` of a local npz as a memory map: no process holds 50,000 images. None if it is compressed."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        member = archive.getinfo("arr_0.npy")
        file.seek(member.header_offset + 26)  # in the local header: the lengths of name and extra field; skip these
        file.seek(int(np.frombuffer(file.read(4), "<u2").sum()), os.SEEK_CUR)
        if member.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    return None if dtype.hasobject or fortran else np.memmap(path, dtype, "r", offset, shape)
