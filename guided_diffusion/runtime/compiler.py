"""torch.compile: when it pays, where its cache is, and how a network is compiled that can still run without."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from . import storage

_log = logging.getLogger(__name__)


class Price(NamedTuple):
    """What compiling costs on a GPU, and what it saves there."""

    seconds: float
    gain: float  # share of the time without it


# Measured on one H100 (torch 2.11, bfloat16), against the same network with the fused norm. Sampling: a forward pass takes 40 to 45 ms
# instead of 50 at 64 px and batch 64, 85 to 90 instead of 117 at 256 px and batch 16, after 78 and 87 s. Training: a step at 64 px and
# batch 64 takes 152 ms instead of 187, after 233 s.
SAMPLING = Price(80, 0.20)
TRAINING = Price(230, 0.19)


def pays(remaining: float, price: Price) -> bool:
    """Whether work that takes `remaining` seconds without it would save three times what compiling costs."""
    return remaining * price.gain >= 3 * price.seconds


def announce(remaining: float, price: Price) -> None:
    """Log that --compile auto compiles now, and why."""
    left = f"{remaining / 60:.0f} minutes of work are" if remaining < float("inf") else "work without end is"
    saved = f"about {remaining * price.gain / 60:.0f} minutes" if remaining < float("inf") else f"{price.gain:.0%}"
    _log.info(
        f"--compile auto: {left} left at the present speed; compiling takes about {price.seconds:g} s and is expected to save "
        f"{saved}"
    )


def begin() -> None:
    """Log that compiling begins, and where compiled code outlives the process."""
    _log.info(f"compiling, which takes a minute or more; compiled code is kept in {storage.keep_compiled_code()}")


def compile_network(net: nn.Module) -> None:
    """Compile `net` in place, one graph per input shape; its parameter names do not change.

    A shape beyond those that torch keeps graphs for runs uncompiled. Where a forward pass fails, this warns, and the network runs
    uncompiled from then on: an error that is not the compiler's comes again.
    """
    net.compile(fullgraph=True, dynamic=False)
    compiled = net._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
                undo(net)
                _log.warning(f"{type(net).__name__} cannot be compiled ({reason(error)}); it runs uncompiled")
        return net._call_impl(*args, **kwargs)

    net._compiled_call_impl = call


def compile_or_leave(nets: Sequence[nn.Module], trial: Callable[[], object]) -> bool:
    """Compile networks in place, and let `trial` call them, backward pass included, so that the compiler is at work now.

    If it fails, for whatever reason, this warns, leaves all of them uncompiled and returns False.
    """
    begin()
    for net in nets:
        compile_network(net)
    try:
        trial()
    except Exception as error:
        undo(*nets)
        _log.warning(f"compiling failed ({reason(error)}); the work goes on uncompiled")
    return all(net._compiled_call_impl is not None for net in nets)


def undo(*nets: nn.Module) -> None:
    """Let networks run uncompiled."""
    for net in nets:
        net._compiled_call_impl = None


@contextlib.contextmanager
def uncompiled(net: nn.Module) -> Iterator[None]:
    """Inside, `net` runs uncompiled."""
    compiled = net._compiled_call_impl
    undo(net)
    try:
        yield
    finally:
        net._compiled_call_impl = compiled


def reason(error: Exception) -> str:
    """The first two lines of an error's text, as one; the others concern torch's internals."""
    return " ".join(" ".join(str(error).strip().splitlines()[:2]).split())
