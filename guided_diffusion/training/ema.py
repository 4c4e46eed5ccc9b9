"""Exponential moving averages (EMA) of the weights, one full copy per decay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..runtime.world import World
from ..weights.power_ema import decay_at, gamma_of


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Move every target towards its source in place: `target <- rate * target + (1 - rate) * source`."""
    targets, sources = list(target_params), list(source_params)
    if targets:
        torch._foreach_lerp_(targets, sources, 1.0 - rate)


class EMA:
    """Averaged copies of a network's parameters; its buffers are not averaged.

    An average of decay 0.9999 spans about `1 / (1 - decay)` = 10,000 updates; one of `sigma_rels` has a width of that share of
    all updates so far (`weights.power_ema`). Each costs one float32 model of memory on every process. With `world` each copy is
    sharded: a rank keeps the averages of its share of the parameters, and they are gathered on rank 0 to be saved or drawn from.
    """

    def __init__(
        self, net: nn.Module, decays: Sequence[float], sigma_rels: Sequence[float] = (), *, world: World | None = None
    ) -> None:
        for decay in decays:
            if not 0.0 <= decay < 1.0:
                raise ValueError(f"the EMA decay {decay} is not in [0, 1); usual ones are 0.999 to 0.99995")
        if len(set(decays)) != len(decays):
            raise ValueError(f"an EMA decay is given twice: {list(decays)}")
        self._net = net
        self._world = World() if world is None else world
        self._params = [(name, p) for name, p in net.named_parameters()]
        self._owners = _owners_of([p.numel() for _, p in self._params], self._world.size)
        self._mine = [k for k, owner in enumerate(self._owners) if owner == self._world.rank]
        self._gammas = {f"rel{sigma_rel}": gamma_of(sigma_rel) for sigma_rel in sigma_rels}
        self.copies: dict[str, list[Tensor]] = {name: [] for name in (*map(str, decays), *self._gammas)}
        """This process's averages by name: of all parameters in order or, when sharded, of its share of them."""
        self.reset()

    @property
    def decays(self) -> tuple[str, ...]:
        """The decays as written in file names: `("0.9999",)`."""
        return tuple(name for name in self.copies if name not in self._gammas)

    @property
    def names(self) -> tuple[str, ...]:
        """All averages as written in file names: `("0.9999", "rel0.05")`."""
        return tuple(self.copies)

    def reset(self) -> None:
        """Let every average start again from the current weights."""
        for decay in self.copies:
            self.copies[decay] = [self._params[k][1].detach().clone() for k in self._mine]

    def update(self, step: int = 1) -> None:
        """One step of every average, after update `step`, counted from 1: averages of `sigma_rels` depend on it.

        Called once per training step, also when the optimizer step was skipped.
        """
        sources = [self._params[k][1].detach() for k in self._mine]
        for name, targets in self.copies.items():
            update_ema(targets, sources, decay_at(self._gammas[name], step) if name in self._gammas else float(name))

    def state_dict_of(self, decay: str) -> dict[str, Tensor]:
        """State dict of averaged parameters and the network's buffers, in the network's order; tensors are not copied.

        Sharded averages are gathered on the CPU of rank 0, and other ranks get an empty dict; all ranks must call it.
        """
        whole = self.copies[decay] if self._world.size == 1 else self._gathered(decay)
        if whole is None:
            return {}
        averaged = {name: copy for (name, _), copy in zip(self._params, whole)}
        return {key: averaged.get(key, value) for key, value in self._net.state_dict().items()}

    def load_state_dict_of(self, decay: str, state: Mapping[str, Tensor]) -> None:
        """Fill the average of `decay` from a network state dict."""
        missing = [name for name, _ in self._params if name not in state]
        if missing:
            raise ValueError(
                f"the averaged weights of decay {decay} lack {len(missing)} tensors, the first is {missing[0]!r}"
            )
        with torch.no_grad():
            for (name, _), copy in zip([self._params[k] for k in self._mine], self.copies[decay]):
                if copy.shape != state[name].shape:
                    raise ValueError(
                        f"averaged weight {name!r} has shape {tuple(state[name].shape)}, the network {tuple(copy.shape)}"
                    )
                copy.copy_(state[name])

    @contextlib.contextmanager
    def swapped_in(self, decay: str) -> Iterator[nn.Module]:
        """The network with its averaged weights inside the `with` block, e.g. to draw samples; swapped, not copied.

        Of sharded averages only rank 0 gets the averaged network; all ranks must call it.
        """
        if decay not in self.copies:
            raise ValueError(f"there is no average of decay {decay!r}; kept ones are {list(self.copies)}")
        copies = self.copies[decay]
        if self._world.size > 1:
            copies = [c.to(p.device) for c, (_, p) in zip(self._gathered(decay) or [], self._params)]
        self._exchange(copies)
        try:
            yield self._net
        finally:
            self._exchange(copies)

    def _gathered(self, decay: str) -> list[Tensor] | None:
        """All averages on rank 0's CPU, None elsewhere. One parameter at a time, so the device never holds them all."""
        share = dict(zip(self._mine, self.copies[decay]))
        whole = []
        for k, (_, p) in enumerate(self._params):
            copy = share[k] if k in share else torch.empty_like(p)
            if self._owners[k] != 0:
                self._world.broadcast_(copy, src=self._owners[k], name=f"averages of decay {decay}")
            if self._world.is_main:
                whole.append(copy.cpu())
        return whole if self._world.is_main else None

    def _exchange(self, copies: list[Tensor]) -> None:
        if not copies:
            return
        for k, (_, p) in enumerate(self._params):
            p.data, copies[k] = copies[k], p.data


def _owners_of(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that keeps each parameter: the largest first, each to the rank with the fewest numbers so far."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        owners[k] = loads.index(min(loads))
        loads[owners[k]] += sizes[k]
    return owners
