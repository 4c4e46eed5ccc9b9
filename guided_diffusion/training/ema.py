"""Exponential moving averages of the weights, one full copy per rate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Move every target towards its source in place: `target <- rate * target + (1 - rate) * source`."""
    targets, sources = list(target_params), list(source_params)
    if targets:
        torch._foreach_lerp_(targets, sources, 1.0 - rate)


class Averages:
    """Averaged copies of a network's parameters; buffers, which are not learned, are copied as they are.

    `rates` are the shares kept per update, e.g. 0.9999; an average remembers about `1 / (1 - rate)` updates. Each copy
    costs one float32 model of memory on every process (the copies are not sharded).
    """

    def __init__(self, net: nn.Module, rates: Sequence[float]) -> None:
        for rate in rates:
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"the EMA rate {rate} is not in [0, 1); usual ones are 0.999 to 0.99995")
        if len(set(rates)) != len(rates):
            raise ValueError(f"an EMA rate is given twice: {list(rates)}")
        self._net = net
        self._params = [(name, p) for name, p in net.named_parameters()]
        self.copies: dict[str, list[Tensor]] = {str(rate): [] for rate in rates}
        self.reset()

    @property
    def rates(self) -> tuple[str, ...]:
        """The rates as written in file names: `("0.9999",)`."""
        return tuple(self.copies)

    def reset(self) -> None:
        """Let every average start again from the present weights."""
        for rate in self.copies:
            self.copies[rate] = [p.detach().clone() for _, p in self._params]

    def update(self) -> None:
        """One step of every average. Called once per training step, also when the weights did not move."""
        sources = [p.detach() for _, p in self._params]
        for rate, targets in self.copies.items():
            update_ema(targets, sources, float(rate))

    def state_dict_of(self, rate: str) -> dict[str, Tensor]:
        """The averaged network as a state dict in the network's own key order; tensors are not copied."""
        averaged = {name: copy for (name, _), copy in zip(self._params, self.copies[rate])}
        return {key: averaged.get(key, value) for key, value in self._net.state_dict().items()}

    def load_state_dict_of(self, rate: str, state: Mapping[str, Tensor]) -> None:
        """Fill the average of `rate` from a network state dict."""
        missing = [name for name, _ in self._params if name not in state]
        if missing:
            raise ValueError(
                f"the averaged weights of rate {rate} lack {len(missing)} tensors, the first is {missing[0]!r}"
            )
        with torch.no_grad():
            for (name, _), copy in zip(self._params, self.copies[rate]):
                if copy.shape != state[name].shape:
                    raise ValueError(
                        f"averaged weight {name!r} has shape {tuple(state[name].shape)}, the network {tuple(copy.shape)}"
                    )
                copy.copy_(state[name])

    @contextlib.contextmanager
    def swapped_in(self, rate: str) -> Iterator[nn.Module]:
        """The network with its averaged weights inside the `with` block, e.g. to draw samples; exchanged without copying."""
        if rate not in self.copies:
            raise ValueError(f"there is no average of rate {rate!r}; kept ones are {list(self.copies)}")
        self._exchange(rate)
        try:
            yield self._net
        finally:
            self._exchange(rate)

    def _exchange(self, rate: str) -> None:
        copies = self.copies[rate]
        for k, (_, p) in enumerate(self._params):
            p.data, copies[k] = copies[k], p.data
