"""Door: the names of the 2021 `image_datasets`, opening on `guided_diffusion.data`."""

from __future__ import annotations

import math  # noqa: F401  a 2021 name of this module
import os
import random
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset

from . import dist_util as _dist_util
from .data import images as _images
from .data import labels as _labels
from .data import loader as _loader
from .data import sources as _sources
from .data.listing import Records as _Records
from .dist_util import MPI, bf  # noqa: F401  bf: a 2021 name of this module

Image: Any = _dist_util._Lazy(lambda: import_module("PIL.Image"))  # a 2021 name too
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif")  # what 2021 looked at; the rooms know more


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
) -> Iterator[tuple[th.Tensor, dict[str, th.Tensor]]]:
    """Endless `(float32 [batch_size, 3, H, W] in [-1, 1], {"y": int64 [batch_size]} or {})` of this process's share of the images.

    `batch_size` is per process. Order and augmentation follow torch's global seed; `deterministic` keeps the order of the file names
    and leaves out the last, incomplete batch of each epoch. ValueError if the share is smaller than one batch.
    Where a program has replaced `ImageDataset`, a method of it, `DataLoader`, `MPI` or a crop of this module, it loads with those.
    """
    if not data_dir:
        raise ValueError("unspecified data directory")
    paths = _list_image_files_recursively(data_dir)
    found = _labels.by_prefix([path.replace(os.sep, "/") for path in paths]) if class_cond else _labels.NONE
    if _replaceable() != _OURS:
        classes = None if found.numbers is None else found.numbers.tolist()
        crop_and_flip = {"random_crop": random_crop, "random_flip": random_flip}
        return _by_dataset(image_size, paths, classes, batch_size, not deterministic, crop_and_flip)
    comm = _dist_util._Communicator()
    records = _Records(tuple(paths), *found, root=str(data_dir)).take(slice(comm.Get_rank(), None, comm.Get_size()))
    if deterministic:
        records = records.take(slice(max(len(records) - len(records) % batch_size, batch_size)))
    batches = _loader.make_batches(
        records,
        image_size=image_size,
        batch_size=batch_size,
        seed=int(th.randint(2**62, ())),
        crop="random" if random_crop else "center",
        flip=random_flip,
        workers=min(4, os.cpu_count() or 1),
        shuffle=not deterministic,
    )
    return _old_items(batches)


def _old_items(batches: _loader.Batches) -> Iterator[tuple[th.Tensor, dict[str, th.Tensor]]]:
    for batch in batches:
        images = _images.to_float(batch.images, batch.flips)
        yield images.contiguous(), {} if batch.labels is None else {"y": batch.labels}


def _by_dataset(
    image_size: int, paths: list[str], classes: list[int] | None, batch_size: int, shuffle: bool, more: dict[str, bool]
) -> Iterator[Any]:
    """Batches by way of this module's names, as they are now."""
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    dataset = ImageDataset(image_size, paths, classes=classes, shard=rank, num_shards=size, **more)
    loader: Any = DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=1, drop_last=True)
    empty = True
    while True:
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"batch_size={batch_size} is larger than this process's share of the {len(paths)} images")


def _replaceable() -> list[Any]:
    methods = [getattr(ImageDataset, name, None) for name in ("__init__", "__len__", "__getitem__")]
    return [DataLoader, MPI, center_crop_arr, random_crop_arr, ImageDataset, *methods]


def _list_image_files_recursively(data_dir: str) -> list[str]:
    return [path for path, _ in _sources.walk(data_dir) if path.lower().endswith(_EXTENSIONS)]


class ImageDataset(Dataset[tuple[np.ndarray, dict[str, np.ndarray]]]):
    """Items `(float32 [3, H, W] in [-1, 1], {"y": int64} or {})` of one shard; crops and flips draw from the global `random`."""

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.local_images = image_paths[shard:][::num_shards]
        self.local_classes = None if classes is None else classes[shard:][::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        crop = random_crop_arr if self.random_crop else center_crop_arr
        picture = crop(
            _images.from_array(_sources.open_source("files", "").read(self.local_images[idx])), self.resolution
        )
        if self.random_flip and random.random() < 0.5:
            picture = picture[:, ::-1]
        array = _images.to_float(th.from_numpy(picture.copy())[None])[0].contiguous().numpy()
        return array, {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}


def center_crop_arr(pil_image: Any, image_size: int) -> np.ndarray:
    """The centered square of a PIL picture, an array `image_size` by `image_size`."""
    return _images.center_crop(pil_image, image_size)


def random_crop_arr(
    pil_image: Any, image_size: int, min_crop_frac: float = 0.8, max_crop_frac: float = 1.0
) -> np.ndarray:
    """A random square of a PIL picture; draws from the global `random`."""
    return _images.random_crop(pil_image, image_size, cast(Any, random), min_crop_frac, max_crop_frac)


_OURS = _replaceable()
