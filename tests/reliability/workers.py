"""What ranks run in place of the plain command, to be watched or to misbehave. Imported in the ranks by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .jobs import command


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _wrap_losses(change: Callable[..., Any]) -> None:
    """Replace the loss of the training command, in this process, by `change(inner, net, process, x0, i, noise, ...)`."""
    from guided_diffusion.training import losses

    inner = losses.training_losses
    losses.training_losses = lambda *args, **options: change(inner, *args, **options)


def recorded(words: Sequence[str], out: str) -> int:
    """Train, and write down what every example of every step was: hashes of image, timestep and noise."""
    seen = set()

    def spy(inner: Any, net: Any, process: Any, x0: Any, i: Any, noise: Any, *args: Any, **options: Any) -> Any:
        for parts in zip(x0, i, noise):
            seen.add(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
        return inner(net, process, x0, i, noise, *args, **options)

    _wrap_losses(spy)
    code = command(words)
    Path(f"{out}_{rank()}.json").write_text(json.dumps(sorted(seen)))
    return code


def poisoned(words: Sequence[str], first: int) -> int:
    """Train with losses that are not a number from the call `first` on, in rank 0 alone."""
    calls = [0]

    def spoil(inner: Any, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        terms = inner(*args, **options)
        return {k: v * float("nan") if calls[0] > first and rank() == 0 else v for k, v in terms.items()}

    _wrap_losses(spoil)
    return command(words)


def failing(words: Sequence[str], call: int) -> int:
    """Train until rank 1 meets a bug."""
    calls = [0]

    def fail(inner: Any, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and rank() == 1:
            raise RuntimeError("a bug in rank 1")
        return inner(*args, **options)

    _wrap_losses(fail)
    return command(words)


def features(words: Sequence[str]) -> int:
    """Features of the images of `words[0]` into folder `words[1]`, by a network of three numbers in place of Inception."""
    import numpy as np
    import torch

    from evaluations.features import extract
    from evaluations.settings import Settings

    class Tiny(torch.nn.Module):
        sha256, folded = "tiny", False

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(1.0, 4.0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            mean = (x * self.weight[:, None, None]).mean(dim=(1, 2, 3))[:, None]
            return mean.expand(-1, 2048), mean.expand(-1, 2023)

    out = Path(words[1])
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(shard_dir=str(out / "shards"), progress=False)
    found = extract(words[0], Tiny(), settings, chunk=2, shard_images=4, timeout_s=20)  # type: ignore[arg-type]
    if found is not None:
        np.savez(out / "features.npz", *found)
    return 0


def with_other_data(words: Sequence[str], data: str) -> int:
    """Rank 1 is given another folder."""
    words = list(words)
    if rank() == 1:
        words[words.index("--data_dir") + 1] = data
    return command(words)
