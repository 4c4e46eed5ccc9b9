"""How work is executed: networks compiled whole or block by block; images of other batch sizes, and what `--deterministic` costs."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from .networks import formats, inputs, ready, updates
from .shapes import Shape
from .timing import Plan, Row, compare


def blocks(shape: Shape, plan: Plan) -> Iterator[Row]:
    """Seconds to compile the whole network, or each residual and attention block by itself, and the time of a pass thereafter."""
    import torch

    for dtype in formats(plan):
        passes: dict[str, Callable[[], Any]] = {}
        steps: dict[str, Callable[[], Any]] = {}
        for name, compile in WAYS.items():
            net: Any = ready(shape, "diffusion", plan.device, dtype).net
            compile(net)
            passes[name] = partial(torch.inference_mode()(net), *inputs(shape, shape.batch, plan.device))
        yield from _compiled(f"forward, {shape.name}, {dtype}, batch {shape.batch}", passes, plan)
        del net, passes
        for name, compile in WAYS.items():
            trainer, batch = updates(shape, plan.device, dtype)
            compile(trainer.net)
            steps[name] = partial(_update, trainer, batch)
        yield from _compiled(f"training step, {shape.name}, {dtype}, batch {shape.train_batch}", steps, plan)


def _blockwise(net: Any) -> None:
    from guided_diffusion.models.unet import AttentionBlock, ResBlock

    for module in net.modules():
        if isinstance(module, (AttentionBlock, ResBlock)):
            module.compile(fullgraph=True, dynamic=False)


WAYS: Mapping[str, Callable[[Any], None]] = {
    "eager": lambda net: None,
    "blocks compiled": _blockwise,
    "whole network compiled": lambda net: net.compile(fullgraph=True, dynamic=False),
}


def _update(trainer: Any, batch: Any) -> None:
    trainer.step(batch)


def _compiled(what: str, ways: Mapping[str, Callable[[], Any]], plan: Plan) -> Iterator[Row]:
    """The first call of each way, which compiles it, without what was compiled earlier; then all of them in turns."""
    import torch

    # Blocks of all shapes share one piece of code, for which torch keeps 8 graphs unless told otherwise.
    with torch._dynamo.config.patch(recompile_limit=256), _nothing_compiled_before():
        for name, call in ways.items():
            begin = time.perf_counter()
            call()
            plan.wait()
            yield Row(f"{what}: {name}, first call", time.perf_counter() - begin, "s")
        yield from compare(what, ways, plan)


@contextlib.contextmanager
def _nothing_compiled_before() -> Iterator[None]:
    """An empty cache for Inductor and Triton."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)
            os.environ.update(before)


def batches(shape: Shape, plan: Plan) -> Iterator[Row]:
    """How far images of one seed differ between batch sizes, in each arithmetic; and what `--deterministic` costs."""
    import numpy as np

    import guided_diffusion as gd
    from guided_diffusion.runtime.devices import float32_products

    count, sizes = (16, (16, 8, 4)) if plan.on_gpu else (4, (4, 1))

    def sampling(dtype: str) -> Callable[..., Any]:
        model, classifier = (ready(shape, kind, plan.device, dtype) for kind in ("diffusion", "classifier"))
        options: dict[str, Any] = {
            "guidance": gd.classifier(classifier),
            "sampler": "ddim",
            "steps": f"ddim{plan.steps}",
        }
        return partial(gd.sample, model, labels=list(range(count)), **options)

    ways = {"float32, TF32": ("float32", True), "float32": ("float32", False), "bfloat16": ("bfloat16", True)}
    for name, (dtype, tf32) in ways.items():
        sample, what = sampling(dtype), f"guided DDIM, {plan.steps} steps, {shape.name}, {name}"
        with float32_products(tf32=tf32):
            for more in ("", ", deterministic"):
                first, *others = (sample(batch_size=size, deterministic=bool(more)).astype(int) for size in sizes)
                apart = np.abs(np.stack(others) - first)
                note = f"batches of {', '.join(map(str, sizes))}; mean {apart.mean():.2g}; {(apart > 0).mean():.2%} of the values differ"
                yield Row(f"{what}{more}: largest difference", float(apart.max()), "of 255", note=note)
            both = {name: partial(sample, batch_size=count, deterministic=bool(name)) for name in ("", "deterministic")}
            yield from compare(f"{what}, {count} images", both, plan)
