"""The resize of the 2015 Inception graph, bit for bit.

The graph scales its input with the first TensorFlow resize rule: corners not aligned, no half-pixel shift, no
antialiasing, aspect ratio not kept. Features move visibly when another rule is used, so published scores can only be
compared when exactly this one is applied. `torch.nn.functional.interpolate` has no such mode.
"""

from __future__ import annotations

import numpy as np
import torch

INCEPTION_SIZE = 299


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower index, upper index and float32 weight of the upper one, for each of `size` output places.

    Everything is rounded to float32 at the same places as in the kernel: the scale, then `i * scale`.
    """
    scale = np.float32(length) / np.float32(size)
    place = np.arange(size, dtype=np.float32) * scale
    lower = np.floor(place)
    low = lower.astype(np.int64)
    return low, np.minimum(low + 1, length - 1), place - lower


def tf1_bilinear(images: torch.Tensor, size: int = INCEPTION_SIZE) -> torch.Tensor:
    """Resize images [N, H, W, 3] (uint8 or floating, any range) to float32 [N, 3, size, size] in the same range.

    Equal to `tf.compat.v1.image.resize_bilinear(images, [size, size])` in every bit on the CPU; a picture already of
    that size passes unchanged. The result lies in channels_last memory, which is what the network wants. Any number of
    channels is taken. The work happens on the device of `images`.
    """
    _, height, width, _ = images.shape
    x = images.to(torch.float32)
    if (height, width) != (size, size):
        # The kernel interpolates along x first and rounds; the same numbers come out when whole rows are done once.
        x = _along(x, 2, *_taps(width, size))
        x = _along(x, 1, *_taps(height, size))
    return x.permute(0, 3, 1, 2)


def _along(x: torch.Tensor, axis: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> torch.Tensor:
    """a + (b - a) * t along one axis, each operation rounded on its own (a fused multiply-add would differ)."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    a = x.index_select(axis, torch.from_numpy(low).to(x.device))
    step = x.index_select(axis, torch.from_numpy(high).to(x.device)).sub_(a)
    return a.add_(step.mul_(torch.from_numpy(weight).to(x.device).view(shape)))


def to_inception_range(resized: torch.Tensor) -> torch.Tensor:
    """Map 0..255 to -1..0.9921875: subtract 128, multiply by 1/128, as the graph does."""
    return (resized - 128.0).mul_(0.0078125)
