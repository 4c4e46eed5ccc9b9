"""A step through torch.compile as one graph: network, reading of its output, guidance and its gradient.

Compiled apart, each network is fast but everything between them stays a row of small operations. Compiled whole, they are
fused with the last and first operations of the networks, and the backward pass of a classifier becomes part of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoised, Denoiser, Spread

Cond = Mapping[str, Tensor]
Conditioned = Callable[[Cond], Denoiser]  # named conditions of one batch (labels) -> its denoiser


class Compiled:
    """`make`, whose denoisers run as one graph: compiled at the first call for every shape, then for all batches and steps.

    What changes from batch to batch must come through the conditions: they are inputs of the graph, as x and i are. A last,
    smaller batch is best filled up by the caller, since another size is another graph. Calls are made without gradients.

    torch keeps eight graphs at most: batches of a ninth size are computed without one, which a warning tells.

    What cannot be compiled as one graph is done by the denoisers of `otherwise` from then on: a warning tells so, once, and
    `failure` says why. Without `otherwise` the error is raised. `backend` is torch.compile's.
    """

    def __init__(
        self, make: Conditioned, *, otherwise: Conditioned | None = None, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        def step(x: Tensor, i: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            answer = make(cond)(x, i)
            return answer.x0.contiguous(), *answer.both()

        self._make, self._told = make, False
        self._step = torch.compile(_of_its_own(step), fullgraph=True, dynamic=False, backend=backend)
        self._otherwise = otherwise
        self.failure: Exception | None = None

    def __call__(self, cond: Cond) -> Denoiser:
        def denoise(x: Tensor, i: Tensor) -> Denoised:
            if self.failure is None:
                given = {name: _usual(value) for name, value in cond.items()}  # now, as its values may have changed
                try:
                    with torch.inference_mode(False), torch.no_grad():
                        x0, *spread = self._step(_usual(x), _usual(i), given)
                        return Denoised(x0, Spread(*spread))
                except torch._dynamo.exc.FailOnRecompileLimitHit:  # no further graph; those there are go on
                    self._tell("too many sizes of batches for one graph each; the later ones are not compiled")
                    return self._make(cond)(x, i)
                except torch._dynamo.exc.TorchDynamoException as error:
                    if self._otherwise is None:
                        raise
                    self._give_up(error)
            assert self._otherwise is not None
            return self._otherwise(cond)(x, i)

        return denoise

    def _give_up(self, error: Exception) -> None:
        self.failure = error
        # Its first two lines, as one; the rest is for those who debug torch.
        reason = " ".join(" ".join(str(error).strip().splitlines()[:2]).split())
        self._tell(f"the step cannot be compiled as one graph ({reason}); each network is compiled by itself")

    def _tell(self, text: str) -> None:
        if not self._told:
            warnings.warn(text, stacklevel=4)
        self._told = True


def _usual(value: Tensor) -> Tensor:
    """`value` as the graph was made for, whoever calls: one layout in memory, and no tensor of inference mode."""
    with torch.inference_mode(False):
        return value.clone(memory_format=torch.contiguous_format) if value.is_inference() else value.contiguous()


def _of_its_own(function: Any) -> FunctionType:
    """A copy of `function` that shares no code object: torch counts graphs by code object and gives up at eight, whosever they are."""
    code, scope = function.__code__.replace(), function.__globals__
    return FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
