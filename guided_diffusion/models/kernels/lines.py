"""The arguments of the fused norm that have one number per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Lines(NamedTuple):
    """norm(x + offset) * weight + bias, then * (1 + scale) + shift.

    weight, bias: [C]. offset: [C], [N, C] or None. scale and shift: both [N, C], both [1, C], or both None.
    """

    offset: Tensor | None
    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """a and b, so that a * norm + b = (norm * weight + bias) * (1 + scale) + shift: [C], [1, C] or [N, C]."""
        a, b = self.weight.to(dtype), self.bias.to(dtype)
        if self.scale is None or self.shift is None:
            return a, b
        factor = 1 + self.scale.to(dtype)
        return a * factor, torch.addcmul(self.shift.to(dtype), b, factor)

    def gradients(self, da: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all but the offset in each image, from those of a and b: [N, C]."""
        if self.scale is None:
            return None, da, db, None, None
        factor = 1 + self.scale.to(da.dtype)
        return None, da * factor, db * factor, self.weight * da + self.bias * db, db

    def summed(self, of_images: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients in each image [N, C] -> those that are `wanted`: where images share a number, the sum."""
        return tuple(
            part.sum_to_size(line.shape).to(line.dtype) if wants and line is not None and part is not None else None
            for line, part, wants in zip(self, of_images, wanted)
        )

    def arguments(self) -> tuple[Any, ...]:
        """The five with channels adjacent in memory, then two steps from image to image, 0 if all share the numbers: of the
        offset, and of scale and shift."""
        lines = [line if line is None or line.stride(-1) == 1 else line.contiguous() for line in self]
        if lines[3] is not None and lines[4] is not None and lines[3].stride(0) != lines[4].stride(0):
            lines[3:] = lines[3].contiguous(), lines[4].contiguous()
        return *lines, *(
            line.stride(0) if line is not None and line.dim() > 1 < len(line) else 0 for line in (lines[0], lines[3])
        )
