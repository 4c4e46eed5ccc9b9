"""How the denoising steps of a job are executed: as they are, compiled by torch.compile as one graph, replayed as one CUDA graph.

A step is the network, x0 and variance from its output, and guidance with its gradient. If only the networks are compiled,
everything between them runs as many small kernels. In one graph these are fused with the first and last operations of the
networks, and the backward pass of a classifier becomes part of the graph.

A CUDA graph works on fixed memory. Inputs are copied into its own tensors before each replay, and a result is copied out
if it must outlive the next replay. Noise is drawn outside, by the sampler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..diffusion.denoiser import ByLevel, Denoised, Denoiser, Spread
from ..diffusion.process import Process
from ..runtime import compiler

Cond = Mapping[str, Tensor]
Conditioned = Callable[
    [Cond], Denoiser
]  # the conditioning of one batch (labels, low-resolution images) -> its denoiser
Scales = tuple[float, ...]
Auto = Literal["auto"]
# On an H100 a guided step at 64 px was 8.7 to 12 times as fast from a CUDA graph at batch 4; at 256 px and batch 16 the card is busy
# without one, so there is nothing to save.
_GRAPH_PIXELS = 2**18
_GRAPH_STEPS = 20  # a recording takes four
_log = logging.getLogger(__name__)


def worth_recording(pixels: int, steps: int) -> bool:
    """Whether so many steps on batches of so many pixels (images x height x width) save time by a CUDA graph."""
    return pixels <= _GRAPH_PIXELS and steps >= _GRAPH_STEPS


class Execution:
    """How the steps of a job are executed, which may change between two batches.

    make        without `levels`: conditioning -> denoiser. With it: (what `levels` returns, conditioning) -> denoiser
    levels      noise level sigma/alpha -> the scales of the guidance there. The steps of each set of scales are compiled or recorded apart
    compile     True: compiled; "auto": compiled once the speed of the second batch says that it pays. A caller that has "auto" work
                calls `after_batch`
    graphs      True: replayed from a CUDA graph; "auto": where that is `worth_recording`
    on_failure  of `Compiled`
    """

    def __init__(
        self,
        make: Callable[..., Denoiser],
        *,
        levels: Callable[[float], Scales] | None = None,
        process: Process | None = None,
        compile: bool | Auto = False,
        graphs: bool | Auto = False,
        on_failure: Callable[[Callable[[], object]], object] | None = None,
    ) -> None:
        self._make, self._levels, self._process = make, levels, process
        self._on_failure, self._graphs = on_failure, graphs
        self._auto, self._compiled, self._batches, self._steps = compile == "auto", False, 0, 0
        self._ways: dict[Scales | None, tuple[Conditioned, Conditioned]] = {}  # scales -> (step, recorded step)
        if compile is True:
            self._compile()

    def denoiser(self, cond: Cond, *, pixels: int, steps: int) -> Denoiser:
        """The denoiser of a batch of so many pixels, for a chain of so many steps. Short chains are recorded from a later batch on."""
        self._steps += steps
        record = self._graphs is True or (self._graphs == "auto" and worth_recording(pixels, self._steps))
        if self._levels is None or self._process is None:
            return self._way(None)[record](cond)
        levels, made = self._levels, dict[Scales, Denoiser]()

        def at(sigma: float) -> Denoiser:
            scales = levels(sigma)
            if scales not in made:
                made[scales] = self._way(scales)[record](cond)
            return made[scales]

        return ByLevel(self._process, at)

    def after_batch(self, seconds: float, left: int) -> None:
        """To be called after each batch with the time it took and the number of batches still to be made."""
        self._batches += 1
        remaining = seconds * left
        # The first batch also warms up: it chooses algorithms and records graphs.
        if self._auto and self._batches == 2 and compiler.pays(remaining, compiler.SAMPLING):
            compiler.announce(remaining, compiler.SAMPLING)
            self._compile()

    def _compile(self) -> None:
        compiler.begin()
        self._compiled, self._ways = True, {}  # graphs of the steps as they were are dropped

    def _way(self, scales: Scales | None) -> tuple[Conditioned, Conditioned]:
        if scales not in self._ways:
            step: Conditioned = self._make if scales is None else partial(self._make, scales)
            if self._compiled:
                step = Compiled(step, on_failure=self._on_failure)
            self._ways[scales] = step, Graphed(step)
        return self._ways[scales]


class Compiled:
    """Wraps `make` so that its denoisers run as one graph per shape, compiled at the first call, for all batches and steps.

    What changes from batch to batch must come through the conditioning, an input of the graph like x and i. Callers should
    fill up a smaller last batch: every batch size has its own graph, and torch keeps at most eight. Batches of further
    sizes run uncompiled, after a warning. Steps run without gradients.

    If a step cannot be compiled as one graph, it warns, sets `failure`, calls `on_failure` with a function that takes such a step, and
    from then on the denoisers of `make` run as they are. Without `on_failure` the error is raised. `backend` is torch.compile's.
    """

    def __init__(
        self,
        make: Conditioned,
        *,
        on_failure: Callable[[Callable[[], object]], object] | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        def step(x: Tensor, i: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            denoised = make(cond)(x, i)
            return denoised.x0.contiguous(), *denoised.both()

        self._make, self._on_failure, self._warned = make, on_failure, False
        self._step = torch.compile(_with_own_code(step), fullgraph=True, dynamic=False, backend=backend)
        self.failure: Exception | None = None

    def __call__(self, cond: Cond) -> Denoiser:
        def denoise(x: Tensor, i: Tensor) -> Denoised:
            if self.failure is None:
                inputs = {name: _plain(value) for name, value in cond.items()}  # at each call, as values may change
                try:
                    with torch.inference_mode(False), torch.no_grad():
                        x0, *variance = self._step(_plain(x), _plain(i), inputs)
                        return Denoised(x0, Spread(*variance))
                except torch._dynamo.exc.FailOnRecompileLimitHit:  # no further graph; the existing ones stay usable
                    self._warn("too many sizes of batches for one graph each; the later ones are not compiled")
                except Exception as error:
                    if self._on_failure is None:
                        raise
                    self.failure = error
                    why = compiler.reason(error)
                    self._warn(f"the step cannot be compiled as one graph ({why}); each network is compiled by itself")
                    self._on_failure(lambda: self._make(cond)(x, i).both())
            return self._make(cond)(x, i)

        return denoise

    def _warn(self, text: str) -> None:
        if not self._warned:
            _log.warning(text)
        self._warned = True


def _plain(value: Tensor) -> Tensor:
    """`value` contiguous and not an inference tensor, as other layouts or kinds would be compiled again."""
    with torch.inference_mode(False):
        return value.clone(memory_format=torch.contiguous_format) if value.is_inference() else value.contiguous()


def _with_own_code(function: Any) -> FunctionType:
    """A copy of `function` with its own code object: torch counts graphs per code object, and stops at eight."""
    code, scope = function.__code__.replace(), function.__globals__
    return FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)


Run = Callable[[], Denoised]
# Warms a function up, then records it: (its result, a function that computes the result again in the same memory).
Record = Callable[[Run], tuple[Denoised, Callable[[], None]]]

WARM_UP = 3


class _Recorded(NamedTuple):
    inputs: list[Tensor]  # x, i and the conditioning, in the memory that the graph reads
    result: Denoised
    replay: Callable[[], None]


def on_cuda(run: Run) -> tuple[Denoised, Callable[[], None]]:
    """Record `run` as a CUDA graph, after warm-up calls on a side stream, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph.replay


class Graphed:
    """Wraps `make` so that its denoisers replay one graph, recorded at the first call of every shape.

    On devices other than CUDA they run as they are. The conditioning is an input of the graph, as x and i are: one
    recording serves all batches of a size. If recording fails (an operation that cannot be recorded, too little memory),
    it warns, `failure` is set, and the denoisers of `make` run as they are from then on.
    """

    def __init__(self, make: Conditioned, *, record: Record | None = None) -> None:
        self._make, self._record = make, record
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self.failure: Exception | None = None

    def __call__(self, cond: Cond) -> Denoiser:
        plain = self._make(cond)

        def denoise(x: Tensor, i: Tensor) -> Denoised:
            if self.failure is not None or (self._record is None and not x.is_cuda):
                return plain(x, i)
            inputs = [x, i, *cond.values()]
            key = (*cond, *((value.shape, value.dtype) for value in inputs))
            if key not in self._recorded:
                try:
                    self._recorded[key] = self._record_step(x, i, cond)
                except RuntimeError as error:
                    self.failure = error
                    why = compiler.reason(error)
                    _log.warning(f"no CUDA graph could be recorded of a step ({why}); sampling goes on without")
                    return plain(x, i)
            recorded = self._recorded[key]
            for memory, value in zip(recorded.inputs, inputs):
                memory.copy_(value)
            recorded.replay()
            # A sampler may keep x0, so copy it; it uses the variance before the next replay.
            return Denoised(recorded.result.x0.clone(), recorded.result.spread)

        return denoise

    def _record_step(self, x: Tensor, i: Tensor, cond: Cond) -> _Recorded:
        static_x, static_i = x.detach().clone(), i.clone().contiguous()
        static_cond = {name: value.clone() for name, value in cond.items()}
        denoise = self._make(static_cond)

        def run() -> Denoised:
            with torch.no_grad():
                denoised = denoise(static_x, static_i)
                return Denoised(denoised.x0, Spread(*denoised.both()))

        result, replay = (self._record or on_cuda)(run)
        return _Recorded([static_x, static_i, *static_cond.values()], result, replay)
