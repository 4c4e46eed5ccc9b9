"""Mixtures of Gaussians, for which the ideal denoiser, and the ideal noisy classifier, are known; and the recorded cases on them.

samplers.json and samplers.npz in tests/golden/samplers were made with independent public implementations; `README.md` beside the
originals gives every formula.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.diffusion.denoiser import Denoised, Denoiser
from guided_diffusion.diffusion.grids import Grid
from guided_diffusion.diffusion.process import Process, make_process
from guided_diffusion.diffusion.schedules import named_betas

FOLDER = Path(__file__).parent.parent / "golden" / "samplers"
FIGURES: dict[str, Any] = json.loads((FOLDER / "samplers.json").read_text())
CASES: dict[str, Any] = FIGURES["cases"]


@lru_cache(maxsize=1)
def arrays() -> Any:
    return np.load(FOLDER / "samplers.npz")


@lru_cache(maxsize=2)
def process_of(schedule: str) -> Process:
    return make_process(named_betas(schedule, 1000)).to(dtype=torch.float64)


def grid_of(name: str) -> Grid:
    recorded = FIGURES["grids"][name]
    return Grid(np.array(recorded["i"]), np.array(recorded["lam"]))


def x_T(shape: list[int], count: int = 3, seed: int = 101) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((count, *shape)))


class Mixture:
    """sum_k w_k N(m_k, d_k^2), data of `shape`."""

    def __init__(self, name: str) -> None:
        figures = FIGURES["models"][name]
        self.shape = figures["shape"]
        self.log_weights, self.means, self.deviations = (
            torch.tensor(figures[key], dtype=torch.float64) for key in ("weights", "means", "stds")
        )
        self.log_weights = self.log_weights.log()

    def scores(self, x: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Score `[B, D]` of the whole and `[B, K, D]` of every component, for x `[B, D]` and alpha_bar `[B, 1]`."""
        away = alpha_bar.sqrt()[..., None] * self.means - x[:, None]
        variance = alpha_bar * self.deviations**2 + 1 - alpha_bar
        log = self.log_weights - away.square().sum(-1) / (2 * variance) - x.shape[1] / 2 * variance.log()
        each = away / variance[..., None]
        return (log.softmax(-1)[..., None] * each).sum(1), each

    def denoiser(
        self, process: Process, case: dict[str, Any] | None = None, labels: tuple[int, ...] = (0, 1, 2)
    ) -> Denoiser:
        guidance = (case or {}).get("guidance") or {"kind": "plain"}
        correct = (case or {}).get("x0")

        def denoise(x: Tensor, i: Tensor) -> Denoised:
            alpha_bar = process.at("alpha_bar", i, x.flatten(1))
            plain, each = self.scores(x.flatten(1), alpha_bar)
            given_y = each[torch.arange(len(x)), list(labels)[: len(x)]]
            sigma = ((1 - alpha_bar) / alpha_bar).sqrt()[0, 0].item()
            score = guided_score(guidance, plain, given_y, sigma)
            x0 = ((x.flatten(1) + (1 - alpha_bar) * score) / alpha_bar.sqrt()).view_as(x)
            return Denoised(corrected(x0, correct), refuse, 0.0)

        return denoise


def guided_score(guidance: dict[str, Any], plain: Tensor, given_y: Tensor, sigma: float) -> Tensor:
    kind, scale = guidance["kind"], guidance.get("scale", 0.0)
    low, high = guidance.get("interval_sigma") or (-math.inf, math.inf)
    if not low < sigma <= high:
        kind = {"classifier_on_cond": "cond"}.get(kind, "plain")
    return {
        "plain": lambda: plain,
        "cond": lambda: given_y,
        "classifier": lambda: plain + scale * (given_y - plain),
        "classifier_on_cond": lambda: given_y + scale * (given_y - plain),
        "cfg": lambda: plain + scale * (given_y - plain),
    }[kind]()


def corrected(x0: Tensor, how: str | None) -> Tensor:
    if how is None:
        return x0
    if how == "clip":
        return x0.clamp(-1, 1)
    part = float(how.removeprefix("dynamic"))
    most = x0.abs().flatten(1).quantile(part, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return x0.clamp(-most, most) / most


def refuse() -> Any:
    raise AssertionError("no solver asks for the variance")


FULL = 9  # a final order that lowers nothing
# the recorded name of a method -> our sampler and its options
METHODS: list[tuple[str, str, Any]] = [
    (r"euler", "euler", dict),
    (r"heun", "heun", dict),
    (r"(euler|heun)_churn8", "{0}", lambda name: {"churn": 8.0, "churn_min": 0.05, "churn_max": 50.0, "noise_scale": 1.003}),
    (r"dpm2", "dpm2", dict),
    (r"dpmpp_([23])m(_low)?", "dpm_solver", lambda order, low: {"order": int(order), "final_order": 1 if low else FULL}),
    (r"dpmpp_2m_taylor", "dpm_solver", lambda: {"solver": "taylor", "final_order": FULL}),
    (r"dpm_([23])m", "dpm_solver", lambda order: {"order": int(order), "final_order": FULL, "form": "noise"}),
    (r"dpmpp_([23])s", "dpm_solver_s", lambda order: {"order": int(order)}),
    (r"unip([23])", "dpm_solver", lambda order: {"order": int(order), "final_order": FULL, "exact": order == "3"}),
    (
        r"unipc([123])_(bh[12])(_low|_eps|_diffusers)?",
        "unipc",
        lambda order, variant, more: {
            "order": int(order),
            "variant": variant,
            "final_order": {"_low": 1, "_diffusers": 2}.get(more, FULL),
            "form": "noise" if more == "_eps" else "data",
        },
    ),
    (r"deis_log([123])", "deis", lambda order: {"order": int(order), "final_order": FULL}),
    (r"ab([234])_sigma", "adams", lambda order: {"order": int(order), "final_order": FULL}),
    (r"ipndm([234])", "ipndm", lambda order: {"order": int(order), "final_order": FULL}),
    (r"plms4", "plms", lambda: {"order": 4, "final_order": FULL}),
    (r"euler_a_eta(.*)", "ancestral_euler", lambda eta: {"eta": float(eta)}),
    (r"dpmpp_sde_brownian_eta(.*)", "dpm_sde", lambda eta: {"eta": float(eta)}),
    (
        r"dpmpp_2m_sde_(midpoint|heun)_eta(.*)",
        "sde_dpm_solver",
        lambda solver, eta: {"solver": {"heun": "taylor"}.get(solver, solver), "eta": float(eta), "final_order": FULL},
    ),
    (r"dpmpp_3m_sde_eta(.*)", "sde_dpm_solver", lambda eta: {"order": 3, "solver": "taylor", "eta": float(eta), "final_order": FULL}),
    (
        r"sa_p(\d)c(\d)_tau(.*)",
        "sa",
        lambda order, corrector, tau: {"order": int(order), "corrector": int(corrector), "tau": float(tau)},
    ),
    (r"restart/.*", "restart", dict),
]  # fmt: skip


def method_of(name: str) -> tuple[str, dict[str, Any]] | None:
    for pattern, sampler, options in METHODS:
        if match := re.fullmatch(pattern, name):
            return sampler.format(*match.groups()), options(*match.groups())
    return None
