"""Features per second: the network as scores use it (folded, channels_last, chunks) against the plain module."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from evaluations.features import CHUNK_ON_CPU, CHUNK_ON_GPU, extract
from evaluations.inception import Conv, InceptionV3
from evaluations.resize import tf1_bilinear, to_inception_range

from .timing import clock_of, compare


def _network() -> InceptionV3:
    """Random weights that keep activations at their usual size; vanishing ones would slow the arithmetic down."""
    net = InceptionV3()
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, Conv):
            weight = module.conv.weight
            weight.normal_(0, math.sqrt(2 / weight[0].numel()), generator=generator)
    return net


def measure(*, device: str = "cpu", images: int = 8, side: int = 256, rounds: int = 5) -> dict[str, Any]:
    """Time both on the same uint8 images, resize included, in turns; on the CPU in CPU seconds of one thread.

    Returns images per second of both, their ratio (median of rounds, with quartiles) and the largest difference of
    the pool features relative to the largest feature.
    """
    chunk = CHUNK_ON_CPU if device == "cpu" else CHUNK_ON_GPU
    images = -(-images // chunk) * chunk
    pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8).to(device)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        plain, fast = _network().to(device), _network().fold().to(device)

        def run_plain() -> torch.Tensor:
            return plain(to_inception_range(tf1_bilinear(pixels)).contiguous()).pool

        def run_fast() -> torch.Tensor:
            parts = [fast(to_inception_range(tf1_bilinear(part))).pool for part in pixels.split(chunk)]
            return torch.cat(parts)

        if device == "cpu":
            torch.set_num_threads(1)
        try:
            one, other = run_fast(), run_plain()
            name = f"Inception features, {images} images of {side} px"
            ratio = compare(name, run_fast, run_plain, against="plain module", rounds=rounds, warmup=0, device=device)
        finally:
            torch.set_num_threads(threads)
    return {
        "ratio": ratio,
        "images_per_second": images / ratio.ours_seconds,
        "plain_images_per_second": images / ratio.other_seconds,
        "largest_relative_difference": float((one - other).abs().max() / other.abs().max()),
    }


def whole_job(*, device: str = "cpu", images: int = 8, side: int = 64) -> dict[str, float]:
    """Seconds that 50,000 images would take from uint8 arrays to features in main memory, from what `images` of them took.

    This is the whole path: read, sent, resized, computed in full float32, brought back; on the CPU in CPU seconds.
    """
    chunk = CHUNK_ON_CPU if device == "cpu" else CHUNK_ON_GPU
    images = -(-images // chunk) * chunk
    pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    with torch.no_grad():
        net = _network().fold().to(device)
    now = clock_of(device)
    extract(pixels[:chunk], net, progress=False, world=(0, 1))
    begin = now()
    extract(pixels, net, progress=False, world=(0, 1))
    took = now() - begin
    return {f"50,000_images_of_{side}_px,_seconds,_extrapolated_from_{images}": 50_000 * took / images}


if __name__ == "__main__":
    print(measure())
