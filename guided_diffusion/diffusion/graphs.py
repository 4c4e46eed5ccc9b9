"""A denoiser replayed as one CUDA graph: network and guidance of a step become a single launch.

A graph works on fixed memory. So inputs are copied into its own tensors before each replay, what it answers is copied out
where it must outlive the next one, and conditions (labels) that change from batch to batch must be tensors the caller
keeps and fills anew. Noise is drawn outside, by the sampler, whose few operations between two replays stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoised, Denoiser, Spread

Run = Callable[[], Denoised]
# Calls a function so often that nothing is allocated for the first time, then records it: (its answer, how to redo it in place).
Record = Callable[[Run], tuple[Denoised, Callable[[], None]]]

WARM_UP = 3


class _Recorded(NamedTuple):
    x: Tensor
    i: Tensor
    answer: Denoised
    replay: Callable[[], None]


def on_cuda(run: Run) -> tuple[Denoised, Callable[[], None]]:
    """Record `run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()
    return answer, graph.replay


class Graphed:
    """`denoise` as a graph, recorded at the first call for every shape. On other devices than CUDA it is `denoise` itself.

    Where recording fails (an operation that cannot be recorded) the plain way is taken from then on, and `failure` says why.
    """

    def __init__(self, denoise: Denoiser, *, record: Record | None = None) -> None:
        self._denoise, self._record = denoise, record
        self._recorded: dict[tuple[torch.Size, torch.dtype, torch.dtype], _Recorded] = {}
        self.failure: Exception | None = None

    def __call__(self, x: Tensor, i: Tensor) -> Denoised:
        if self.failure is not None or (self._record is None and not x.is_cuda):
            return self._denoise(x, i)
        key = (x.shape, x.dtype, i.dtype)
        if key not in self._recorded:
            try:
                self._recorded[key] = self._made(x, i)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.failure = error
                return self._denoise(x, i)
        held = self._recorded[key]
        held.x.copy_(x)
        held.i.copy_(i)
        held.replay()
        # x0 is handed on to the caller's caller; the spread is used up before the next replay.
        return Denoised(held.answer.x0.clone(), held.answer.spread)

    def _made(self, x: Tensor, i: Tensor) -> _Recorded:
        own_x, own_i = x.detach().clone(), i.clone().contiguous()

        def run() -> Denoised:
            with torch.no_grad():
                answer = self._denoise(own_x, own_i)
                return Denoised(answer.x0, Spread(*answer.both()))

        answer, replay = (self._record or on_cuda)(run)
        return _Recorded(own_x, own_i, answer, replay)
