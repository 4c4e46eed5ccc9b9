"""What to compute and how. Loads no torch, so that the command line can be read at once."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("float32", "bfloat16")
PR_DTYPES = ("float32", "float16", "float64")


@dataclass(frozen=True)
class Settings:
    """The command's options of the same names; ValueError for what is not allowed."""

    weights: str | None = None
    allow_other_weights: bool = False
    features: str = "inception"
    batch_size: int = 64
    device: str | None = None
    dtype: str = "float32"
    compile: bool = False
    pr_dtype: str = "float32"
    k: int = 3
    split_size: int = 5000
    errors: bool = False
    kid: bool = False
    density_coverage: bool = False
    fid_infinity: bool = False
    per_class: bool = False
    shard_dir: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("pr_dtype", PR_DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed are {', '.join(allowed)}")
        for name in ("batch_size", "k", "split_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
