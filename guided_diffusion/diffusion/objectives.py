"""What training minimises: (net, process, x0, i, noise) -> per-example losses by name."""

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
    """Losses at steps `i` int64 `[B]` of clean data `x0` `[B, ...]`: "loss" `[B]` and its parts "mse", "vb" `[B]` where there are any.

    "mse": squared error, plus the bound's term in bits if the variance is learned ("rescaled_mse": that term times T/1000), which
    trains the variance alone (arXiv 2102.09672, section 3.1). "kl": the bound's term in bits ("rescaled_kl": times T, an estimate of
    the whole bound). `weight`, such as an entry of `weighting.WEIGHTS`, multiplies the squared error; "mse" is reported without it.
    """
    check_objective(predicts, variance, loss, weight)
    x = add_noise(process, x0, i, noise)
    prediction, raw = split_variance(net(x, process.time_at(i), **(cond or {})), x, variance)

    def bound(prediction: Tensor) -> Tensor:
        """The bound's term for a prediction that is not clipped."""
        mean = posterior_mean(process, x0_from_output(process, prediction, x, i, predicts), x, i)
        log_variance = step_spread(process, raw, x, i, variance).log_variance
        return bound_between(process, x0, x, i, mean, log_variance) * bound_scale(loss, len(process))

    if loss in ("kl", "rescaled_kl"):
        return {"loss": bound(prediction)}
    mse = squared_error(mse_target(process, x0, x, i, noise, predicts), prediction)
    terms = {"mse": mse, "loss": mse if weight is None else mse * weight(process, i, predicts)}
    if raw is not None:
        terms["vb"] = bound(prediction.detach())
        terms["loss"] = terms["loss"] + terms["vb"]
    return terms


def check_objective(predicts: str, variance: str, loss: str, weight: Weight | None = None) -> None:
    """ValueError unless the combination is one that `training_losses` knows."""
    check_reading(predicts, variance)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not one of {', '.join(LOSSES)}")
    if weight is not None and (loss not in ("mse", "rescaled_mse") or predicts == "previous_x"):
        raise ValueError(
            f"a weight needs a mean squared error of eps, x0 or v, not loss={loss!r}, predicts={predicts!r}"
        )


def mse_target(tables: Tables, x0: Tensor, x: Tensor, i: Tensor, noise: Tensor, predicts: Predicts) -> Tensor:
    """What the prediction is compared with."""
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
    """What a bound term is multiplied by: T for "rescaled_kl"; T/1000 for "rescaled_mse", so that it never outweighs the mse."""
    return {"rescaled_kl": float(num_steps), "rescaled_mse": num_steps / 1000}.get(loss, 1.0)
