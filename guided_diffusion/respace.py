"""Door: the 2021 respacing names. Which steps to keep, and what the network is told, is `diffusion.process`'s business."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from .gaussian_diffusion import GaussianDiffusion, _rooms

if TYPE_CHECKING:
    from .diffusion.process import Process


def space_timesteps(num_timesteps: int, section_counts: str | int | Iterable[int]) -> set[int]:
    """The steps to keep of `num_timesteps`, as a set; `section_counts` as in `diffusion.process.space_timesteps`."""
    return set(_rooms.process.space_timesteps(num_timesteps, section_counts))


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over the steps `use_timesteps` of the one with `betas`; the model is told the original steps."""

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        betas = _rooms.process.check_betas(kwargs["betas"])
        self.use_timesteps = {int(step) for step in use_timesteps}
        self.original_num_steps = len(betas)
        self.timestep_map = sorted(step for step in self.use_timesteps if 0 <= step < len(betas))
        kwargs["betas"] = _rooms.process.respaced_betas(betas, self.timestep_map)
        super().__init__(**kwargs)

    def p_mean_variance(self, model: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Callable, *args: Any, **kwargs: Any) -> dict[str, th.Tensor]:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Callable, *args: Any, **kwargs: Any) -> th.Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model: Callable) -> _WrappedModel:
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t: th.Tensor) -> th.Tensor:
        return t  # the wrapped model does it, after mapping


class _WrappedModel:
    """A model that is called with positions among the kept steps and hears original steps (times 1000/T where rescaled)."""

    def __init__(
        self, model: Callable, timestep_map: Sequence[int], rescale_timesteps: bool, original_num_steps: int
    ) -> None:
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x: th.Tensor, ts: th.Tensor, **kwargs: Any) -> Any:
        steps = th.as_tensor(np.asarray(self.timestep_map), dtype=ts.dtype, device=ts.device)[ts]
        if self.rescale_timesteps:
            steps = _rooms.process.rescaled(steps.float(), self.original_num_steps)
        return self.model(x, steps, **kwargs)


class _Door(ModuleType):
    """`guided_diffusion.respace` is this module and, called, the function of the same name that acts on a Process."""

    def __call__(self, process: Process, keep: Iterable[int]) -> Process:
        return _rooms.process.respace(process, keep)


sys.modules[__name__].__class__ = _Door
