"""The plain loops around a network: guided DDIM and a training step, as they are written first.

Plain means: float64 tables of numpy, cut, copied and cast at every use; the variance and the posterior mean worked out
whether the step needs them or not; class probabilities picked by a list of indices, with a classifier whose weights ask
for gradients; in training a `.item()` per loss and per parameter tensor, AdamW and the moving average one parameter
at a time. The mathematics is the same, so both sides of a ratio end in the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.diffusion.densities import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.diffusion.process import Process, tables_of

Model = Callable[..., Tensor]
CondFn = Callable[[Tensor, Tensor], Tensor]


def cut(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """The values of a float64 table at steps `t`, spread out to the shape of `like`."""
    values = torch.from_numpy(table).to(t.device)[t].float()
    while values.dim() < like.dim():
        values = values[..., None]
    return values.expand(like.shape)


class PlainLoops:
    """Sampling and losses over a process's steps, for networks that predict eps and learn the variance's range."""

    def __init__(self, process: Process) -> None:
        self.steps = len(process)
        self.times = process.time.double().cpu().numpy()
        self.tables = tables_of(process.betas)

    def told(self, t: Tensor) -> Tensor:
        """What the network is told at steps `t`."""
        return torch.tensor(self.times, device=t.device)[t].float()

    def _x0(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        recip, recipm1 = self.tables["sqrt_recip_alpha_bar"], self.tables["sqrt_recipm1_alpha_bar"]
        return cut(recip, t, x) * x - cut(recipm1, t, x) * eps

    def _eps(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        recip, recipm1 = self.tables["sqrt_recip_alpha_bar"], self.tables["sqrt_recipm1_alpha_bar"]
        return (cut(recip, t, x) * x - x0) / cut(recipm1, t, x)

    def _posterior(self, x0: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_{t-1} | x_t, x0)."""
        mean = cut(self.tables["posterior_mean_x0"], t, x) * x0 + cut(self.tables["posterior_mean_x"], t, x) * x
        variance = cut(self.tables["posterior_variance"], t, x)
        return mean, variance, cut(self.tables["posterior_log_variance"], t, x)

    def _reading(self, model: Model, x: Tensor, t: Tensor, cond: dict[str, Tensor], clip: bool) -> dict[str, Tensor]:
        eps, raw = model(x, self.told(t), **cond).split(x.shape[1], dim=1)
        low, high = cut(self.tables["posterior_log_variance"], t, x), cut(np.log(self.tables["beta"]), t, x)
        share = (raw + 1) / 2
        log_variance = share * high + (1 - share) * low
        x0 = self._x0(x, t, eps)
        x0 = x0.clamp(-1, 1) if clip else x0
        mean, _, _ = self._posterior(x0, x, t)
        return {"x0": x0, "eps": eps, "mean": mean, "variance": log_variance.exp(), "log_variance": log_variance}

    @torch.no_grad()
    def ddim(
        self, model: Model, x: Tensor, cond: dict[str, Tensor] | None = None, cond_fn: CondFn | None = None
    ) -> Tensor:
        """Deterministic DDIM from noise `x`, guided by `cond_fn(x, time)`, the gradient of a log-probability."""
        for k in range(self.steps - 1, -1, -1):
            t = torch.tensor([k] * x.shape[0], device=x.device)
            found = self._reading(model, x, t, cond or {}, True)
            alpha_bar = cut(self.tables["alpha_bar"], t, x)
            previous = cut(self.tables["alpha_bar_prev"], t, x)
            if cond_fn is not None:
                eps = self._eps(x, t, found["x0"]) - (1 - alpha_bar).sqrt() * cond_fn(x, self.told(t))
                found["x0"] = self._x0(x, t, eps)
                found["mean"], _, _ = self._posterior(found["x0"], x, t)
            eps = self._eps(x, t, found["x0"])
            sigma = 0.0 * torch.sqrt((1 - previous) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / previous)
            mean = found["x0"] * torch.sqrt(previous) + torch.sqrt(1 - previous - sigma**2) * eps
            inner = (t != 0).float().view(-1, *[1] * (x.dim() - 1))
            x = mean + inner * sigma * torch.randn_like(x)
        return x

    def losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared error of eps plus the bound's term for the variance, `[B]` each."""
        x = cut(self.tables["sqrt_alpha_bar"], t, x0) * x0
        x = x + cut(self.tables["sqrt_one_minus_alpha_bar"], t, x0) * noise
        eps, raw = model(x, self.told(t), **cond).split(x.shape[1], dim=1)
        frozen = torch.cat([eps.detach(), raw], dim=1)
        found = self._reading(lambda *_, **__: frozen, x, t, {}, False)
        truth, _, truth_log_variance = self._posterior(x0, x, t)
        kl = normal_kl(truth, truth_log_variance, found["mean"], found["log_variance"]).mean(dim=(1, 2, 3))
        nll = -discretized_gaussian_log_likelihood(x0, means=found["mean"], log_scales=0.5 * found["log_variance"])
        vb = torch.where(t == 0, nll.mean(dim=(1, 2, 3)), kl) / math.log(2.0)
        vb = vb * self.steps / 1000
        mse = ((noise - eps) ** 2).mean(dim=(1, 2, 3))
        return {"loss": mse + vb, "mse": mse, "vb": vb}


def plain_cond_fn(classifier: Model, labels: Tensor, scale: float) -> CondFn:
    """The gradient of log p(labels | x), scaled."""

    def gradient(x: Tensor, time: Tensor) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, time), dim=-1)
            chosen = log_probs[range(len(labels)), labels.view(-1)]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * scale

    return gradient


class PlainTrainer:
    """One update at a time: loss, logging, norms, AdamW, averages, each written plainly."""

    def __init__(
        self, net: nn.Module, forward: Model, process: Process, *, lr: float, ema_rates: Sequence[float]
    ) -> None:
        self.net_params = list(net.parameters())
        self.params = self._learned()
        self.forward = forward
        self.loops = PlainLoops(process)
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, weight_decay=0.0, foreach=False, fused=False)
        self.ema_rates = list(ema_rates)
        self.averages = [[p.detach().clone() for p in self.params] for _ in self.ema_rates]
        self.logged: dict[str, float] = {}

    def _learned(self) -> list[nn.Parameter]:
        """What the optimizer moves and the averages follow."""
        return self.net_params

    def step(self, x0: Tensor, t: Tensor, noise: Tensor, cond: dict[str, Tensor]) -> None:
        """One update on float images in [-1, 1] at steps `t`."""
        for p in self.net_params:
            p.grad = None
        terms = self.loops.losses(self.forward, x0, t, noise, cond)
        for name, values in terms.items():
            self.logged[name] = values.mean().item()
            for step, value in zip(t.cpu().numpy(), values.detach().cpu().numpy()):
                self.logged[f"{name}_q{int(4 * step / self.loops.steps)}"] = value.item()
        self._learn(terms["loss"].mean())
        for rate, targets in zip(self.ema_rates, self.averages):
            for target, source in zip(targets, self.params):
                target.detach().mul_(rate).add_(source.detach(), alpha=1 - rate)

    def _learn(self, loss: Tensor) -> None:
        loss.backward()
        self._log_norms()
        self.optimizer.step()

    def _log_norms(self) -> None:
        grad, weight = 0.0, 0.0
        for p in self.params:
            with torch.no_grad():
                weight += torch.norm(p).item() ** 2
                if p.grad is not None:
                    grad += torch.norm(p.grad).item() ** 2
        self.logged.update(grad_norm=np.sqrt(grad), param_norm=np.sqrt(weight))


class PlainHalfTrainer(PlainTrainer):
    """As PlainTrainer, for a network whose convolutions are stored in float16, the way of 2021.

    AdamW moves a float32 copy of all weights, two flat vectors; every step gradients are joined and cast into it, and the
    weights are cut and cast out of it again. The loss is scaled by 2 to a power that falls by one where a gradient
    overflows, in which case the step is skipped, and grows slowly otherwise.
    """

    # 2021 began at 20 and lost the first steps to it; here every measured step is meant to count.
    log_scale = 8.0
    growth = 1e-3
    skipped = 0

    def _learned(self) -> list[nn.Parameter]:
        vectors = [p for p in self.net_params if p.dim() <= 1]
        matrices = [p for p in self.net_params if p.dim() > 1]
        self.groups = [group for group in (vectors, matrices) if group]
        return [nn.Parameter(self._joined([p.detach() for p in group])) for group in self.groups]

    @staticmethod
    def _joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1).float() for tensor in tensors])

    def _learn(self, loss: Tensor) -> None:
        scale = 2.0**self.log_scale
        (loss * scale).backward()
        for flat, group in zip(self.params, self.groups):
            flat.grad = self._joined([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            flat.grad.mul_(1 / scale)
        self._log_norms()
        if not math.isfinite(self.logged["grad_norm"]):
            self.log_scale -= 1
            self.skipped += 1
            return
        self.optimizer.step()
        with torch.no_grad():
            for flat, group in zip(self.params, self.groups):
                flat.grad = None
                for p, values in zip(group, flat.split([p.numel() for p in group])):
                    p.copy_(values.view_as(p))
        self.log_scale += self.growth


def plain_batch(images: Tensor, timesteps: int, generator: Any = None) -> tuple[Tensor, Tensor]:
    """uint8 `[B, H, W, C]` as the 2021 loader and step sampler would give it: float32 NCHW from numpy, and drawn steps."""
    array = images.numpy().astype(np.float32) / 127.5 - 1
    x0 = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
    drawn = np.random.default_rng(generator).choice(timesteps, size=(len(images),), p=np.full(timesteps, 1 / timesteps))
    return x0, torch.from_numpy(drawn).long()
