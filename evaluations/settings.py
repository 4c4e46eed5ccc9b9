"""Settings of an evaluation. Does not load torch, to keep --help fast."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("float32", "bfloat16")
PR_DTYPES = ("float32", "float16", "float64")


@dataclass(frozen=True)
class Settings:
    """Evaluator options (progress = not --quiet). Raises ValueError for a bad dtype, pr_dtype, batch_size, k or split_size; names
    in `metrics` are checked by Scorer."""

    weights: str | None = None
    allow_other_weights: bool = False
    features: str = "inception"
    batch_size: int = 64  # images read and resized at a time; changes no number
    device: str | None = None
    dtype: str = "float32"  # bfloat16 changes features by about 5e-3: for a quick look, never for reported scores
    compile: bool = False  # by torch.compile: a minute or more at first, then faster on a GPU; last bits change
    pr_dtype: str = "float32"
    k: int = 3
    split_size: int = 5000
    errors: bool = False
    kid: bool = False
    metrics: tuple[str, ...] = ()  # further scores, names of metrics.METRICS
    density_coverage: bool = False
    fid_infinity: bool = False
    per_class: bool = False
    shard_dir: str | None = None  # folder where finished features are kept
    progress: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("pr_dtype", PR_DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed are {', '.join(allowed)}")
        for name in ("batch_size", "k", "split_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
