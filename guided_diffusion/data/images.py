"""Images: PIL to uint8 arrays, the crop of the 2021 release pixel for pixel, and uint8 <-> float.

Shapes: `H W C` for one image (numpy, uint8, 0..255), `N H W C` / `N C H W` for batches (torch). A size is a side in pixels or
(height, width).
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from PIL import Image as PILImage

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# 2021 truncates (x + 1) * 127.5, but float32 puts 63 of the 256 values a hair below the integer they came from (1 would return as 0).
# Anything above the rounding error, 2**-18, and far below 1 repairs that; it moves one pixel in 30 000 of a continuous image.
_TRUNCATION_SLACK = 2.0**-15

Size = int | tuple[int, int]


def as_array(image: PILImage.Image, channels: int) -> np.ndarray:
    """A PIL image of any mode as uint8 `[H, W, channels]`, converted by PIL's rules (grey is ITU-R 601 luma)."""
    from PIL import Image

    mode = mode_of(channels)
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # PIL would clip 16-bit grey to 255 and lose nearly everything; 65535 -> 255.
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32 bits per value) has no fixed range; save it with 8 or 16 bits first")
    if image.mode != mode:
        image = image.convert(mode)
    array = np.asarray(image)
    return array.reshape(*array.shape[:2], channels)


def mode_of(channels: int) -> str:
    """PIL's name for images of so many channels; ValueError if it has none."""
    if channels not in MODES:
        raise ValueError(f"channels={channels}: must be one of {sorted(MODES)} ({', '.join(MODES.values())})")
    return MODES[channels]


def from_array(array: np.ndarray) -> PILImage.Image:
    """The PIL image of uint8 `[H, W]` or `[H, W, C]`, C in 1..4."""
    from PIL import Image

    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def center_crop(image: np.ndarray | PILImage.Image, size: Size) -> np.ndarray:
    """The largest centered `size` window, scaled: uint8 `[H, W, C]` (or PIL) -> `[h, w, C]`, the pixels of the 2021 release.

    Halved with a box filter while both sides are at least twice too large, then bicubic to the exact scale: bicubic alone aliases
    when it shrinks much (its support in PIL is bounded), box alone blurs.
    """
    height, width = height_width(size)
    scaled = _cover(image, height, width)
    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
    return scaled[top : top + height, left : left + width]


def random_crop(
    image: np.ndarray | PILImage.Image, size: Size, rng: random.Random, min_frac: float = 0.8, max_frac: float = 1.0
) -> np.ndarray:
    """A random `size` window of the image scaled so that the window is `min_frac` to `max_frac` of its shorter side.

    The draws are those of the 2021 release in its order (scale, top, left), so the same `random.Random` state gives the same pixels.
    """
    if not 0 < min_frac <= max_frac <= 1:
        raise ValueError(f"min_frac={min_frac}, max_frac={max_frac}: must satisfy 0 < min_frac <= max_frac <= 1")
    height, width = height_width(size)
    shorter_side = rng.randrange(math.ceil(min(height, width) / max_frac), math.ceil(min(height, width) / min_frac) + 1)
    scaled = _cover(image, *_covered((height, width), shorter_side))
    top = rng.randrange(scaled.shape[0] - height + 1)
    left = rng.randrange(scaled.shape[1] - width + 1)
    return scaled[top : top + height, left : left + width]


def largest_cover(size: Size, min_frac: float = 0.8) -> tuple[int, int]:
    """The (height, width) that `random_crop` may scale an image to at most, before it cuts a window out."""
    height, width = height_width(size)
    return _covered((height, width), math.ceil(min(height, width) / min_frac))


def _covered(size: tuple[int, int], side: int) -> tuple[int, int]:
    """`size` scaled to the shorter side `side`, rounded up."""
    return -(-size[0] * side // min(size)), -(-size[1] * side // min(size))


def _cover(image: np.ndarray | PILImage.Image, height: int, width: int) -> np.ndarray:
    """Scale an image, aspect kept, to the smallest size that covers `height x width`."""
    from PIL.Image import Resampling

    if isinstance(image, np.ndarray) and image.shape[:2] == (height, width):
        return image  # packed images have the size already: resizing would change nothing
    scaled = from_array(image) if isinstance(image, np.ndarray) else image
    while scaled.width >= 2 * width and scaled.height >= 2 * height:
        scaled = scaled.resize((scaled.width // 2, scaled.height // 2), resample=Resampling.BOX)
    scale = max(width / scaled.width, height / scaled.height)
    scaled = scaled.resize((round(scaled.width * scale), round(scaled.height * scale)), resample=Resampling.BICUBIC)
    array, has_channel_axis = np.asarray(scaled), isinstance(image, np.ndarray) and image.ndim == 3
    return array.reshape(*array.shape[:2], -1) if has_channel_axis else array


def height_width(size: Size) -> tuple[int, int]:
    """A size as (height, width); ValueError unless both are positive."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image size {size}: must be positive")
    return height, width


def preprocessing_id(size: Size, channels: int = 3, crop: str = "center") -> str:
    """A name of the preprocessing: equal names mean equal pixels. It is stored with packed data and with scores."""
    height, width = height_width(size)
    return f"{crop}-crop/box-halving+bicubic/{height}x{width}/{mode_of(channels)}/v1"


def to_float(images: Tensor, flips: Tensor | None = None) -> Tensor:
    """uint8 `[N, H, W, C]` -> float32 `[N, C, H, W]` in [-1, 1], in channels-last memory, on the device of `images`.

    `flips` bool `[N]` on that device: which images to mirror, left for right.
    """
    if flips is not None:
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(2), images)
    # A scalar divisor becomes a multiplication by its rounded reciprocal on CUDA, one bit off the CPU; a tensor one is a division.
    divisor = torch.full((), 127.5, device=images.device)
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(divisor).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """float `[N, C, H, W]` in [-1, 1] (clamped) -> uint8 `[N, H, W, C]`: inverts `to_float`; values between are truncated as in 2021."""
    values = (images.to(torch.float32) + 1) * 127.5 + _TRUNCATION_SLACK
    return values.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def low_res(images: Tensor, size: Size) -> Tensor:
    """Shrink float `[N, C, H, W]` to `size` by averaging areas: the input of a super-resolution model."""
    return functional.interpolate(images, height_width(size), mode="area")
