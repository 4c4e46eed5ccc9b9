"""What the residual blocks hear of time and class, for all of them by one product.

Each block has its own linear layer from the time embedding to its scales and shifts: dozens of products of a few rows,
that cost a GPU more to start than to compute. Their weights laid into one matrix, they are one product. Each layer's
weight stays where it was and becomes a part of that matrix, so nothing is stored twice and state dicts stay the same.

Legend: N batch, E channels of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import transformed
from .resizing import listened_to


class Heard(NamedTuple):
    """A time embedding [N, E], and what each block's layer makes of it, [N, channels of the block] each."""

    emb: Tensor
    parts: tuple[Tensor, ...]


class JoinedEmbeddings:
    """The embedding layers of blocks, `nn.Sequential(SiLU, Linear)` each, as one. For frozen weights: no gradient reaches them."""

    def __init__(self, layers: Sequence[nn.Sequential]) -> None:
        self._layers = list(layers)
        self._linears: list[Any] = [layer[-1] for layer in self._layers]
        self._sizes = [linear.weight.shape[0] for linear in self._linears]
        with torch.no_grad():
            self._weight = torch.cat([linear.weight for linear in self._linears])
            self._bias = torch.cat([linear.bias for linear in self._linears])
            for linear, weight, bias in zip(
                self._linears, self._weight.split(self._sizes), self._bias.split(self._sizes)
            ):
                linear.weight.data, linear.bias.data = weight, bias
        self._places = self._addresses()

    def holds(self) -> bool:
        """Whether the layers still are those that were joined, frozen, and nobody waits for one of them to be called."""
        if any(layer[-1] is not linear for layer, linear in zip(self._layers, self._linears)):
            return False
        if any(linear.weight.requires_grad or linear.bias.requires_grad for linear in self._linears):
            return False
        if torch.compiler.is_compiling():
            return True  # what moves or copies a network forgets the join; graphs know neither addresses nor hooks
        if transformed():
            return False  # the weights may be stand-ins without an address
        return self._addresses() == self._places and not any(listened_to(layer, *layer) for layer in self._layers)

    def _addresses(self) -> list[tuple[int, int]]:
        return [(linear.weight.data_ptr(), linear.bias.data_ptr()) for linear in self._linears]

    def __call__(self, emb: Tensor, dtype: torch.dtype) -> Heard:
        """emb: [N, E]. The parts come in `dtype`, that of the blocks."""
        together = F.linear(F.silu(emb), self._weight, self._bias).to(dtype)
        return Heard(emb, together.split(self._sizes, dim=1))
