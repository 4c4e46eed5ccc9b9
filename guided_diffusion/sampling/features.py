"""A classifier's features of clean images (the inputs of its last layer), and the classes it predicts."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import to_float
from ..data.samples import open_images
from ..diffusion.samplers import NotFinite, check_finite
from ..runtime import storage
from ..weights.load import Loaded
from .pipeline import why_not_finite

log = logging.getLogger(__name__)


def read_images(path: str, classifier: Loaded, batch_size: int) -> tuple[Iterator[np.ndarray], np.ndarray | None]:
    """Batches uint8 `[B, H, W, C]` of the classifier's size, cropped as in training, and the labels if there are any."""
    channels, size, _ = classifier.shape
    try:
        images = open_images(path, size, channels)
    except ValueError as error:  # features need no labels, so try without; any other error comes again
        images = open_images(path, size, channels, labels="none")
        log.warning("without labels: %s", error)
    starts = range(0, len(images), batch_size)
    batches = (np.stack([images.read(k) for k in range(len(images))[start : start + batch_size]]) for start in starts)
    return batches, images.records.labels


def classifier_features(classifier: Loaded, batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 `[N, D]` and predicted classes int64 `[N]` of clean images (the network is given step 0).

    The features are the inputs of the last layer with weights. ValueError names an image if they or logits are not finite.
    """
    net, process = classifier.net, classifier.process
    last = [module for module in net.out.modules() if getattr(module, "weight", None) is not None][-1]  # type: ignore[union-attr]
    captured: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    features, predicted = [], []
    try:
        with torch.no_grad():
            for batch in batches:
                x = to_float(torch.from_numpy(batch).to(process.device))
                logits = net(x, process.time_at(torch.zeros(len(x), dtype=torch.long, device=process.device)))
                batch_features = captured.pop().float().flatten(1)
                check_finite(torch.cat([batch_features, logits.float()], dim=1))
                features.append(batch_features.cpu().numpy())
                predicted.append(logits.argmax(1).cpu().numpy())
    except NotFinite as error:
        image = sum(map(len, features)) + error.row
        raise ValueError(f"features of image {image}: {error}; {why_not_finite([classifier])}") from None
    finally:
        hook.remove()
    return np.concatenate(features), np.concatenate(predicted).astype(np.int64)


def write_features(classifier: Loaded, images: str, path: str, batch_size: int = 64) -> np.ndarray | None:
    """Write a classifier's features of a folder or npz of images as an npz that the evaluation suite scores (`--features npz`):
    `features`, `predicted` (classes), and the labels `arr_1` if the images have any.

    Returns for each image whether it is called rightly, bool `[N]`; None without labels.
    """
    batches, labels = read_images(images, classifier, batch_size)
    features, predicted = classifier_features(classifier, batches)
    arrays: dict[str, Any] = {
        "features": features,
        "predicted": predicted,
        **({} if labels is None else {"arr_1": labels}),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes_atomic(path, buffer.getvalue())
    log.info("%s: %d features of %d images", path, features.shape[1], len(features))
    return None if labels is None else np.asarray(predicted == labels)
