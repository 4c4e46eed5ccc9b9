"""Network, process, guidance and sampler together: noise -> images."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import to_float
from ..diffusion.grids import SIGMA_MAX, Grid
from ..diffusion.process import Process, respace
from ..diffusion.samplers import NotFinite, last
from ..diffusion.updates import Noise, fresh_noise
from ..models.layers import hooked, lay_out_convolution
from ..models.network import Network
from ..runtime import compiler
from ..runtime.devices import float32_products
from ..runtime.streams import key_of
from ..runtime.world import World
from ..weights.load import Loaded
from .chains import Chain, make_chain
from .execution import Auto, Execution
from .guiding import Guidance, Guided, guided
from .jobs import LabelPlan, Request
from .queue import answers
from .writers import class_captions, write_grid

_log = logging.getLogger(__name__)
# Base model and upsampler use one seed; without this their first noise would begin with the same numbers.
NOISE_OF_UPSAMPLERS = 256
BATCH_ON_CPU = 16  # default images per pass on a CPU, where larger batches are not faster
DETERMINISTIC_BATCH = 8  # images per pass with --deterministic: how sums are rounded depends on that number
_LARGEST_TRIED = 1024
# Among the conditions of a batch: images whose noise the chain begins with, and their classes.
INVERTED = ("inverted", "inverted_y")


def sample(
    model: Loaded,
    *,
    labels: Sequence[int] | np.ndarray | Tensor | None = None,
    num_images: int | None = None,
    guidance: Guidance | Sequence[Guidance] | None = None,
    sampler: str = "ancestral",
    steps: int | str | None = None,
    grid: str | Grid | None = None,
    seed: int = 0,
    batch_size: int = 16,
    clip: bool | str = True,
    low_res: np.ndarray | None = None,
    deterministic: bool = False,
    cuda_graphs: bool | Auto = "auto",
    **options: Any,
) -> np.ndarray:
    """Images of a model, uint8 `[N, H, W, C]`: the same as from the command `sample` (or `upsample`).

    labels      the class of each image, for models with classes and for guidance
    num_images  default: as many as labels or `low_res`; if more, these are repeated
    guidance    such as `gd.classifier(...)`, or several; `clip`: see `guided`
    sampler     a key of `SAMPLERS`; `options` are its own (order, eta, churn ...) and those of the grid (sigma_max, rho, nodes ...)
    steps       how many, placed by `grid`; or which: "ddim25", "90,60,60,20,20"; None = those of the model
    grid        a key of `GRIDS`; None = as fits the sampler
    seed        image i depends on (seed, i) only; other batch sizes change it by rounding
    low_res     the small images for an upsampler, uint8 `[N, h, w, C]`, repeated like labels

    With `deterministic` an image is the same to the bit whatever the batch size, as by --deterministic.
    `cuda_graphs`: steps as CUDA graphs on a GPU; "auto" = where batches are small and no hook looks on.

    ValueError if the model needs labels or `low_res` and they are missing, or if it does not take them.
    """
    whole = guided(model, guidance, clip=clip, sampler=sampler)
    model = whole.model
    if labels is not None and guidance is not None and not whole.labelled:  # all guidance has a scale that does nothing
        num_images, labels = num_images or len(labels), None
    needed = {"labels": whole.labelled, "low_res": "low_res" in model.inputs}
    for (name, needs), value in zip(needed.items(), (labels, low_res)):
        if needs != (value is not None):
            raise ValueError(f"{name} is {'missing: give' if needs else 'given, but this model takes no'} {name}")
    count = num_images or max(len(values) for values in (labels, low_res, ()) if values is not None)
    if not count:
        raise ValueError("num_images is missing; give it, or labels")
    classes = whole.num_classes
    plan = LabelPlan() if labels is None else LabelPlan.fixed(np.asarray(labels))
    # A function of clean images does not say how many classes it has.
    if plan.classes and not 0 <= plan.classes[0] <= plan.classes[-1] < (classes or math.inf):
        ends = sorted({plan.classes[0], plan.classes[-1]})
        raise ValueError(f"labels has {ends}; there are the classes 0 to {classes - 1}")

    def small_images(ids: Sequence[int]) -> dict[str, Tensor]:
        assert low_res is not None
        return {"low_res": to_float(torch.from_numpy(low_res[[i % len(low_res) for i in ids]]))}

    chain = make_chain(model.process, sampler, steps=steps, grid=grid, options=options)
    pipeline = pipeline_of(whole, chain, graphs=cuda_graphs)
    request = Request("", count, noise_seed(model, seed), plan, None if low_res is None else small_images)
    size = DETERMINISTIC_BATCH if deterministic else batch_size
    with float32_products(deterministic=True) if deterministic else contextlib.nullcontext():
        made = answers(pipeline, [request], shape=model.shape, batch_size=size, device=model.process.device)
        return next(made).images


def write_preview(model: Loaded, path: str, *, steps: str, seed: int = 0, count: int = 16) -> None:
    """Write `count` DDIM samples as one PNG, of evenly spread classes, named in captions; the noise depends on `seed` only.

    `steps` as in --timestep_respacing; all steps if the process has too few for it.
    """
    labels = captions = None
    if "y" in model.inputs:
        labels = np.arange(count) * max(1, model.num_classes // count) % model.num_classes
        captions = class_captions(labels, model.class_names)
    chosen: str | None = steps
    try:
        make_chain(model.process, "ddim", steps=steps)
    except ValueError:
        chosen = None
    # Without CUDA graphs: they take memory of their own beside that of training.
    options: dict[str, Any] = {"sampler": "ddim", "steps": chosen, "seed": seed, "cuda_graphs": False}
    images = sample(model, labels=labels, num_images=count, **options)
    write_grid(path, images, captions)


def noise_seed(model: Loaded, seed: int) -> int:
    """The seed of a model's noise: an upsampler must not see the noise of the base model."""
    return key_of(seed, NOISE_OF_UPSAMPLERS) if "low_res" in model.inputs else seed


def make_pipeline(
    model: Loaded,
    *,
    process: Process | None = None,
    guidance: Guidance | Sequence[Guidance] | None = None,
    sampler: str = "ancestral",
    steps: int | str | None = None,
    grid: str | Grid | None = None,
    clip: bool | str = True,
    compile: bool | Auto = False,
    graphs: bool | Auto = False,
    **options: Any,
) -> ImagePipeline:
    """(noise, source of noise, conditioning) -> images in [-1, 1].

    process  default: the model's; on the sampling device
    compile  compile network and guidance of a step as one graph, by torch.compile; "auto" = on CUDA, once it is known that it pays
    graphs   on CUDA, record them (compiled or not) as one CUDA graph; "auto" = where batches are
             small, from 20 steps on, unless networks have hooks

    The other arguments are those of `sample`. A classifier shifts the mean if the sampler is ancestral (algorithm 1 of arXiv 2105.05233),
    else the score (algorithm 2). With `compile` or `graphs`, every batch size has its own graph.
    """
    whole = guided(model, guidance, clip=clip, sampler=sampler)
    chain = make_chain(process or whole.model.process, sampler, steps=steps, grid=grid, options=options)
    return pipeline_of(whole, chain, compile=compile, graphs=graphs)


def pipeline_of(
    guided: Guided, chain: Chain, *, compile: bool | Auto = False, graphs: bool | Auto = False
) -> ImagePipeline:
    """The pipeline of a guided model and a chain; `compile` and `graphs` as in `make_pipeline`."""
    networks = guided.networks
    for each in networks:
        make_ready(each.net)
    levels = chain.levels()
    for name, count in guided.calls(levels).items():
        if not count:
            _log.warning(
                f"guidance {name} is never applied: no step of this chain has a noise level in its interval; "
                f"the levels go from {max(levels):.4g} to {min(levels):.4g}"
            )
    early = [sigma for sigma in levels if sigma > SIGMA_MAX and len(levels) > 1]
    if chain.sampler == "ddim" and guided.bound == "before" and guided.calls(early).get("classifier"):
        _log.warning(
            f"guided from sigma/alpha {max(early):.4g} on, after clipping as in 2021, DDIM ends far from images; "
            "give --clip after (in Python clip='after')"
        )
    make = guided.on(chain.process)
    if compile == "auto" and chain.process.device.type != "cuda":
        compile = False
    if graphs == "auto" and any(hooked(*each.net.modules()) for each in networks):
        graphs = False  # a hook of the user is called by each step, and a graph would leave it out
    if not all(guide.recordable for guide in guided.guides):
        compile = graphs = False
    compile_each = partial(compiler.compile_or_leave, [each.net for each in networks])
    execution = Execution(
        make if guided.varies else partial(make, guided.scales(1.0)),
        levels=guided.scales if guided.varies else None,
        process=chain.process,
        compile=compile,
        graphs=graphs,
        on_failure=compile_each,
    )
    return ImagePipeline(guided, chain, len(levels), execution)


@dataclass(frozen=True)
class ImagePipeline:
    """A `queue.Pipeline`: (noise, source of noise, conditioning) -> images in [-1, 1].

    calls      of the denoiser, for each chain
    execution  how they are executed; its `after_batch` is for `generate`
    """

    guided: Guided
    chain: Chain
    calls: int
    execution: Execution

    def __call__(self, noise: Tensor, fresh: Noise, cond: dict[str, Tensor]) -> Tensor:
        own = {name: cond[name] for name in cond if name not in INVERTED}
        try:
            if INVERTED[0] in cond:
                noise = self._noise_of(cond)
            own |= self.guided.drawn(noise, fresh)
            denoise = self.execution.denoiser(own, pixels=noise[:, 0].numel(), steps=self.calls)
            return last(self.chain.steps(denoise, noise, fresh))
        except NotFinite as error:
            raise NotFinite(error.row, f"{error}; {why_not_finite(self.guided.networks)}") from None

    def _noise_of(self, cond: dict[str, Tensor]) -> Tensor:
        """The noise that the images in `cond` come from, without guidance."""
        images, classes = (cond.get(name) for name in INVERTED)
        assert images is not None
        plain = replace(self.guided, guides=()).on(self.chain.process)
        return last(self.chain.inverse(plain((), cond if classes is None else {**cond, "y": classes}), images))


def largest_batch(guided: Guided, limit: int) -> int:
    """The largest batch, up to `limit`, of which one step fits into the device's memory, by trial on a GPU; 0 if none."""
    model = guided.model
    process, (channels, height, width) = model.process, model.shape
    if process.device.type == "cpu":
        return min(limit, BATCH_ON_CPU)
    # A level within the interval of every guidance, or there would be less to fit.
    always = replace(guided, guides=tuple(replace(g, scale=1.5) if callable(g.scale) else g for g in guided.guides))
    pipeline = pipeline_of(always, make_chain(respace(process, [len(process) - 1]), "ddim"))

    def attempt(count: int) -> None:
        noise = torch.randn(count, channels, height, width, device=process.device)
        cond = {"y": torch.zeros(count, dtype=torch.int64, device=process.device)}
        if model.small_size:
            cond["low_res"] = torch.zeros(count, channels, model.small_size, model.small_size, device=process.device)
        pipeline(noise, fresh_noise, cond)

    return largest_that_fits(attempt, min(limit, _LARGEST_TRIED))


def batch_that_fits(guided: Guided, num_samples: int, world: World) -> int:
    """`largest_batch` of `num_samples` divided among the processes, the same on all. ValueError if not even one image fits."""
    limit = max(1, -(-num_samples // world.size))
    fitting: int = world.broadcast_object(largest_batch(guided, limit) if world.is_main else 0, name="images that fit")
    if not fitting:
        raise ValueError("not even one image fits into the memory of this device; try --precision bf16")
    _log.info("--batch_size auto: %d images at a time", fitting)
    return fitting


def largest_that_fits(attempt: Callable[[int], object], limit: int) -> int:
    """The largest power of two up to `limit`, or `limit`, with which `attempt` does not run out of memory; 0 if none."""
    fitting, size = 0, 1
    while fitting < limit:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        fitting, size = size, min(2 * size, limit)
    return fitting


def why_not_finite(networks: Sequence[Loaded]) -> str:
    """For an error message: which weights are not finite or, if all are finite, what may help."""
    for each in networks:
        for name, value in each.net.state_dict().items():
            bad = int((~value.isfinite()).sum())
            if bad:
                return f"the weights {each.path} hold {bad} such values in {name}: take another file"
    remedies = ["lower the scale of the guidance"] if len(networks) > 1 else []
    wider = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32"}
    for each, flag in zip(networks, ("--precision", "--classifier_precision")):
        if (dtype := getattr(each.net, "dtype", None)) in wider:
            remedies.append(f"give {flag} {wider[dtype]}")
    return "all weights are finite" + (f": {', or '.join(remedies)}" if remedies else "")


def make_ready(net: nn.Module) -> None:
    """Store a frozen network's convolutions in its compute dtype and in their fastest layout, which saves work per call.

    Networks whose weights require gradients are left as they are: they are in training.
    """
    if not isinstance(net, Network) or any(parameter.requires_grad for parameter in net.parameters()):
        return
    net.set_compute_dtype(net.dtype, store=True)
    net.apply(lay_out_convolution)
