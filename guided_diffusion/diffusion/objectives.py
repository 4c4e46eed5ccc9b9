"""Training objectives: (net, process, x0, i, noise) -> per-example losses by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from .denoiser import Net, Predicts, Variance, check_reading, split_variance, step_spread, x0_from_output
from .densities import squared_error
from .likelihood import bound_between
from .process import Process, Tables, add_noise, posterior_mean, v_from_x0

Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]
Weight = Callable[[Process, Tensor, Predicts], Tensor]
LOSSES: tuple[Loss, ...] = get_args(Loss)


def training_losses(
    net: Net,
    process: Process,
    x0: Tensor,
    i: Tensor,
    noise: Tensor,
    cond: Mapping[str, Any] | None = None,
    *,
    predicts: Predicts = "eps",
    variance: Variance = "learned_range",
    loss: Loss = "mse",
    weight: Weight | None = None,
) -> dict[str, Tensor]:
    """Losses `[B]` of clean data `x0` `[B, ...]` at steps `i` int64 `[B]`: "loss" and, of the mse losses, "mse" and "vb".

    "mse": squared error; with learned variance plus the bound's term "vb" in bits, which trains the variance alone (arXiv
    2102.09672, section 3.1). "rescaled_mse": that term times T/1000. "kl": the bound's term in bits. "rescaled_kl": times T, an
    estimate of the whole bound. `weight` (see `weighting.WEIGHTS`) multiplies the squared error in "loss", not in "mse".
    """
    check_objective(predicts, variance, loss, weight)
    x = add_noise(process, x0, i, noise)
    prediction, raw = split_variance(net(x, process.time_at(i), **(cond or {})), x, variance)

    def bound(prediction: Tensor) -> Tensor:
        """The bound's term for the unclipped prediction, scaled as `loss` says."""
        mean = posterior_mean(process, x0_from_output(process, prediction, x, i, predicts), x, i)
        log_variance = step_spread(process, raw, x, i, variance).log_variance
        return bound_between(process, x0, x, i, mean, log_variance) * bound_scale(loss, len(process))

    if loss in ("kl", "rescaled_kl"):
        return {"loss": bound(prediction)}
    mse = squared_error(mse_target(process, x0, x, i, noise, predicts), prediction)
    terms = {"mse": mse, "loss": mse if weight is None else mse * weight(process, i, predicts)}
    if raw is not None:
        terms["vb"] = bound(prediction.detach())  # gradients reach the variance channels only
        terms["loss"] = terms["loss"] + terms["vb"]
    return terms


def check_objective(predicts: str, variance: str, loss: str, weight: Weight | None = None) -> None:
    """ValueError unless `training_losses` supports the combination."""
    check_reading(predicts, variance)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not one of {', '.join(LOSSES)}")
    if weight is not None and (loss not in ("mse", "rescaled_mse") or predicts == "previous_x"):
        raise ValueError(
            f"a weight needs a mean squared error of eps, x0 or v, not loss={loss!r}, predicts={predicts!r}"
        )


def mse_target(tables: Tables, x0: Tensor, x: Tensor, i: Tensor, noise: Tensor, predicts: Predicts) -> Tensor:
    """The regression target of the network's prediction."""
    match predicts:
        case "eps":
            return noise
        case "x0":
            return x0
        case "previous_x":
            return posterior_mean(tables, x0, x, i)
        case "v":
            return v_from_x0(tables, x0, i, noise)


def bound_scale(loss: Loss, num_steps: int) -> float:
    """Factor of the bound's term: T for "rescaled_kl", T/1000 for "rescaled_mse" so that it never outweighs the mse."""
    return {"rescaled_kl": float(num_steps), "rescaled_mse": num_steps / 1000}.get(loss, 1.0)
