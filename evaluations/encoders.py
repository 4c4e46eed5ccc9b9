"""What turns images into features: the 2015 Inception network, DINOv2, CLIP, any callable, or features made elsewhere.

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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .features import World, extract
from .inception import POOL_FEATURES, SPATIAL_FEATURES
from .inputs import ImageSource, file_sha256, open_images
from .npy import open_npz

RESIZE = "TensorFlow 1 bilinear to 299x299, no half-pixel shift, no antialiasing, float32"
_FAMILIES = {"dinov2": ("dinov2", "dinov2_with_registers"), "clip": ("clip", "clip_vision_model")}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Encoded(NamedTuple):
    """Features of one set of images and what is known of it."""

    name: str
    sha256: str
    shape: tuple[int, ...] | None
    notes: tuple[str, ...]
    labels: np.ndarray | None
    pool: np.ndarray
    """[N, d] float32"""
    spatial: np.ndarray | None
    """[N, 2023] float32 of Inception, else None"""


class Options(Protocol):
    """The settings that encoders look at."""

    @property
    def weights(self) -> str | None: ...
    @property
    def allow_other_weights(self) -> bool: ...
    @property
    def features(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def compile(self) -> bool: ...
    @property
    def shard_dir(self) -> str | None: ...
    @property
    def progress(self) -> bool: ...


class Encoder(Protocol):
    """Images to features. `weight`: softmax head [classes, d] for the Inception Score, or None."""

    name: str
    takes_images: bool
    weight: torch.Tensor | None

    def encode(self, images: Any, settings: Options, world: World) -> Encoded | None:
        """Features of a set; None in all processes but the first."""

    def receipt(self) -> dict[str, Any]:
        """What features depend on, for the report."""


def make_encoder(settings: Options, device: torch.device) -> Encoder:
    """The encoder that `--features` names: inception, npz, dinov2:FOLDER or clip:FOLDER."""
    kind, _, path = settings.features.partition(":")
    if kind == "inception" and not path:
        return InceptionEncoder(settings.weights, settings.allow_other_weights, device)
    if kind.lower() == "npz" and not path:
        return StoredFeatures()
    if kind in ("dinov2", "clip") and path:
        return vision_transformer(kind, path, device)
    raise ValueError(f"features is {settings.features!r}, allowed are inception, npz, dinov2:FOLDER, clip:FOLDER")


class InceptionEncoder:
    """The network of the published scores."""

    name = "inception"
    takes_images = True

    def __init__(self, weights: str | None, allow_other: bool, device: torch.device) -> None:
        from .weights import load_inception

        self.net = load_inception(weights, device=device, allow_unknown=allow_other)
        self.weight: torch.Tensor | None = self.net.fc.weight.detach()
        self._dtype, self._compiled = "", False

    def encode(self, images: ImageSource, settings: Options, world: World) -> Encoded | None:
        """Both feature tensors of every image; shards in `settings.shard_dir` are reused."""
        self._dtype, self._compiled = settings.dtype, settings.compile
        if images.count == 0:
            empty = np.empty((0, POOL_FEATURES), np.float32), np.empty((0, SPATIAL_FEATURES), np.float32)
            return _encoded(images, *empty) if world.rank == 0 else None
        found = extract(
            images,
            self.net,
            batch_size=settings.batch_size,
            progress=settings.progress,
            dtype=settings.dtype,
            compile=settings.compile,
            shard_dir=settings.shard_dir,
            world=world,
        )
        return None if found is None else _encoded(images, found.pool, found.spatial)

    def receipt(self) -> dict[str, Any]:
        """Weights by content, resize rule, precision."""
        return {
            "name": "InceptionV3 of 2015-12-05",
            "weights_sha256": self.net.sha256,
            "weights_published": self.net.verified,
            "resize": RESIZE,
            "dtype": self._dtype,
            **({"compiled": True} if self._compiled else {}),
        }


class CallableEncoder:
    """Any function from uint8 images [n, H, W, 3] (a tensor) to features [n, d]."""

    takes_images = True
    weight: torch.Tensor | None = None

    def __init__(self, name: str, function: Callable[[torch.Tensor], Any], about: dict[str, Any] | None = None) -> None:
        self.name = name
        self.function = function
        self.about = about or {}

    def encode(self, images: ImageSource, settings: Options, world: World) -> Encoded | None:
        """Features batch by batch, in the first process alone."""
        if world.rank != 0:
            return None
        parts = []
        for batch in open_images(images).batches(settings.batch_size):
            with torch.inference_mode():
                found = self.function(torch.from_numpy(np.array(batch)))
            found = found.detach().float().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
            if found.ndim != 2 or len(found) != len(batch):
                raise ValueError(f"{self.name} gave features of shape {found.shape} for {len(batch)} images")
            parts.append(found.astype(np.float32))
        if not parts:
            raise ValueError(f"{images.name} holds no images; {self.name} features cannot come from its statistics")
        return _encoded(images, np.concatenate(parts), None)

    def receipt(self) -> dict[str, Any]:
        """Name and whatever was said about the function."""
        return {"name": self.name, **self.about}


class StoredFeatures:
    """Features made elsewhere: npz files with a matrix `features` (or `arr_0`) [N, d], and labels `arr_1` if any."""

    name = "npz"
    takes_images = False
    weight: torch.Tensor | None = None

    def encode(self, images: Any, settings: Options, world: World) -> Encoded | None:
        """Read one file."""
        if world.rank != 0:
            return None
        path = os.fspath(images)
        if not os.path.isfile(path):
            raise ValueError(f"there is no file {path!r}")
        arrays = open_npz(path)
        stored = arrays.get("features", arrays.get("arr_0"))
        if stored is None or len(stored.header.shape) != 2 or stored.header.dtype.kind != "f":
            held = "nothing of that kind" if stored is None else f"{stored.header.dtype} {list(stored.header.shape)}"
            raise ValueError(f"{path}: expected a float matrix [images, features] under 'features', found {held}")
        matrix = stored.read(0, stored.header.shape[0])
        labels = None
        if "arr_1" in arrays:
            header = arrays["arr_1"].header
            if header.shape != (len(matrix),) or header.dtype.kind not in "iu":
                raise ValueError(
                    f"arr_1 in {path} has shape {header.shape} and dtype {header.dtype}; labels are whole numbers, one "
                    f"for each of the {len(matrix)} rows of features"
                )
            labels = arrays["arr_1"].read(0, len(matrix)).astype(np.int64)
        return Encoded(path, file_sha256(path), None, ("features made elsewhere",), labels, matrix, None)

    def receipt(self) -> dict[str, Any]:
        """Nothing is known of the encoder."""
        return {"name": "features given in npz files"}


def vision_transformer(kind: str, folder: str, device: torch.device) -> CallableEncoder:
    """DINOv2 or CLIP from a local `transformers` folder (config.json and weights).

    DINOv2: class token after the last norm, as in FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675). CLIP: projected
    image embedding of unit length, as in CMMD (Jayasumana et al. 2024, arXiv:2401.09603). Both see the whole image,
    resized by antialiased bicubic interpolation of the float pixels.
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
        # transformers fills what is missing with random numbers
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
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    about = {"weights_sha256": digest.hexdigest(), "resize": f"antialiased bicubic to {size}x{size}, float32"}
    return CallableEncoder(kind, encode, about)


def _encoded(images: ImageSource, pool: np.ndarray, spatial: np.ndarray | None) -> Encoded:
    return Encoded(
        images.name, images.sha256(), images.shape, tuple(sorted(images.notes)), images.labels(), pool, spatial
    )
