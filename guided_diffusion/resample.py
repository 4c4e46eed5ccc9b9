"""Door: the 2021 schedule samplers, on `diffusion.timesteps`. Numbers come from NumPy's global state, as they did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist

from .diffusion import timesteps as _room
from .runtime.world import World as _World


def create_named_schedule_sampler(name: str, diffusion: Any) -> ScheduleSampler:
    """The sampler called "uniform" or "loss-second-moment" for a diffusion."""
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise NotImplementedError(f"unknown schedule sampler: {name}; known: uniform, loss-second-moment")


class ScheduleSampler(ABC):
    """A distribution over steps; subclasses say its weights."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weights `[T]`; they need not sum to one."""

    def sample(self, batch_size: int, device: th.device | str) -> tuple[th.Tensor, th.Tensor]:
        """Steps int64 `[batch_size]` and the float32 weights that make up for their uneven frequency."""
        w = np.asarray(self.weights(), dtype=np.float64)
        p = w / np.sum(w)
        indices = th.from_numpy(np.random.choice(len(p), size=(batch_size,), p=p)).long()
        return indices.to(device), _room.importance(th.from_numpy(p), indices).to(device)


class UniformSampler(ScheduleSampler):
    """Every step equally often. Takes a diffusion or its number of steps."""

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion
        self._weights = np.ones([getattr(diffusion, "num_timesteps", diffusion)])

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from losses and stays the same on every process."""

    def update_with_local_losses(self, local_ts: th.Tensor, local_losses: th.Tensor) -> None:
        """Learn from all processes' steps `[b]` and losses `[b]`; b may differ between processes. Call it on every one."""
        world = _World()
        if dist.is_available() and dist.is_initialized():
            world = _World(dist.get_rank(), dist.get_world_size(), device=local_losses.device)
        timesteps = world.all_gather_cat(local_ts, "steps of the loss-aware sampler")
        losses = world.all_gather_cat(local_losses.detach(), "losses of the loss-aware sampler")
        self.update_with_all_losses(timesteps.tolist(), losses.tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Learn from steps and losses; called with the same lists on every process."""


class LossSecondMomentResampler(LossAwareSampler):
    """Steps in proportion to the root mean square of their last losses; see `diffusion.timesteps.LossSecondMoment`.

    `_loss_history` `[T, history_per_term]`, the oldest first, and `_loss_counts` `[T]` are arrays that subclasses read and write.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term])
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self) -> np.ndarray:
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps], dtype=np.float64)
        losses = th.from_numpy(np.array(self._loss_history, np.float64))
        return _room.second_moment_probabilities(losses, th.tensor(True), self.uniform_prob).numpy()

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        for t, loss in zip(ts, losses):
            if self._loss_counts[t] < self.history_per_term:
                self._loss_counts[t] += 1
            else:  # the oldest goes to the end, where the new one takes its place
                self._loss_history[t] = np.roll(self._loss_history[t], -1)
            self._loss_history[t, self._loss_counts[t] - 1] = loss

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())
