"""What a classifier of noised images knows at each noise level, and how large its gradient is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..data.images import to_float
from ..data.samples import open_images
from ..diffusion import grids
from ..diffusion.guidance import log_prob_gradient
from ..diffusion.process import add_noise
from ..runtime.streams import EVALUATE, Streams
from ..weights.load import Loaded


class Level(NamedTuple):
    """A classifier at one noise level: means over images, with their standard errors.

    step      the position in the classifier's noise process
    sigma     the noise level, sigma/alpha = sqrt(1/alpha_bar - 1)
    accuracy  the share of images that it calls rightly; chance is 1 / number of classes
    gradient  the norm of the gradient of log p(label | x) with respect to x
    shift     by how much guidance of scale 1 moves the predicted noise, as a share of that noise: sqrt(1 - alpha_bar) * gradient / sqrt(D)
              for images of D numbers (arXiv 2105.05233, algorithm 2)
    """

    step: float
    sigma: float
    accuracy: float
    accuracy_error: float
    gradient: float
    gradient_error: float
    shift: float


def measure(
    classifier: Loaded,
    path: str,
    *,
    labels: str = "auto",
    count: int = 500,
    levels: int = 10,
    batch_size: int = 50,
    seed: int = 0,
) -> list[Level]:
    """The classifier at `levels` noise levels, even in log-SNR, on `count` images of a folder or archive, evenly spread over it.

    The noise of an image depends on (seed, its number, level) alone. ValueError if the images have no labels that it knows.
    """
    channels, size, _ = classifier.shape
    images = open_images(path, size, channels, labels=labels)
    images.records.require_labels()
    classes = images.labels_for(classifier.num_classes, classifier.class_names, classifier.path)
    process, net = classifier.process, classifier.net
    grid = grids.log_snr(process, levels)
    ids = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)).tolist()
    right, norms = np.empty((2, levels, len(ids)))
    for first in range(0, len(ids), batch_size):
        batch = ids[first : first + batch_size]
        x0 = to_float(torch.from_numpy(np.stack([images.read(k) for k in batch])).to(process.device))
        y = torch.from_numpy(classes[batch]).to(process.device)
        noise, gradient = Streams(seed, EVALUATE, ids=batch, device=process.device), log_prob_gradient(net, y)
        for level, position in enumerate(grid.positions.tolist()):
            i = torch.full((len(batch),), position, dtype=process.time.dtype, device=process.device)
            x, time = add_noise(process, x0, i, noise.noise(x0, level)), process.time_at(i)
            with torch.no_grad():
                right[level, first : first + len(batch)] = (net(x, time).argmax(1) == y).cpu().numpy()
            norms[level, first : first + len(batch)] = gradient(x, time).float().flatten(1).norm(dim=1).cpu().numpy()
    share = grid.sigma / math.sqrt(channels * size * classifier.shape[2])
    means = np.stack([right.mean(1), _error(right), norms.mean(1), _error(norms), norms.mean(1) * share], axis=1)
    places = zip(grid.positions.tolist(), np.exp(-grid.lam).tolist(), means.tolist())
    return [Level(step, sigma, *values) for step, sigma, values in places]


def _error(values: np.ndarray) -> np.ndarray:
    """The standard error of the mean of each row."""
    return np.asarray(values.std(axis=1) / math.sqrt(max(1, values.shape[1] - 1)))


def table(levels: Sequence[Level]) -> str:
    """The text of a table with one line for each level, from noise to data."""
    lines = [
        f"{'step':>8s} {'sigma/alpha':>12s} {'accuracy':>16s} {'|grad log p(y|x)|':>20s} {'shift at scale 1':>18s}"
    ]
    for each in levels:
        accuracy = f"{each.accuracy:.3f} ± {each.accuracy_error:.3f}"
        gradient = f"{each.gradient:.4g} ± {each.gradient_error:.2g}"
        lines.append(f"{each.step:8.1f} {each.sigma:12.4g} {accuracy:>16s} {gradient:>20s} {each.shift:18.3%}")
    return "\n".join(lines)
