"""Encoders, which turn images into features: the 2015 Inception network, DINOv2, CLIP, any callable; or features from files.

Only Inception gives the published scores. The others give a Frechet distance under their own name ("FD dinov2"), with
precision, recall and KID on the same features. Their weights come from a local folder as `transformers` saves it;
nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guided_diffusion.runtime import storage
from guided_diffusion.runtime.launchers import Place

from .features import extract
from .inception import InceptionV3
from .inputs import SCAN_BYTES, FileSource, open_images
from .npy import DiskArray, Npz
from .settings import Settings
from .shards import Features
from .sources import ImageSource
from .weights import load_inception

# KID sums cubes of products of two features: up to 1e48 ** 6 = 1e288, and float64 ends at 1.8e308.
LARGEST_FEATURE = 1e48
RESIZE = "TensorFlow 1 bilinear to 299x299, no half-pixel shift, no antialiasing, float32"
_FAMILIES = {"dinov2": ("dinov2", "dinov2_with_registers"), "clip": ("clip", "clip_vision_model")}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Encoder:
    """Turns images into features. `weight`: softmax head [classes, d] for the Inception Score, or None."""

    name = ""
    weight: torch.Tensor | None = None

    def open(self, source: Any) -> ImageSource:
        """Open a source for `encode`; ValueError if `encode` could not read it. An open source is returned as it is."""
        return open_images(source)

    def encode(self, images: Any, settings: Settings, world: Place) -> Features | None:
        """Features of a set of images; None in all processes but the first."""
        raise NotImplementedError

    def receipt(self, settings: Settings) -> dict[str, Any]:
        """What features depend on, for the report."""
        raise NotImplementedError


class InceptionEncoder(Encoder):
    """The network of the published scores; finished shards in `settings.shard_dir` are reused."""

    name = "inception"

    def __init__(self, net: InceptionV3) -> None:
        self.net, self.weight = net, net.fc.weight.detach()

    def encode(self, images: Any, settings: Settings, world: Place) -> Features | None:
        return extract(images, self.net, settings, world=world)

    def receipt(self, settings: Settings) -> dict[str, Any]:
        return {
            "name": "InceptionV3 of 2015-12-05",
            "weights_sha256": self.net.sha256,
            "weights_published": self.net.verified,
            "resize": RESIZE,
            "dtype": settings.dtype,
            **({"compiled": True} if settings.compile else {}),
        }


class CallableEncoder(Encoder):
    """Any function from uint8 images [n, H, W, 3] (a tensor) to features [n, d]; runs in the first process alone."""

    def __init__(self, name: str, function: Callable[[torch.Tensor], Any], about: dict[str, Any] | None = None) -> None:
        self.name, self.function, self.about = name, function, about or {}

    def open(self, source: Any) -> ImageSource:
        images = open_images(source)
        if images.count == 0:
            raise ValueError(f"{images.name} holds no images; {self.name} features cannot come from its statistics")
        return images

    def encode(self, images: Any, settings: Settings, world: Place) -> Features | None:
        if world.rank != 0:
            return None
        parts = []
        for batch in images.batches(settings.batch_size):
            with torch.inference_mode():
                rows = self.function(torch.from_numpy(np.array(batch)))
            rows = rows.detach().float().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
            if rows.ndim != 2 or len(rows) != len(batch):
                raise ValueError(f"{self.name} gave features of shape {rows.shape} for {len(batch)} images")
            parts.append(rows.astype(np.float32))
        return Features(np.concatenate(parts))

    def receipt(self, settings: Settings) -> dict[str, Any]:
        return {"name": self.name, **self.about}


class FeatureSource(FileSource):
    """A matrix of features in an npz file: `features` (or `arr_0`) [N, d], and labels `arr_1` if any."""

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise ValueError(f"there is no file {path!r}")
        arrays = Npz(path)
        stored = arrays.get("features" if "features" in arrays else "arr_0")
        if stored is None or len(stored.shape) != 2 or stored.dtype.kind != "f":
            held = "nothing of that kind" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"{path}: expected a float matrix [images, features] under 'features', found {held}")
        self.matrix: DiskArray = stored
        rows, self.width = stored.shape
        super().__init__(path, rows, arrays)
        for at in range(0, rows, step := max(1, SCAN_BYTES // max(1, self.width * stored.dtype.itemsize))):
            largest = float(np.abs(stored[at : at + step]).max(initial=0))
            if not largest <= LARGEST_FEATURE:
                raise ValueError(
                    f"{path}: features hold {largest:g}, expected finite numbers up to {LARGEST_FEATURE:g} (divide all "
                    "sets by one number if they are larger)"
                )


class StoredFeatures(Encoder):
    """Features from npz files, see `FeatureSource`. All files must have the same number of features per image."""

    name = "npz"

    def __init__(self) -> None:
        self._first: FeatureSource | None = None

    def open(self, source: Any) -> ImageSource:
        opened = source if isinstance(source, FeatureSource) else FeatureSource(os.fspath(source))
        self._first = self._first or opened
        if opened.width != self._first.width:
            raise ValueError(
                f"{opened.name} holds {opened.width} features of each image and {self._first.name} {self._first.width}; "
                "features of two encoders cannot be compared"
            )
        return opened

    def encode(self, images: Any, settings: Settings, world: Place) -> Features | None:
        return Features(images.matrix[:]) if world.rank == 0 else None

    def receipt(self, settings: Settings) -> dict[str, Any]:
        return {"name": "features given in npz files"}


def make_encoder(settings: Settings, device: torch.device) -> Encoder:
    """The encoder that `--features` names: inception, npz, dinov2:FOLDER or clip:FOLDER."""
    kind, _, path = settings.features.partition(":")
    if kind == "inception" and not path:
        allow, progress = settings.allow_other_weights, settings.progress
        return InceptionEncoder(load_inception(settings.weights, device=device, allow_unknown=allow, progress=progress))
    if kind.lower() == "npz" and not path:
        return StoredFeatures()
    if kind in ("dinov2", "clip") and path:
        return vision_transformer(kind, path, device)
    raise ValueError(f"features is {settings.features!r}, allowed are inception, npz, dinov2:FOLDER, clip:FOLDER")


def vision_transformer(kind: str, folder: str, device: torch.device) -> CallableEncoder:
    """DINOv2 or CLIP from a local `transformers` folder (config.json and weights).

    DINOv2: class token after the last norm, as in FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675). CLIP: projected
    image embedding of unit length, as in CMMD (Jayasumana et al. 2024, arXiv:2401.09603). Both get the whole image, resized
    without cropping by antialiased bicubic interpolation of the float pixels.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{folder!r} is no model folder: it has no config.json (save one with save_pretrained)")
    try:
        family = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / 'config.json'} does not name its model_type: {error}") from error
    if family not in _FAMILIES[kind]:
        raise ValueError(f"{folder!r} holds a model of type {family!r}; --features {kind} takes {_FAMILIES[kind]}")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"--features {kind} needs the transformers package: pip install transformers") from error
    loader = transformers.AutoModel if kind == "dinov2" else transformers.CLIPVisionModelWithProjection
    model, loaded = loader.from_pretrained(str(path), local_files_only=True, output_loading_info=True)
    if loaded["missing_keys"]:
        # transformers would initialise missing weights at random
        raise ValueError(f"{folder!r} lacks weights of the model, first {sorted(loaded['missing_keys'])[:3]}")
    model = model.eval().to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (_IMAGENET, _CLIP)[kind == "clip"])
    size = 224 if kind == "dinov2" else int(model.config.image_size)

    def encode(images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(device).permute(0, 3, 1, 2).float()
        pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True) / 255
        outputs = model(pixel_values=(pixels - mean) / std)
        if kind == "dinov2":
            return outputs.last_hidden_state[:, 0]
        return torch.nn.functional.normalize(outputs.image_embeds, dim=1)

    digest = hashlib.sha256()
    for file in sorted(path.glob("*")):
        if file.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{file.name} {storage.sha256_of(file)}\n".encode())
    about = {"weights_sha256": digest.hexdigest(), "resize": f"antialiased bicubic to {size}x{size}, float32"}
    return CallableEncoder(kind, encode, about)
