"""Exponential moving averages of the weights, one full copy per rate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..runtime.world import World


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Move every target towards its source in place: `target <- rate * target + (1 - rate) * source`."""
    targets, sources = list(target_params), list(source_params)
    if targets:
        torch._foreach_lerp_(targets, sources, 1.0 - rate)


class Averages:
    """Averaged copies of a network's parameters; buffers, which are not learned, are copied as they are.

    `rates` are the shares kept per update, e.g. 0.9999; an average remembers about `1 / (1 - rate)` updates. Each copy
    costs one float32 model of memory on every process; or, divided, one over all processes of `world`: each keeps the averages
    of its share of the parameters, and they are put together on the main process to be saved or looked at.
    """

    def __init__(self, net: nn.Module, rates: Sequence[float], *, world: World | None = None) -> None:
        for rate in rates:
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"the EMA rate {rate} is not in [0, 1); usual ones are 0.999 to 0.99995")
        if len(set(rates)) != len(rates):
            raise ValueError(f"an EMA rate is given twice: {list(rates)}")
        self._net = net
        self._world = World() if world is None else world
        self._params = [(name, p) for name, p in net.named_parameters()]
        self._owners = _shares([p.numel() for _, p in self._params], self._world.size)
        self._mine = [k for k, owner in enumerate(self._owners) if owner == self._world.rank]
        self.copies: dict[str, list[Tensor]] = {str(rate): [] for rate in rates}
        """This process's averages by rate: of all parameters in order, or of its share of them."""
        self.reset()

    @property
    def rates(self) -> tuple[str, ...]:
        """The rates as written in file names: `("0.9999",)`."""
        return tuple(self.copies)

    def reset(self) -> None:
        """Let every average start again from the present weights."""
        for rate in self.copies:
            self.copies[rate] = [self._params[k][1].detach().clone() for k in self._mine]

    def update(self) -> None:
        """One step of every average. Called once per training step, also when the weights did not move."""
        sources = [self._params[k][1].detach() for k in self._mine]
        for rate, targets in self.copies.items():
            update_ema(targets, sources, float(rate))

    def state_dict_of(self, rate: str) -> dict[str, Tensor]:
        """The averaged network as a state dict in the network's own key order; tensors are not copied.

        Of divided averages: put together in main memory, and only on the main process (the others get an empty dict). All call it.
        """
        whole = self.copies[rate] if self._world.size == 1 else self._gathered(rate)
        if whole is None:
            return {}
        averaged = {name: copy for (name, _), copy in zip(self._params, whole)}
        return {key: averaged.get(key, value) for key, value in self._net.state_dict().items()}

    def load_state_dict_of(self, rate: str, state: Mapping[str, Tensor]) -> None:
        """Fill the average of `rate` from a network state dict."""
        missing = [name for name, _ in self._params if name not in state]
        if missing:
            raise ValueError(
                f"the averaged weights of rate {rate} lack {len(missing)} tensors, the first is {missing[0]!r}"
            )
        with torch.no_grad():
            for (name, _), copy in zip([self._params[k] for k in self._mine], self.copies[rate]):
                if copy.shape != state[name].shape:
                    raise ValueError(
                        f"averaged weight {name!r} has shape {tuple(state[name].shape)}, the network {tuple(copy.shape)}"
                    )
                copy.copy_(state[name])

    @contextlib.contextmanager
    def swapped_in(self, rate: str) -> Iterator[nn.Module]:
        """The network with its averaged weights inside the `with` block, e.g. to draw samples; exchanged without copying.

        Of divided averages only the main process gets the averaged network, and all must call it.
        """
        if rate not in self.copies:
            raise ValueError(f"there is no average of rate {rate!r}; kept ones are {list(self.copies)}")
        copies = self.copies[rate]
        if self._world.size > 1:
            copies = [c.to(p.device) for c, (_, p) in zip(self._gathered(rate) or [], self._params)]
        self._exchange(copies)
        try:
            yield self._net
        finally:
            self._exchange(copies)

    def _gathered(self, rate: str) -> list[Tensor] | None:
        """All averages in main memory on the main process, None elsewhere; one message after the other, so little memory is used."""
        own = dict(zip(self._mine, self.copies[rate]))
        whole = []
        for k, (_, p) in enumerate(self._params):
            copy = own[k] if k in own else torch.empty_like(p)
            if self._owners[k] != 0:
                self._world.broadcast_([copy], src=self._owners[k], name=f"averages of rate {rate}")
            if self._world.is_main:
                whole.append(copy.cpu())
        return whole if self._world.is_main else None

    def _exchange(self, copies: list[Tensor]) -> None:
        if not copies:
            return
        for k, (_, p) in enumerate(self._params):
            p.data, copies[k] = copies[k], p.data


def _shares(sizes: Sequence[int], parts: int) -> list[int]:
    """Which part each item belongs to: the largest items first, each to the part that is lightest then."""
    loads, owners = [0] * parts, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        owners[k] = loads.index(min(loads))
        loads[owners[k]] += sizes[k]
    return owners
