"""Random numbers that belong to an example, not to a batch or a process.

Every training example and every sampled image has a stream of its own, addressed by integers (seed, purpose, step, position). Whoever
computes it, in whatever batch, on however many processes, draws the same numbers. So image 4711 is the same image on 1 or 64 GPUs, and
a run that continues needs no saved generator state: the address is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Purposes: the second part of an address, so that streams for different purposes are independent.
TRAIN, SAMPLE, LABELS, DATA, EVALUATE = range(1, 6)

_MASK = (1 << 64) - 1


def key_of(*parts: int) -> int:
    """Mix integers into one 63-bit seed; any change of any part changes about half of the bits (SplitMix64, Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class Streams:
    """One generator per example of a batch; example `k` is addressed by `(*address, ids[k])`.

    Each draw advances every stream by the same amount, so two batches that share an example agree on it as long as they make the
    same sequence of draws.
    """

    def __init__(self, *address: int, ids: Iterable[int] | Tensor, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        numbers: Sequence[int] = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        prefix = key_of(*address)
        self._keys = [key_of(prefix, number) for number in numbers]
        self._generators = [torch.Generator(self.device).manual_seed(key) for key in self._keys]

    @classmethod
    def of(cls, addresses: Iterable[Sequence[int]], device: torch.device | str = "cpu") -> Streams:
        """One stream per whole address, such as (seed, SAMPLE, image): the batch's examples need not share a seed.

        The address `(*address, i)` is that of example `i` in `Streams(*address, ids=...)`.
        """
        streams = cls(ids=(), device=device)
        for address in addresses:
            one = cls(*address[:-1], ids=address[-1:], device=device)
            streams._keys += one._keys
            streams._generators += one._generators
        return streams

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, `[len(self), *shape]`."""
        out = torch.empty((len(self), *shape), dtype=dtype, device=self.device)
        for row, generator in zip(out, self._generators):
            row.normal_(generator=generator)
        return out

    def uniform(self) -> Tensor:
        """One number in [0, 1) per example, float64 `[len(self)]`."""
        out = torch.empty(len(self), dtype=torch.float64, device=self.device)
        for k, generator in enumerate(self._generators):
            out[k].uniform_(generator=generator)
        return out

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers of `x`'s shape and dtype; row `k` comes from stream `k`."""
        self._check(x)
        return self.normal(x.shape[1:], x.dtype)

    def noise(self, like: Tensor, step: int, draw: int = 0) -> Tensor:
        """As `randn_like`, but of the address (step, draw) in each stream, and without advancing it. A sampler's `noise=` argument."""
        self._check(like)
        # Not `empty_like`: in another memory layout, such as channels last, the same draws would come to other places.
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        generator = torch.Generator(self.device)
        for row, key in zip(out, self._keys):
            row.normal_(generator=generator.manual_seed(key_of(key, step, draw)))
        return out

    def _check(self, x: Tensor) -> None:
        if x.shape[0] != len(self):
            raise ValueError(
                f"a batch of {x.shape[0]} asked for noise from {len(self)} streams; make one stream per example"
            )
