"""Door: the 2021 diffusion class, on the rooms of `diffusion`.

A template-method class: every method calls the others through `self` where 2021 did, and with the same arguments; `mean_flat`, `normal_kl`
and the other functions of this module are looked up in it at each call. So subclasses may override any method, and programs replace any
function. The schedule is read from the NumPy attributes as they are at that moment, and noise is drawn in the recorded order: old seeds
give old samples. Formulas are those of `diffusion`.
"""

from __future__ import annotations

import enum
import functools
import math  # noqa: F401  star imports of this module rely on it
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th

from . import diffusion as _rooms
from .diffusion.densities import discretized_gaussian_log_likelihood, mean_flat, normal_kl

Output = dict[str, Any]


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas that follow `alpha_bar`; see `diffusion.schedules`."""
    return _rooms.schedules.betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta)


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Betas of the schedule called so, float64 `[num_diffusion_timesteps]`."""
    if schedule_name not in _rooms.schedules.SCHEDULES:
        raise NotImplementedError(f"unknown beta schedule: {schedule_name}")
    return _rooms.schedules.named_betas(schedule_name, num_diffusion_timesteps)


class ModelMeanType(enum.Enum):
    """What the model's output stands for."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of a step comes from."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


# Enumerations are compared by name: a vendored copy's members, or those unpickled from an old file, mean the same.
_VARIANCE: dict[str, Any] = {name: name.lower() for name in ModelVarType.__members__}
_LOSS: dict[str, Any] = {name: name.lower() for name in LossType.__members__}

_ATTRIBUTES = {
    "betas": "beta",
    "alphas_cumprod": "alpha_bar",
    "alphas_cumprod_prev": "alpha_bar_prev",
    "alphas_cumprod_next": "alpha_bar_next",
    "sqrt_alphas_cumprod": "sqrt_alpha_bar",
    "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alpha_bar",
    "log_one_minus_alphas_cumprod": "log_one_minus_alpha_bar",
    "sqrt_recip_alphas_cumprod": "sqrt_recip_alpha_bar",
    "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_alpha_bar",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_x0",
    "posterior_mean_coef2": "posterior_mean_x",
}
_ATTRIBUTE_OF = {table: attribute for attribute, table in _ATTRIBUTES.items()}


class _Tables:
    """A diffusion's attributes, as they are now, in the words of the mathematics (`diffusion.process.Tables`)."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion

    def at(self, name: str, i: th.Tensor, like: th.Tensor) -> th.Tensor:
        if name in _ATTRIBUTE_OF:
            table = getattr(self.diffusion, _ATTRIBUTE_OF[name])
        else:
            table = _rooms.process.tables_of(np.asarray(self.diffusion.betas))[name]
        return _extract_into_tensor(table, i, like.shape)


def _contiguous(method: Callable) -> Callable:
    """What `method` returns, its tensors contiguous: programs flatten them with `view`. Broadcast ones (stride 0) stay, as in 2021."""

    def plain(value: Any) -> Any:
        if isinstance(value, th.Tensor):
            return value if 0 in value.stride() else value.contiguous()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return tuple(plain(item) for item in value) if isinstance(value, tuple) else value

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return plain(method(*args, **kwargs))

    return called


class GaussianDiffusion:
    """A diffusion process with the reading of a model's output: training losses, samplers, likelihood.

    Every `model` is a callable `(x [N, C, ...], t [N], **model_kwargs)`; `t` in arguments counts this diffusion's own steps.
    """

    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        tables = _rooms.process.tables_of(_rooms.process.check_betas(betas))
        for attribute, table in _ATTRIBUTES.items():
            setattr(self, attribute, tables[table])
        self.num_timesteps = len(tables["beta"])

    # Set in a loop above; declared for readers and type checkers.
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    alphas_cumprod_next: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    log_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    # --- the process ---

    @_contiguous
    def q_mean_variance(self, x_start: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        mean, variance, log_variance = _rooms.process.marginal(_Tables(self), x_start, t)
        return mean, variance.expand(x_start.shape), log_variance.expand(x_start.shape)

    @_contiguous
    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        return _rooms.process.add_noise(_Tables(self), x_start, t, th.randn_like(x_start) if noise is None else noise)

    @_contiguous
    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        mean, variance, log_variance = _rooms.process.posterior(_Tables(self), x_start, x_t, t)
        return mean, variance.expand(x_t.shape), log_variance.expand(x_t.shape)

    @_contiguous
    def _predict_xstart_from_eps(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        return _rooms.process.x0_from_eps(_Tables(self), x_t, t, eps)

    @_contiguous
    def _predict_xstart_from_xprev(self, x_t: th.Tensor, t: th.Tensor, xprev: th.Tensor) -> th.Tensor:
        return _rooms.process.x0_from_previous_x(_Tables(self), x_t, t, xprev)

    @_contiguous
    def _predict_eps_from_xstart(self, x_t: th.Tensor, t: th.Tensor, pred_xstart: th.Tensor) -> th.Tensor:
        return _rooms.process.eps_from_x0(_Tables(self), x_t, t, pred_xstart)

    def _scale_timesteps(self, t: th.Tensor) -> th.Tensor:
        return _rooms.process.rescaled(t.float(), self.num_timesteps) if self.rescale_timesteps else t

    # --- reading a model ---

    @_contiguous
    def p_mean_variance(
        self,
        model: Callable,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
    ) -> Output:
        """Keys mean, variance, log_variance, pred_xstart, each of x's shape."""
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        variance_type, predicts = _VARIANCE[self.model_var_type.name], self.model_mean_type.name
        prediction, raw = _rooms.denoiser.split_variance(output, x, variance_type)
        if predicts == "EPSILON":
            xstart = self._predict_xstart_from_eps(x_t=x, t=t, eps=prediction)
        elif predicts == "PREVIOUS_X":
            xstart = self._predict_xstart_from_xprev(x_t=x, t=t, xprev=prediction)
        else:
            xstart = prediction
        xstart = _rooms.denoiser.bounded(xstart, clip_denoised, denoised_fn)
        mean = prediction
        if predicts != "PREVIOUS_X":
            mean, _, _ = self.q_posterior_mean_variance(x_start=xstart, x_t=x, t=t)
        variance, log_variance = (
            value.expand(x.shape) for value in _rooms.denoiser.step_spread(_Tables(self), raw, x, t, variance_type)
        )
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": xstart}

    # --- guidance ---

    @_contiguous
    def condition_mean(
        self, cond_fn: Callable, p_mean_var: Output, x: th.Tensor, t: th.Tensor, model_kwargs: dict | None = None
    ) -> th.Tensor:
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + _rooms.guidance.mean_shift(p_mean_var["variance"], gradient)

    @_contiguous
    def condition_score(
        self, cond_fn: Callable, p_mean_var: Output, x: th.Tensor, t: th.Tensor, model_kwargs: dict | None = None
    ) -> Output:
        return self._score_moved(p_mean_var, x, t, cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {})))

    @_contiguous
    def condition_mean_with_grad(
        self, cond_fn: Callable, p_mean_var: Output, x: th.Tensor, t: th.Tensor, model_kwargs: dict | None = None
    ) -> th.Tensor:
        """As `condition_mean`, for `cond_fn(x, t, p_mean_var, **kwargs)` that differentiates the prediction; t counts own steps."""
        gradient = cond_fn(x, t, p_mean_var, **(model_kwargs or {}))
        return p_mean_var["mean"].float() + _rooms.guidance.mean_shift(p_mean_var["variance"], gradient)

    @_contiguous
    def condition_score_with_grad(
        self, cond_fn: Callable, p_mean_var: Output, x: th.Tensor, t: th.Tensor, model_kwargs: dict | None = None
    ) -> Output:
        """As `condition_score`, for `cond_fn(x, t, p_mean_var, **kwargs)`; t counts own steps."""
        return self._score_moved(p_mean_var, x, t, cond_fn(x, t, p_mean_var, **(model_kwargs or {})))

    def _score_moved(self, p_mean_var: Output, x: th.Tensor, t: th.Tensor, gradient: th.Tensor) -> Output:
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        xstart = self._predict_xstart_from_eps(
            x, t, _rooms.guidance.score_shifted_eps(_Tables(self), eps, x, t, gradient)
        )
        mean, _, _ = self.q_posterior_mean_variance(x_start=xstart, x_t=x, t=t)
        return {**p_mean_var, "pred_xstart": xstart, "mean": mean}

    # --- one step of sampling ---

    @_contiguous
    def p_sample(
        self,
        model: Callable,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
    ) -> Output:
        """An ancestral step from t to t - 1: keys sample, pred_xstart."""
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = th.randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = _rooms.updates.ancestral_update(out["mean"], out["log_variance"], noise * _later_than_0(t, x))
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    @_contiguous
    def p_sample_with_grad(
        self,
        model: Callable,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
    ) -> Output:
        """As `p_sample`; `cond_fn(x, t, out, **kwargs)` gets a prediction attached to x."""
        with th.enable_grad():
            x = x.detach().requires_grad_()
            out = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            noise = th.randn_like(x)
            if cond_fn is not None:
                out["mean"] = self.condition_mean_with_grad(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = _rooms.updates.ancestral_update(out["mean"], out["log_variance"], noise * _later_than_0(t, x))
        return {"sample": sample, "pred_xstart": out["pred_xstart"].detach()}

    @_contiguous
    def ddim_sample(
        self,
        model: Callable,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
    ) -> Output:
        """A DDIM step from t to t - 1: keys sample, pred_xstart."""
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        return {"sample": self._ddim_step(x, t, out["pred_xstart"], eta), "pred_xstart": out["pred_xstart"]}

    @_contiguous
    def ddim_sample_with_grad(
        self,
        model: Callable,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
    ) -> Output:
        """As `ddim_sample`, with `cond_fn(x, t, out, **kwargs)`; pred_xstart is the unguided one."""
        with th.enable_grad():
            x = x.detach().requires_grad_()
            plain = out = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            if cond_fn is not None:
                out = self.condition_score_with_grad(cond_fn, plain, x, t, model_kwargs=model_kwargs)
        sample = self._ddim_step(x.detach(), t, out["pred_xstart"].detach(), eta)
        return {"sample": sample, "pred_xstart": plain["pred_xstart"].detach()}

    def _ddim_step(self, x: th.Tensor, t: th.Tensor, xstart: th.Tensor, eta: float) -> th.Tensor:
        eps = self._predict_eps_from_xstart(x, t, xstart)
        alpha_bar, alpha_bar_prev = (_Tables(self).at(name, t, x) for name in ("alpha_bar", "alpha_bar_prev"))
        sigma = _rooms.updates.ddim_sigma(alpha_bar, alpha_bar_prev, eta)
        noise = th.randn_like(x)  # drawn even where sigma is zero: it belongs to the recorded order
        return _rooms.updates.ddim_update(xstart, eps, alpha_bar_prev, sigma) + _later_than_0(t, x) * sigma * noise

    @_contiguous
    def ddim_reverse_sample(
        self,
        model: Callable,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
    ) -> Output:
        """A deterministic step from t to t + 1: keys sample, pred_xstart."""
        if eta != 0.0:
            raise ValueError(f"eta={eta}: only the deterministic path (eta 0) can be walked backwards")
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        eps = _rooms.process.eps_from_x0(_Tables(self), x, t, out["pred_xstart"])  # not through `self`: nor in 2021
        sample = _rooms.updates.ddim_update(out["pred_xstart"], eps, _Tables(self).at("alpha_bar_next", t, x))
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    @_contiguous
    def plms_sample(
        self,
        model: Callable,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        cond_fn_with_grad: bool = False,
        order: int = 2,
        old_out: Output | None = None,
    ) -> Output:
        """A multistep step from t to t - 1 after `old_out`, the step before: keys sample, pred_xstart, old_eps."""
        _rooms.updates.check_order(order)

        def predict(x: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            with_grad = cond_fn_with_grad and cond_fn is not None
            with th.set_grad_enabled(with_grad):
                x = x.detach().requires_grad_(with_grad)
                out = self.p_mean_variance(
                    model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
                )
                if cond_fn is not None:
                    condition = self.condition_score_with_grad if with_grad else self.condition_score
                    out = condition(cond_fn, out, x, t, model_kwargs=model_kwargs)
            xstart = out["pred_xstart"].detach()
            return xstart, self._predict_eps_from_xstart(x.detach(), t, xstart)

        alpha_bar_prev = _Tables(self).at("alpha_bar_prev", t, x)
        xstart, eps = predict(x, t)
        past = [*(old_out["old_eps"] if old_out else []), eps][-order:]
        mean_eps = _rooms.updates.adams_bashforth(past)
        if order > 1 and old_out is None:
            ahead = _rooms.updates.ddim_update(xstart, eps, alpha_bar_prev)
            mean_eps = th.lerp(eps, predict(ahead, (t - 1).clamp(min=0))[1], 0.5)
        moved = _rooms.updates.ddim_update(self._predict_xstart_from_eps(x, t, mean_eps), mean_eps, alpha_bar_prev)
        return {"sample": th.where(_later_than_0(t, x) > 0, moved, xstart), "pred_xstart": xstart, "old_eps": past}

    # --- whole chains ---

    def p_sample_loop(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: Any = None,
        progress: bool = False,
        **start: Any,
    ) -> th.Tensor:
        """Samples `shape`. `start`: see `_chain`."""
        steps = self.p_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            **start,
        )
        return _last(steps)

    def p_sample_loop_progressive(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: Any = None,
        progress: bool = False,
        *,
        cond_fn_with_grad: bool = False,
        **start: Any,
    ) -> Iterator[Output]:
        """The outputs of `p_sample`, one by one; replacing `out["sample"]` steers the chain."""
        step = self.p_sample_with_grad if cond_fn_with_grad else self.p_sample
        named = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        return self._chain(step, named, model, shape, noise, model_kwargs, device, progress, **start)

    def ddim_sample_loop(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
        **start: Any,
    ) -> th.Tensor:
        """Samples `shape`. `start`: see `_chain`."""
        steps = self.ddim_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            eta=eta,
            **start,
        )
        return _last(steps)

    def ddim_sample_loop_progressive(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        cond_fn_with_grad: bool = False,
        **start: Any,
    ) -> Iterator[Output]:
        """The outputs of `ddim_sample`, one by one."""
        step = self.ddim_sample_with_grad if cond_fn_with_grad else self.ddim_sample
        named = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn, "eta": eta}
        return self._chain(step, named, model, shape, noise, model_kwargs, device, progress, **start)

    def plms_sample_loop(self, model: Callable, shape: Sequence[int], *args: Any, **kwargs: Any) -> th.Tensor:
        """Samples `shape`; arguments as in `plms_sample_loop_progressive`."""
        return _last(self.plms_sample_loop_progressive(model, shape, *args, **kwargs))

    def plms_sample_loop_progressive(
        self,
        model: Callable,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: dict | None = None,
        device: Any = None,
        progress: bool = False,
        *,
        cond_fn_with_grad: bool = False,
        order: int = 2,
        **start: Any,
    ) -> Iterator[Output]:
        """The outputs of `plms_sample`, one by one."""
        before: Output | None = None

        def step(*args: Any, **kwargs: Any) -> Output:
            nonlocal before
            before = self.plms_sample(*args, **{**kwargs, "old_out": before})
            return before

        named = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn, "order": order}
        named["cond_fn_with_grad"] = cond_fn_with_grad
        return self._chain(step, named, model, shape, noise, model_kwargs, device, progress, **start)

    def _chain(
        self,
        step: Callable,
        named: dict[str, Any],
        model: Any,
        shape: Sequence[int],
        noise: th.Tensor | None,
        model_kwargs: dict | None,
        device: Any,
        progress: bool,
        *,
        skip_timesteps: int = 0,
        init_image: th.Tensor | None = None,
        randomize_class: bool = False,
    ) -> Iterator[Output]:
        """Run `step` from the noisiest step left after `skip_timesteps` down to 0, starting from noise, or `init_image` noised so far.

        `randomize_class` replaces `model_kwargs["y"]` by random classes at every step. The consumer's code runs in its own grad mode.
        """
        if not isinstance(shape, (tuple, list)):
            raise ValueError(f"shape must be a tuple or list, not {shape!r}")
        if device is None:
            device = next(model.parameters()).device if noise is None else noise.device
        sample = th.randn(*shape, device=device) if noise is None else noise
        if skip_timesteps and init_image is None:
            init_image = th.zeros_like(sample)
        indices: Any = range(self.num_timesteps - skip_timesteps)[::-1]
        if init_image is not None:
            first = th.full((shape[0],), indices[0], device=device, dtype=th.long)
            sample = self.q_sample(init_image, first, sample)
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices)
        for index in indices:
            t = th.full((shape[0],), index, device=device, dtype=th.long)
            if randomize_class and model_kwargs and "y" in model_kwargs:
                y = model_kwargs["y"]
                model_kwargs = {**model_kwargs, "y": th.randint(0, model.num_classes, y.shape, device=y.device)}
            with th.no_grad():
                out = step(model, sample, t, model_kwargs=model_kwargs, **named)
            yield out
            sample = out["sample"]

    # --- losses and likelihood ---

    def training_losses(
        self,
        model: Callable,
        x_start: th.Tensor,
        t: th.Tensor,
        model_kwargs: dict | None = None,
        noise: th.Tensor | None = None,
    ) -> dict[str, th.Tensor]:
        """Per-example losses `[N]`: "loss", and "mse", "vb" where there are any."""
        noise = th.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        scale = _rooms.objectives.bound_scale(_LOSS[self.loss_type.name], self.num_timesteps)
        bound: dict[str, Any] = {"x_start": x_start, "x_t": x_t, "t": t, "clip_denoised": False}
        if self.loss_type.name in ("KL", "RESCALED_KL"):
            return {"loss": self._vb_terms_bpd(model=model, model_kwargs=model_kwargs, **bound)["output"] * scale}

        terms = {}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        prediction, raw = _rooms.denoiser.split_variance(output, x_t, _VARIANCE[self.model_var_type.name])
        if raw is not None:  # the bound trains the variance only
            frozen = th.cat([prediction.detach(), raw], dim=1)
            terms["vb"] = self._vb_terms_bpd(model=lambda *args, **kwargs: frozen, **bound)["output"] * scale
        previous, _, _ = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        target = {"PREVIOUS_X": previous, "START_X": x_start, "EPSILON": noise}[self.model_mean_type.name]
        terms["mse"] = _squared_error(target, prediction)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _vb_terms_bpd(
        self,
        model: Callable,
        x_start: th.Tensor,
        x_t: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> Output:
        """One term of the bound, keys output `[N]` in bits per dimension, and pred_xstart."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        mean, log_variance = out["mean"], out["log_variance"]
        divergence = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance))
        log_likelihood = discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
        term = _rooms.likelihood.bound_term(t, divergence, mean_flat(-log_likelihood))
        return {"output": term, "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: th.Tensor) -> th.Tensor:
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device, dtype=th.long)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return _rooms.likelihood.in_bits(mean_flat(normal_kl(mean1=mean, logvar1=log_variance, mean2=0.0, logvar2=0.0)))

    def calc_bpd_loop(
        self, model: Callable, x_start: th.Tensor, clip_denoised: bool = True, model_kwargs: dict | None = None
    ) -> dict[str, th.Tensor]:
        """The whole bound in bits per dimension: total_bpd, prior_bpd `[N]`; vb, xstart_mse, mse `[N, T]` from the last step down."""
        rows = []
        for index in range(self.num_timesteps)[::-1]:
            t = th.full((x_start.shape[0],), index, device=x_start.device, dtype=th.long)
            noise = th.randn_like(x_start)
            x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
            with th.no_grad():
                out = self._vb_terms_bpd(
                    model, x_start=x_start, x_t=x_t, t=t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
                )
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            pairs = ((out["pred_xstart"], x_start), (eps, noise))
            rows.append((out["output"], *(_squared_error(*pair) for pair in pairs)))
        vb, xstart_mse, mse = (th.stack(column, dim=1) for column in zip(*rows))
        bound = _rooms.likelihood.Bound(self._prior_bpd(x_start), vb, xstart_mse, mse)
        return {"total_bpd": bound.total, "prior_bpd": bound.prior, "vb": vb, "xstart_mse": xstart_mse, "mse": mse}


def _squared_error(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """As `diffusion.densities.squared_error`, by the `mean_flat` of this module."""
    return mean_flat((a - b) ** 2)


def _later_than_0(t: th.Tensor, x: th.Tensor) -> th.Tensor:
    """1 where a step is not the last, shaped to multiply x."""
    return (t != 0).float().view(-1, *([1] * (x.ndim - 1)))


def _last(steps: Iterator[Output]) -> th.Tensor:
    out: Output = {}
    for out in steps:  # noqa: B007
        pass
    return out["sample"]


def _extract_into_tensor(arr: Any, timesteps: th.Tensor, broadcast_shape: Sequence[int]) -> th.Tensor:
    """The entries of a 1-D array at `timesteps` (`[N]` or a scalar), float32, expanded to `broadcast_shape`."""
    table = th.from_numpy(np.asarray(arr, dtype=np.float64)).float().to(timesteps.device)
    value = table[timesteps]
    return value.reshape(value.shape + (1,) * (len(broadcast_shape) - value.ndim)).expand(tuple(broadcast_shape))
