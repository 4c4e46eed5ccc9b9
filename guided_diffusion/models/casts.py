"""Weights that layers cast to a lower precision where they use them: cast once for all uses of a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.layout import CHANNELS_LAST, may_be_transformed, recorded


class _Cast(NamedTuple):
    """A layer's weight and bias, if any, the precision in which it uses them, and copies in it: none until the next block."""

    given: tuple[Tensor, ...]
    dtype: torch.dtype
    copies: list[Tensor]


class WeightCopies:
    """Copies of a network's weights in the precision in which layers use them, valid inside `with copies.made()` only.

    A block notes what layers cast in it; the next one begins by copying all of that in one multi-tensor call. A weight that was
    exchanged or written to since then is cast at use. Fused optimizers and writes through `.data` leave no trace, so between
    the blocks, where they happen, every weight is cast at use.
    """

    def __init__(self) -> None:
        self._casts: dict[int, _Cast] = {}  # by id of the layer
        self._states: dict[int, list[tuple[int, int]]] = {}  # of its weight and bias when they were copied
        self._inside = False

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCopies:
        return WeightCopies()  # a copied or pickled network has other weights

    def __reduce__(self) -> tuple[type[WeightCopies], tuple[()]]:
        return WeightCopies, ()

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Copy the weights as they are now, and let layers use the copies inside the block."""
        casts = self._casts.values()
        for cast in casts:
            if [copy.device for copy in cast.copies] != [tensor.device for tensor in cast.given]:
                cast.copies[:] = [_empty_like(tensor, cast.dtype) for tensor in cast.given]
        if casts:
            with torch.no_grad():
                given = [tensor for cast in casts for tensor in cast.given]
                torch._foreach_copy_([copy for cast in casts for copy in cast.copies], given)
        self._states = {key: _states(cast.given) for key, cast in self._casts.items()}
        self._inside = True
        try:
            yield
        finally:
            self._inside, self._states = False, {}

    def of(self, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the layer in `dtype`, differentiable; None where they must be cast, as no valid copy is there."""
        # In this order: a compiled graph must not depend on the block.
        if recorded() or not self._inside or may_be_transformed():
            return None
        weight, bias = layer.weight, layer.bias
        given, cast = (weight,) if bias is None else (weight, bias), self._casts.get(id(layer))
        if cast is None or cast.dtype != dtype or [*map(id, cast.given)] != [*map(id, given)]:
            self._casts[id(layer)] = _Cast(given, dtype, [])
            self._states.pop(id(layer), None)
            return None
        if self._states.get(id(layer)) != _states(given):
            return None
        weight, *rest = _Copied.apply(*given, *cast.copies)
        return weight, rest[0] if rest else None


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convolutions of channels_last images want a channels_last weight."""
    return torch.empty_like(
        tensor, dtype=dtype, memory_format=CHANNELS_LAST.get(tensor.dim(), torch.preserve_format), requires_grad=False
    )


def _states(tensors: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    """What changes when a tensor's memory is exchanged or written to."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


class _Copied(torch.autograd.Function):
    """(parameters, copies) -> the copies. Gradients go to the parameters, in their precision, and contiguous if they are so."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, copies = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.set_materialize_grads(False)
        ctx.formats = [
            (t.dtype, torch.contiguous_format if t.is_contiguous() else torch.preserve_format) for t in given
        ]
        used = tuple(copy.detach() for copy in copies)
        ctx.mark_non_differentiable(*(copy for copy, needed in zip(used, ctx.needs_input_grad) if not needed))
        return used

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ours = [
            None if g is None else g.to(dtype, memory_format=memory_format)
            for g, (dtype, memory_format) in zip(gradients, ctx.formats)
        ]
        return (*ours, *[None] * len(ours))
