"""Finished images of one size, from an npz as sample commands write it or from a folder: what is enlarged, and what a classifier sees."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime import storage
from .classes import renumber
from .images import center_crop, to_float
from .listing import Records, list_records
from .sources import open_source


@dataclass(frozen=True)
class Images:
    """Images of `path`, none of them in memory.

    read      image k, uint8 `[H, W, C]`
    labels    int64 `[N]` or None; each is the place of its class in `class_names`, if they have names
    identity  names the content: a hash
    about     what they are, in words
    """

    path: str
    read: Callable[[int], np.ndarray]
    count: int
    labels: np.ndarray | None
    identity: str
    about: str
    class_names: tuple[str, ...] = ()
    label_source: str = "npz"

    def __len__(self) -> int:
        return self.count

    def low_res(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """`low_res` [B, C, H, W] in [-1, 1], what an upsampler enlarges for the images `ids`: ours in turn, again and again."""
        return {"low_res": to_float(torch.from_numpy(np.stack([self.read(i % self.count) for i in ids])))}

    def labels_for(self, count: int, names: Sequence[str], whose: str) -> tuple[np.ndarray, str]:
        """(labels as the class numbers of networks with `count` classes called `names`, what was done, in words)."""
        assert self.labels is not None
        if not count:
            return self.labels, ""
        wrong = self.labels[(self.labels < 0) | (self.labels >= max(count, len(self.class_names)))]
        if len(wrong):
            raise ValueError(
                f"{self.path} has the label {int(wrong[0])}; the networks know the classes 0 to {count - 1}"
            )
        own = Records(("",) * self.count, self.labels, self.class_names, self.label_source, root=self.path)
        found, note = renumber(own, names, count, whose)
        return found.require_labels(), note


def open_samples(path: str, size: int, channels: int, class_names: Sequence[str] = ()) -> Images:
    """The images of an npz; `class_names` are those of its labels. Errors as `read_npz`."""
    images, labels = read_npz(path, size, channels)
    about = f"labels of {len(set(labels.tolist()))} classes" if labels is not None else "no labels"
    names = tuple(class_names) if labels is not None else ()
    return Images(path, lambda k: np.asarray(images[k]), len(images), labels, storage.sha256_of(path), about, names)


def open_folder(path: str, size: int, channels: int, *, labels: str = "auto") -> Images:
    """The picture files of a folder, cut and scaled to `size`. `labels`: where their classes come from, as --labels says it."""
    records = list_records(path, labels=labels)
    if records.kind != "files":
        raise ValueError(f"{path} is {records.kind} data; give an npz, or a folder of picture files")
    reader = open_source(records.kind, records.root)

    def read(k: int) -> np.ndarray:
        return np.array(center_crop(reader.read(records.paths[k], channels), size)).reshape(size, size, channels)

    about = f"cut and scaled to {size}x{size}; labels: {records.label_source}"
    content = "".join(storage.sha256_of(name) for name in records.paths)
    identity = hashlib.sha256((content + records.digest()).encode()).hexdigest()
    names, source = records.class_names, records.label_source
    return Images(path, read, len(records), records.labels, identity, about, names, source)


def read_npz(path: str, size: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 [N, size, size, channels], mapped if they can be; labels int64 [N] or None).

    ValueError if the file cannot be read, or holds other arrays.
    """
    try:
        source: Any = io.BytesIO(storage.read_bytes(path)) if storage.is_remote(path) else path
        with np.load(source, allow_pickle=False) as found:
            labels = found["arr_1"] if "arr_1" in found.files else None
            if "arr_0" not in found.files:
                raise ValueError(f"it has {', '.join(found.files) or 'nothing'} and no arr_0")
            images = _mapped(path) if isinstance(source, str) else None
            images = found["arr_0"] if images is None else images
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as an npz of samples ({error}); sample commands write one") from None
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, channels) or not len(images):
        raise ValueError(
            f"{path} holds {images.dtype} images {list(images.shape)}; the model takes uint8 images [N, {size}, {size}, {channels}]"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{path} has {len(images)} images and labels arr_1 of shape {list(labels.shape)} and type {labels.dtype}; labels "
            "are whole numbers, one for each image"
        )
    return images, None if labels is None else labels.astype(np.int64)


def _mapped(path: str) -> np.ndarray | None:
    """`arr_0` of a local npz as a memory map: no process holds 50,000 images. None if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("arr_0.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            one = version == (1, 0)
            read: Any = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            header = file.tell()
    if dtype.hasobject or fortran:
        return None
    with open(path, "rb") as raw:  # the name's and the extra field's lengths are at 26 and 28 of the local header
        raw.seek(member.header_offset + 26)
        lengths = raw.read(4)
    start = member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return np.memmap(path, dtype=dtype, mode="r", offset=start + header, shape=shape)
