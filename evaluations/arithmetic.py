"""Full float32 arithmetic for a while, whatever the process has chosen for its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside products and convolutions, and the same cuDNN kernels every time.

    Scores while training would otherwise inherit the trainer's fast settings and differ from scores of saved samples.
    All settings are put back at the end.
    """
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    settings: list[tuple[Any, str, Any]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        kinds = (torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
        settings += [(kind, "fp32_precision", "ieee") for kind in kinds]
    else:  # PyTorch before 2.9
        settings += [(torch.backends.cuda.matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in settings]
    try:
        for holder, name, value in settings:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
