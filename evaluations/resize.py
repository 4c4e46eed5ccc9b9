"""The resize of the 2015 Inception graph, bit for bit.

The graph scales its input by the resize of TensorFlow 1: corners not aligned, no half-pixel shift, no antialiasing, aspect ratio
not kept. Another rule changes features visibly, so scores can only be compared with published ones if exactly this rule is used.
`torch.nn.functional.interpolate` has no such mode.
"""

from __future__ import annotations

import numpy as np
import torch

INCEPTION_SIZE = 299


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower input index, upper input index and float32 weight of the upper one, for each of `size` output pixels.

    The scale, then `i * scale` are rounded to float32, as in TensorFlow's kernel.
    """
    scale = np.float32(length) / np.float32(size)
    position = np.arange(size, dtype=np.float32) * scale
    lower = np.floor(position)
    low = lower.astype(np.int64)
    return low, np.minimum(low + 1, length - 1), position - lower


def tf1_bilinear(images: torch.Tensor, size: int = INCEPTION_SIZE) -> torch.Tensor:
    """Resize images [N, H, W, 3] (uint8 or floating, any range) to float32 [N, 3, size, size] in the same range.

    Equal to `tf.compat.v1.image.resize_bilinear(images, [size, size])` in every bit on the CPU; an image of that size is returned
    unchanged. Any number of channels is allowed. The result is in channels_last memory, as the network wants it, and computed on the
    device of `images`.
    """
    _, height, width, _ = images.shape
    x = images.to(torch.float32)
    if (height, width) != (size, size):
        # TensorFlow's kernel interpolates each output pixel along x, rounds, then along y: whole axes give the same numbers.
        x = _interpolate(x, 2, *_taps(width, size))
        x = _interpolate(x, 1, *_taps(height, size))
    return x.permute(0, 3, 1, 2)


def _interpolate(x: torch.Tensor, axis: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> torch.Tensor:
    """a + (b - a) * t along one axis, each operation rounded separately (a fused multiply-add would differ)."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    a = x.index_select(axis, torch.from_numpy(low).to(x.device))
    step = x.index_select(axis, torch.from_numpy(high).to(x.device)).sub_(a)
    return a.add_(step.mul_(torch.from_numpy(weight).to(x.device).view(shape)))


def to_inception_range(resized: torch.Tensor) -> torch.Tensor:
    """Map 0..255 to -1..0.9921875: subtract 128, multiply by 1/128, as the graph does."""
    return (resized - 128.0).mul_(0.0078125)
