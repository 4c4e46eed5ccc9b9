"""A context with full float32 arithmetic, whatever settings the process uses for training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside matrix products and convolutions, and deterministic cuDNN kernels.

    Scores computed during training would otherwise inherit the trainer's fast settings and differ from scores of saved samples.
    All settings are restored at the end.
    """
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    settings: list[tuple[Any, str, Any]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        settings += [(kind, "fp32_precision", "ieee") for kind in (matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)]
    else:  # PyTorch before 2.9
        settings += [(kind, "allow_tf32", False) for kind in (matmul, cudnn)]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in settings]
    try:
        for holder, name, value in settings:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
