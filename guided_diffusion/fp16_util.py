"""Door: the 2021 helpers for float16 training with flat float32 master copies. The package itself trains without them.

Kept because programs call `MixedPrecisionTrainer` and the helpers directly. Scale and constants are those of `training.precision`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
import torch.nn as nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # noqa: F401  2021 names of this module

from . import logger
from .models.layers import convert_module_to_f16, convert_module_to_f32  # noqa: F401  2021 names of this module
from .training.optimizer import total_norm as _total_norm
from .training.precision import INITIAL_LOG_LOSS_SCALE

_Named = list[tuple[str, nn.Parameter]]
_Group = tuple[_Named, tuple[int, ...]]


def make_master_params(param_groups_and_shapes: Sequence[_Group]) -> list[nn.Parameter]:
    """One flat float32 parameter per group, in the group's shape."""
    return [nn.Parameter(_flat(p.detach() for _, p in group).view(shape)) for group, shape in param_groups_and_shapes]


def model_grads_to_master_grads(
    param_groups_and_shapes: Sequence[_Group], master_params: Sequence[nn.Parameter]
) -> None:
    """Give each master parameter the gradients of its group."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes):
        master.grad = _flat(param_grad_or_zeros(p) for _, p in group).view(shape)


def master_params_to_model_params(
    param_groups_and_shapes: Sequence[_Group], master_params: Iterable[nn.Parameter]
) -> None:
    """Copy the master weights into the model, in the model's formats."""
    for master, (group, _) in zip(list(master_params), param_groups_and_shapes):
        for (_, p), piece in zip(group, unflatten_master_params(group, master.view(-1))):
            p.detach().copy_(piece)


def unflatten_master_params(param_group: _Named, master_param: th.Tensor) -> tuple[th.Tensor, ...]:
    """A flat master parameter as views in the shapes of its group."""
    pieces = master_param.detach().reshape(-1).split([p.numel() for _, p in param_group])
    return tuple(piece.view(p.shape) for piece, (_, p) in zip(pieces, param_group))


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, nn.Parameter]]) -> list[_Group]:
    """Two groups: parameters of at most one dimension, flat in shape (-1), and the others, in shape (1, -1)."""
    named = list(named_model_params)
    return [([n for n in named if n[1].ndim <= 1], (-1,)), ([n for n in named if n[1].ndim > 1], (1, -1))]


def master_params_to_state_dict(
    model: nn.Module, param_groups_and_shapes: Sequence[_Group] | None, master_params: Any, use_fp16: bool
) -> dict[str, th.Tensor]:
    """The model's state dict with the float32 master weights in place of its own."""
    state = model.state_dict()
    if use_fp16:
        assert param_groups_and_shapes is not None
        for master, (group, _) in zip(master_params, param_groups_and_shapes):
            state.update(zip((name for name, _ in group), unflatten_master_params(group, master.view(-1))))
    else:
        state.update(zip((name for name, _ in model.named_parameters()), master_params))
    return state


def state_dict_to_master_params(model: nn.Module, state_dict: Mapping[str, th.Tensor], use_fp16: bool) -> list[Any]:
    """Master weights from a state dict."""
    if not use_fp16:
        return [state_dict[name] for name, _ in model.named_parameters()]
    named: Any = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    return make_master_params(get_param_groups_and_shapes(named))


def zero_master_grads(master_params: Iterable[nn.Parameter]) -> None:
    """Forget the gradients of master parameters."""
    for p in master_params:
        p.grad = None


def zero_grad(model_params: Iterable[nn.Parameter]) -> None:
    """Set gradients to zero and keep their memory."""
    for p in model_params:
        if p.grad is not None:
            # Gradients may be views of communication buckets, which detach_ refuses.
            if p.grad.grad_fn is not None:
                p.grad.detach_()
            p.grad.requires_grad_(False).zero_()


def param_grad_or_zeros(param: nn.Parameter) -> th.Tensor:
    """The gradient, or zeros where there is none."""
    return th.zeros_like(param) if param.grad is None else param.grad.detach()


def check_overflow(value: float) -> bool:
    """Whether a number is infinite or not a number."""
    return bool(not np.isfinite(value))


def _flat(tensors: Iterable[th.Tensor]) -> th.Tensor:
    pieces = [t.reshape(-1).float() for t in tensors]
    return th.cat(pieces) if pieces else th.zeros(0)


class MixedPrecisionTrainer:
    """Backward and optimizer step in float32, or in float16 with master weights and a loss scale (`lg_loss_scale`, log2)."""

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ) -> None:
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes: list[_Group] | None = None
        self.lg_loss_scale = initial_lg_loss_scale
        if use_fp16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)
            model.convert_to_fp16()  # type: ignore[operator]

    def zero_grad(self) -> None:
        """Zero the model's gradients."""
        zero_grad(self.model_params)

    def backward(self, loss: th.Tensor) -> None:
        """`loss.backward()`, scaled in float16."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: th.optim.Optimizer) -> bool:
        """Step `opt`, which holds `master_params`; False if a float16 overflow made it skip and halve the scale."""
        return self._optimize_fp16(opt) if self.use_fp16 else self._optimize_normal(opt)

    def _optimize_fp16(self, opt: th.optim.Optimizer) -> bool:
        assert self.param_groups_and_shapes is not None
        logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
        grad_norm, param_norm = self._compute_norms(grad_scale=2**self.lg_loss_scale)
        if check_overflow(grad_norm):
            # 2021 had no lower end and could fall for ever.
            self.lg_loss_scale = max(self.lg_loss_scale - 1, 0.0)
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
            zero_master_grads(self.master_params)
            return False
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)
        for p in self.master_params:
            assert p.grad is not None
            p.grad.mul_(2.0**-self.lg_loss_scale)
        opt.step()
        zero_master_grads(self.master_params)
        master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
        self.lg_loss_scale += self.fp16_scale_growth
        return True

    def _optimize_normal(self, opt: th.optim.Optimizer) -> bool:
        grad_norm, param_norm = self._compute_norms()
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)
        opt.step()
        return True

    def _compute_norms(self, grad_scale: float = 1.0) -> tuple[float, float]:
        """2-norms of all gradients, divided by `grad_scale`, and of all master weights; read in one go."""
        params = [p.detach() for p in self.master_params]
        grads = [p.grad for p in self.master_params if p.grad is not None]
        norms = [_total_norm(some) if some else th.zeros(()) for some in (grads, params)]
        grad_norm, param_norm = th.stack([n.to(norms[1].device) for n in norms]).tolist()
        return grad_norm / grad_scale, param_norm

    def master_params_to_state_dict(self, master_params: Any) -> dict[str, th.Tensor]:
        """The state dict of the model with these master weights."""
        return master_params_to_state_dict(self.model, self.param_groups_and_shapes, master_params, self.use_fp16)

    def state_dict_to_master_params(self, state_dict: Mapping[str, th.Tensor]) -> list[Any]:
        """Master weights from a state dict of the model."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)
