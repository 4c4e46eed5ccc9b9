"""`evaluator.py reference IMAGES --image_size 64 --out ref.npz`: make a reference file in the format of 2021.

It holds `mu`, `sigma`, `mu_s`, `sigma_s` over all images; `arr_0` with 10,000 of them (a seeded random choice, in file order) for
precision and recall; and `arr_1`, their labels, if there are any. Images are cropped as in training (centre square, box halving,
then bicubic), so that a perfect model would score well: a reference that was cropped otherwise is the most frequent cause of a
too high FID.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from guided_diffusion.data.images import center_crop
from guided_diffusion.runtime import storage

from .commands import Parser, announce_place, check_file, check_folder, place, settings_of
from .features import extract_blocks, pick_device
from .inception import SPATIAL_FEATURES, InceptionV3
from .inputs import open_images
from .settings import Settings
from .sources import ImageSource
from .statistics import Moments

KEPT = 10_000


class CroppedImages(ImageSource):
    """The images of another source, each cropped to one size."""

    def __init__(self, source: ImageSource, size: int) -> None:
        if size < 1:
            raise ValueError(f"image_size is {size}, it must be at least 1")
        super().__init__(source.name, source.count)
        self.source, self.size, self.notes = source, size, source.notes
        self.conversion = f"{source.conversion} centre crop to {size}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Batches of `batch_size` cropped images. The source is read one image at a time, since whole photographs take much memory."""
        cropped = (center_crop(image, self.size) for batch in self.source.batches(1, start, stop) for image in batch)
        while block := list(islice(cropped, batch_size)):
            yield np.stack(block)

    def labels(self) -> np.ndarray | None:
        return self.source.labels()

    def sha256(self) -> str:
        return self.source.sha256()  # of the uncropped images: the crop is in `conversion`


def make_reference(
    source: Any,
    out: str | os.PathLike[str],
    *,
    image_size: int,
    net: InceptionV3,
    keep: int = KEPT,
    seed: int = 0,
    settings: Settings | None = None,
) -> dict[str, Any] | None:
    """Write a reference npz and return its receipt (also inside: JSON text as bytes under `receipt`).

    `settings`: see `extract_blocks`. Memory needed: two covariances and the `keep` images. Returns None in all processes but the first.
    """
    if keep < 1 or seed < 0:
        raise ValueError(f"--keep is {keep} and --seed {seed}; they must be at least 1 and 0")
    images = CroppedImages(open_images(source), image_size)
    if not images.count or images.count < 2:
        raise ValueError(f"{images.name}: a reference needs at least 2 images, found {images.count}")
    labels = _labels(images)
    moments = {"": Moments(net.fc.weight.shape[1]), "_s": Moments(SPATIAL_FEATURES)}
    for block in extract_blocks(images, net, settings):
        moments[""].add(block.pool)
        moments["_s"].add(block.spatial)
    if place().rank != 0:
        return None
    chosen = np.arange(images.count)
    if images.count > keep:
        chosen = np.sort(np.random.default_rng(seed).choice(images.count, keep, replace=False))
    arrays: dict[str, np.ndarray] = {"arr_0": _take(images, chosen)}
    if labels is not None:
        arrays["arr_1"] = labels[chosen]
    for suffix, accumulated in moments.items():
        statistics = accumulated.statistics()
        arrays |= {f"mu{suffix}": statistics.mu, f"sigma{suffix}": statistics.sigma}
    receipt = {
        "images": images.count,
        "images_sha256": images.sha256(),
        "image_size": image_size,
        "preparation": [
            *(note for note in images.notes if not note.startswith("images of different sizes")),
            f"centre crop to {image_size}x{image_size}: box halving, then bicubic",
        ],
        "statistics": "over all images",
        "kept": f"{len(chosen)} images in file order, drawn with numpy.random.default_rng({seed}).choice",
        "weights_sha256": net.sha256,
        "weights_published": net.verified,
    }
    arrays["receipt"] = np.frombuffer(storage.to_json(receipt, indent=None).encode(), np.uint8)
    with storage.atomic_write(out) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return receipt


def _labels(images: ImageSource) -> np.ndarray | None:
    """The labels, or None with a warning if they are damaged: only scores per class need them."""
    try:
        return images.labels()
    except ValueError as error:
        warnings.warn(f"the reference is made without labels: {error}", stacklevel=3)
        return None


def _take(images: ImageSource, chosen: np.ndarray) -> np.ndarray:
    wanted = set(chosen.tolist())
    kept, at = [], 0
    for batch in images.batches(64):
        kept += [image for offset, image in enumerate(batch) if at + offset in wanted]
        at += len(batch)
    return np.stack(kept)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="evaluator.py reference", description="Make a reference npz from a folder, zip, tar shards or npz."
    )
    add = parser.add_argument
    add("images", help="folder (one sub-folder per class, or flat), zip, tar shards, npz")
    add("--image_size", type=int, required=True, help="side of the square that the model makes")
    add("--out", required=True, help="file to write")
    add("--keep", type=int, default=KEPT, help=f"images kept for precision and recall (default {KEPT})")
    add("--seed", type=int, default=0, help="seed of the choice of kept images (default 0)")
    parser.add_common()
    asked = parser.parse_args(arguments)
    announce_place()
    from .weights import load_inception

    check_file("--out", asked.out, [asked.images, asked.weights])
    check_folder("--shard_dir", asked.shard_dir)
    settings = settings_of(asked)
    net = load_inception(
        settings.weights,
        device=pick_device(wanted=settings.device),
        allow_unknown=settings.allow_other_weights,
        progress=settings.progress,
    )
    options = {"image_size": asked.image_size, "keep": asked.keep, "seed": asked.seed}
    receipt = make_reference(asked.images, asked.out, net=net, settings=settings, **options)
    if receipt is not None:
        print(f"wrote {asked.out}")
        for key, value in receipt.items():
            print(f"{key}: {'; '.join(value) if isinstance(value, list) else value}")
    return 0
