"""The recorded figures of the 2021 implementation about diffusion, and the small inputs they were measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"
FIGURES: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
CASES: dict[str, dict[str, Any]] = FIGURES["diffusion"]["cases"]
SEEDS: dict[str, int] = FIGURES["diffusion"]["seeds"]
SHAPE = (4, 3, 6, 6)
SHORT = [name for name, flags in CASES.items() if flags.get("timestep_respacing")]


class Recorded:
    """One case of golden.npz; `check` compares with one of its arrays."""

    def __init__(self, name: str) -> None:
        self.name, self.flags = name, CASES[name]
        self.arrays = np.load(GOLDEN / "golden.npz")
        self.learned = bool(self.flags.get("learn_sigma"))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[f"d/{self.name}/{key}"]

    def __contains__(self, key: str) -> bool:
        return f"d/{self.name}/{key}" in self.arrays

    def check(self, key: str, actual: Tensor) -> None:
        close(actual, self[key])

    def net(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The analytic stand-in for a network."""
        eps = 0.7 * x * torch.cos(0.003 * t.float()).view(-1, 1, 1, 1) + 0.05
        if y is not None:
            eps = eps + 0.01 * y.float().view(-1, 1, 1, 1)
        return torch.cat([eps, torch.sin(3 * x)], dim=1) if self.learned else eps


def close(actual: Tensor, expected: np.ndarray) -> None:
    """Within the difference that another order of float32 arithmetic makes."""
    reference = torch.from_numpy(np.asarray(expected))
    assert actual.dtype == reference.dtype
    torch.testing.assert_close(actual, reference, rtol=0, atol=2e-5 * float(reference.abs().max()))


def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    return -0.5 * x * (1 + 0.001 * t.float().view(-1, 1, 1, 1))


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def data() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x0, noise and the labels."""
    return normal(5).tanh(), normal(SEEDS["noise"]), {"y": torch.arange(4)}


def steps(count: int) -> Tensor:
    return torch.tensor([0, 1, count // 2, count - 1])
