"""Schedule samplers: which step each training example is noised to, uniformly or more often where the loss is large."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Drawn(NamedTuple):
    """Steps int64 `[B]`, and float32 importance weights `[B]`: the expected weighted loss is that of uniform steps."""

    i: Tensor
    weight: Tensor


class Timesteps(Protocol):
    """A distribution over steps that may learn from losses. Losses that are not finite, of skipped steps, teach nothing."""

    def draw(self, u: Tensor) -> Drawn: ...
    def update(self, i: Tensor, losses: Tensor) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class UniformTimesteps:
    """Every step equally often."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def draw(self, u: Tensor) -> Drawn:
        """Steps from uniform random numbers `u` `[B]` in [0, 1)."""
        i = (u * self.num_steps).long().clamp(max=self.num_steps - 1)
        return Drawn(i, torch.ones(len(u), device=u.device))

    def update(self, i: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LossSecondMoment:
    """Steps in proportion to the root mean square of their last `history` losses (Nichol & Dhariwal 2021, section 3.3).

    Uniform until every step has been seen `history` times; afterwards a share `uniform_prob` stays uniform. With several processes,
    gather steps and losses before `update`, so that all have the same state. It moves to the device of the arguments.
    """

    def __init__(self, num_steps: int, history: int = 10, uniform_prob: float = 0.001) -> None:
        if history < 1 or not 0 <= uniform_prob <= 1:
            raise ValueError(f"history={history} must be at least 1 and uniform_prob={uniform_prob} between 0 and 1")
        self.num_steps, self.history, self.uniform_prob = num_steps, history, uniform_prob
        self.losses = torch.zeros(num_steps, history, dtype=torch.float64)
        self.seen = torch.zeros(num_steps, dtype=torch.int64)

    def warm(self) -> Tensor:
        """Has every step been seen often enough? A boolean scalar tensor."""
        return (self.seen >= self.history).all()

    def probabilities(self) -> Tensor:
        """The probability of each step, float64 `[T]`."""
        return second_moment_probabilities(self.losses, self.warm(), self.uniform_prob)

    def draw(self, u: Tensor) -> Drawn:
        """Steps from uniform random numbers `u` `[B]` in [0, 1), by the inverse of the cumulative distribution."""
        self._move_to(u.device)
        p = self.probabilities()
        i = torch.searchsorted(p.cumsum(0), u.to(p.dtype), right=True).clamp(max=self.num_steps - 1)
        return Drawn(i, importance(p, i))

    def update(self, i: Tensor, losses: Tensor) -> None:
        """Store the finite of `losses` `[B]` of steps `i` int64 `[B]`, in order, over the oldest ones: a ring buffer per step."""
        self._move_to(i.device)  # below: a step may occur several times in a batch, and each time takes another slot
        finite = torch.isfinite(losses)
        same = ((i[:, None] == i[None, :]) & finite & finite[:, None]).tril()
        earlier = same.sum(dim=1) - 1  # occurrences of the same step before this one
        later = same.sum(dim=0) - 1  # and after it; from `history` on they overwrite it
        slot = (self.seen[i] + earlier) % self.history
        flat = torch.where(finite & (later < self.history), i * self.history + slot, self.losses.numel())
        padded = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])  # the last entry takes those not stored
        self.losses = padded.scatter(0, flat, losses.detach().to(padded))[:-1].view_as(self.losses)
        self.seen = self.seen.scatter_add(0, i, finite.to(i.dtype))

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of an earlier run with the same number of steps and history."""
        losses, seen = (torch.as_tensor(state[name]) for name in ("losses", "seen"))
        if losses.shape != self.losses.shape or seen.shape != self.seen.shape:
            raise ValueError(
                f"the saved losses are for (steps, history) = {tuple(losses.shape)}, this run has {tuple(self.losses.shape)}"
            )
        self.losses, self.seen = losses.to(self.losses).clone(), seen.to(self.seen).clone()

    def _move_to(self, device: torch.device) -> None:
        if self.losses.device != device:
            self.losses, self.seen = self.losses.to(device), self.seen.to(device)


def importance(probabilities: Tensor, i: Tensor) -> Tensor:
    """Importance weights 1 / (T p_i), float32, of losses at steps `i` that were drawn with `probabilities` `[T]`."""
    return (1.0 / (len(probabilities) * probabilities[i])).float()


def second_moment_probabilities(losses: Tensor, warm: Tensor, uniform_prob: float) -> Tensor:
    """Probabilities `[T]` from the last losses `[T, history]`; uniform unless `warm`."""
    num_steps = losses.shape[0]
    moment = losses.square().mean(dim=1).sqrt()
    learned = (1 - uniform_prob) * moment / moment.sum() + uniform_prob / num_steps
    return torch.where(warm, learned, torch.full_like(learned, 1 / num_steps))
