"""Guidance of loaded models: which guidances, with which networks, and the denoiser of a batch that they make."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser, make_denoiser
from ..diffusion.grids import with_levels_of
from ..diffusion.guidance import (
    GUIDANCES,
    Guide,
    Interval,
    Scale,
    chain,
    check_scale,
    check_together,
    clean_gradient,
    clipped,
    log_prob_gradient,
    scale_at,
    scale_eps,
    watching,
)
from ..diffusion.process import Process
from ..diffusion.updates import Noise
from ..models.attention import perturbed, watched
from ..weights.load import Loaded, check_pair
from .execution import Cond, Scales

_log = logging.getLogger(__name__)
BOUNDS = ("before", "after", "none")
# Sampler -> guidances before which x0 is clipped unless told otherwise, as published. In large steps that can throw x0 far out.
_CLIPPED_BEFORE = {"ancestral": ("classifier", "classifier_x0"), "ddim": ("classifier",)}
_RANDOM_LABELS, _MEMORY = "y_random", "memory"  # names among the conditions of a batch
_ALLOWED: dict[type, tuple[type, ...]] = {
    float: (float, int),
    tuple: (tuple, list),
}  # for an option whose usual value is of a type


@dataclass(frozen=True)
class Guidance:
    """One guidance of a model.

    name     a key of `GUIDANCES`
    scale    its strength: a number, or a function of the noise level sigma/alpha such as `gd.interval(2.0, 0.3, 5.0)`;
             None: the usual one
    network  the second network; for classifier_x0, any function of clean images `[B, C, H, W]` in [-1, 1] that returns logits
    options  its further options; the others have the usual values for the size of the images
    """

    name: str
    scale: Scale | None = None
    network: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_together([self.name])
        known = GUIDANCES[self.name].defaults
        if unknown := sorted(set(self.options) - set(known)):
            raise ValueError(f"guidance {self.name} has no option {unknown[0]}; it has {', '.join(known) or 'none'}")
        for option, value in self.options.items():
            allowed = _ALLOWED.get(type(known[option]), (type(known[option]),))
            if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(known[option], bool):
                raise ValueError(
                    f"guidance {self.name}: {option} is {value!r}; it must be a value such as {known[option]!r}"
                )
        if self.scale is not None:
            check_scale(self.scale)

    def for_size(self, size: int) -> Guidance:
        """The same with every value set."""
        kind = GUIDANCES[self.name]
        usual = {"scale": kind.scale, **kind.defaults, **kind.by_size.get(size, {})}
        scale = usual.pop("scale")
        if self.scale is None and scale == kind.neutral:
            raise ValueError(
                f"guidance {self.name} has no usual scale; give --guidance_scale 2, say (in Python scale=)"
            )
        return replace(self, scale=scale if self.scale is None else self.scale, options={**usual, **self.options})

    @property
    def neutral(self) -> bool:
        """Whether it does nothing at any noise level."""
        kind = GUIDANCES[self.name]
        none = kind.neutral is not None and not callable(self.scale) and bool(self.scale == kind.neutral)
        return none and not self.options.get("slope")

    @property
    def recordable(self) -> bool:
        """Whether its steps can be recorded or compiled: they depend on their inputs and on few scales only."""
        state = GUIDANCES[self.name].state
        return (isinstance(self.scale, Interval) or not callable(self.scale)) and not (state and self.options[state])


def classifier(classifier: Loaded, *, scale: Scale = 1.0, **options: Any) -> Guidance:
    """Guidance for `sample`: towards the class of each image, as `classifier` sees it. `scale` 0 = none, below 0 = away from it."""
    return Guidance("classifier", scale, classifier, options)


def threshold(quantile: float = 0.995) -> Guidance:
    """Guidance for `sample`: dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487)."""
    return Guidance("threshold", quantile)


@dataclass(frozen=True)
class Guided:
    """A model and its guidances, in their order of application.

    bound  "before": each network's x0 is clipped to [-1, 1], then guided (2021); "after": guided, then clipped; "none"
    mean   gradients shift the mean of a step (algorithm 1 of arXiv 2105.05233), not the score (algorithm 2)
    """

    model: Loaded
    guides: tuple[Guidance, ...] = ()
    bound: str = "before"
    mean: bool = False

    @property
    def networks(self) -> list[Loaded]:
        """The model, and all other networks that take part."""
        return [self.model, *(guide.network for guide in self.guides if isinstance(guide.network, Loaded))]

    @property
    def classifier(self) -> Loaded | None:
        """The classifier that takes part, if any."""
        return next((guide.network for guide in self.guides if GUIDANCES[guide.name].needs == "classifier"), None)

    @property
    def num_classes(self) -> int:
        """The number of classes of the model, else of the classifier; 0 if neither has classes."""
        return self.model.num_classes or (self.classifier.num_classes if self.classifier else 0)

    @property
    def labelled(self) -> bool:
        """Whether images need labels, for the model or for its guidance."""
        guided = any(GUIDANCES[guide.name].needs in ("classifier", "clean") for guide in self.guides)
        return guided or "y" in self.model.inputs

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of those classes."""
        return self.model.class_names or (self.classifier.class_names if self.classifier else ())

    @property
    def varies(self) -> bool:
        """Whether the scales depend on the noise level."""
        return any(callable(guide.scale) for guide in self.guides)

    def scales(self, sigma: float) -> Scales:
        """The scale of each guidance at a noise level sigma/alpha."""
        return tuple(self._scale(guide, sigma) for guide in self.guides)

    @staticmethod
    def _scale(guide: Guidance, sigma: float) -> float:
        assert guide.scale is not None
        neutral = GUIDANCES[guide.name].neutral
        return float(scale_at(guide.scale, sigma, 1.0 if neutral is None else neutral))

    def calls(self, levels: Sequence[float]) -> dict[str, int]:
        """How often each guidance acts in a chain of evaluations at these levels, beside the calls of the model."""
        counts = {"model": len(levels)}
        for guide in self.guides:
            if GUIDANCES[guide.name].needs:
                neutral = GUIDANCES[guide.name].neutral
                counts[guide.name] = sum(self._scale(guide, sigma) != neutral for sigma in levels)
        return counts

    def describe(self, identity: Callable[[Loaded], Any]) -> dict[str, Any]:
        """For receipts; `identity` describes a network."""
        listed = [
            {
                "name": guide.name,
                "scale": repr(guide.scale) if callable(guide.scale) else guide.scale,
                **guide.options,
                **({"network": identity(guide.network)} if isinstance(guide.network, Loaded) else {}),
            }
            for guide in self.guides
        ]
        return {"clip": self.bound, "guidance": listed}

    def drawn(self, noise: Tensor, fresh: Noise) -> dict[str, Any]:
        """Further conditions of a batch with the first noise `noise`: the random labels, each from its image's own stream, and an empty
        memory for guidance with momentum."""
        drawn: dict[str, Any] = {} if all(guide.recordable for guide in self.guides) else {_MEMORY: {}}
        if any(guide.name == "random_label" for guide in self.guides):
            share = torch.special.ndtr(fresh(noise.new_empty(len(noise), 1), -1)[:, 0])
            drawn[_RANDOM_LABELS] = (share * self.model.num_classes).long().clamp(max=self.model.num_classes - 1)
        return drawn

    def on(self, process: Process) -> Callable[[Scales, Cond], Denoiser]:
        """(scales, conditions of a batch) -> its denoiser, whose positions are those of `process`."""
        processes = {
            id(network): process if network is self.model else with_levels_of(process, network.process)
            for network in self.networks
        }
        return partial(self._denoiser, processes, [self._other_attention(guide) for guide in self.guides])

    def _other_attention(self, guide: Guidance) -> Any:
        """The model's network with the attention that a guidance looks at or changes."""
        layers = guide.options.get("layers")
        if layers is None:
            return None
        if GUIDANCES[guide.name].needs == "watched" and len(layers) != 1:
            raise ValueError(f"guidance {guide.name} looks at one layer; layers is {layers!r}")
        return (
            watched(self.model.net, *layers)
            if GUIDANCES[guide.name].needs == "watched"
            else perturbed(self.model.net, layers)
        )

    def _denoiser(
        self, processes: Mapping[int, Process], others: Sequence[Any], scales: Scales, cond: Cond
    ) -> Denoiser:
        process = processes[id(self.model)]
        reading = partial(self._read, processes, scales, cond)
        denoise = reading(self.model)
        guides = []
        for guide, scale, other in zip(self.guides, scales, others):
            kind = GUIDANCES[guide.name]
            if kind.stage > 2 and scale != kind.neutral:
                source = self._source(guide, other, cond, reading)
                make = kind.mean if self.mean and kind.mean else kind.make
                options = {name: guide.options[name] for name in kind.options}
                # One for the chain: where scales vary, denoisers of several scales follow each other in it.
                options |= {"memory": cond.get(_MEMORY)} if kind.state else {}
                guides.append(Guide(guide.name, make(process, source, scale, **options)))
        denoise = chain(guides)(denoise)
        corrected = any(GUIDANCES[guide.name].stage == 5 for guide in self.guides)
        return clipped(denoise) if self.bound == "after" and not corrected else denoise

    def _read(
        self,
        processes: Mapping[int, Process],
        scales: Scales,
        cond: Cond,
        network: Loaded,
        *,
        net: Any = None,
        labels: Tensor | None = None,
    ) -> Denoiser:
        """A network's own prediction. net: called instead of it; labels: instead of those of the batch."""
        process = processes[id(network)]
        inputs = {name: cond[name] for name in network.inputs}
        if labels is not None:
            inputs["y"] = labels
        early = [(guide, scale) for guide, scale in zip(self.guides, scales) if GUIDANCES[guide.name].stage == 2]
        clip = self.bound == "before"
        denoise = make_denoiser(net or network.net, process, inputs, clip=clip and not early, **network.reading)
        for guide, scale in early:
            denoise = scale_eps(denoise, process, scale, **guide.options)
        return clipped(denoise) if clip and early else denoise

    def _source(self, guide: Guidance, other: Any, cond: Cond, read: Callable[..., Denoiser]) -> Any:
        """What a guidance draws on: a gradient or a second prediction. other: the network with other attention."""
        kind = GUIDANCES[guide.name]
        options = {name: guide.options[name] for name in kind.source}
        if kind.needs == "classifier":
            return log_prob_gradient(guide.network.net, cond["y"], **options)
        if kind.needs == "clean":
            return clean_gradient(guide.network, cond["y"], **options)
        if kind.needs == "watched":
            return watching(lambda net: read(self.model, net=net), other)
        if kind.needs != "weak":
            return None
        if other is not None:
            return read(self.model, net=other)
        if guide.name == "random_label":
            return read(self.model, labels=cond[_RANDOM_LABELS])
        if guide.network is not None:
            return read(guide.network)
        null = self.model.null_label
        assert null is not None  # checked in `_check`
        return read(self.model, labels=torch.full_like(cond["y"], null))


def guided(
    model: Loaded,
    guidance: Guidance | Sequence[Guidance] | None = None,
    *,
    clip: bool | str = True,
    sampler: str = "ancestral",
) -> Guided:
    """The model with its guidances for a sampler, those left out that do nothing. ValueError where they do not go together.

    clip  one of `BOUNDS`; True: "before" where nothing but what `_CLIPPED_BEFORE` names guides, else "after"; False: "none"
    """
    given = [guidance] if isinstance(guidance, Guidance) else list(guidance or ())
    check_together([guide.name for guide in given])
    model, given = _conditional_first(model, given)
    order = list(GUIDANCES)
    guides = sorted((guide.for_size(model.shape[1]) for guide in given), key=lambda guide: order.index(guide.name))
    for guide in guides:
        _check(model, guide)
        if guide.neutral:
            _log.info("guidance %s has the scale %g, which does nothing", guide.name, guide.scale)
    guides = [guide for guide in guides if not guide.neutral]
    if isinstance(clip, str) and clip not in BOUNDS:
        raise ValueError(f"clip is {clip!r}; it must be one of {', '.join(BOUNDS)}")
    stages = {GUIDANCES[guide.name].stage for guide in guides}
    early = _CLIPPED_BEFORE.get(sampler, ())
    late = any(GUIDANCES[guide.name].stage > 2 and guide.name not in early for guide in guides)
    bound = clip if isinstance(clip, str) else "none" if not clip else "after" if late else "before"
    if 5 in stages and bound != "after":
        raise ValueError(
            f"clip {bound!r} and guidance {guides[-1].name}, which corrects x0 at the end, exclude each other; leave one of them out"
        )
    return Guided(model, tuple(guides), bound, mean=sampler == "ancestral")


def _conditional_first(model: Loaded, guides: list[Guidance]) -> tuple[Loaded, list[Guidance]]:
    """Model and second network exchanged where only the second has classes: the class-conditional one is guided."""
    for k, guide in enumerate(guides):
        second = guide.network
        if guide.name in ("classifier_free", "apg") and isinstance(second, Loaded):
            if bool(model.num_classes) == bool(second.num_classes):
                which = "are class-conditional" if model.num_classes else "are unconditional"
                raise ValueError(
                    f"guidance {guide.name}: {model.path} and {second.path} both {which}; give one of each"
                )
            if second.num_classes:
                return second, [*guides[:k], replace(guide, network=model), *guides[k + 1 :]]
    return model, guides


def _check(model: Loaded, guide: Guidance) -> None:
    """ValueError where a guidance lacks a network, or model and network do not go together."""
    kind, name = GUIDANCES[guide.name], f"guidance {guide.name}"
    if kind.needs == "clean" and not callable(guide.network):
        raise ValueError(f"{name} needs a function of clean images, which only a program can give: network= in Python")
    if kind.needs == "classifier" and guide.network is None:
        raise ValueError(f"{name} needs a classifier; give --classifier_path (in Python network=)")
    if kind.needs != "clean" and not isinstance(guide.network, Loaded | None):
        raise ValueError(f"{name}: its network is a {type(guide.network).__name__}; give a loaded one, as from gd.load")
    if kind.needs == "classifier":
        check_pair(model, guide.network)
    if kind.needs != "weak" or "layers" in kind.source:
        return
    if guide.network is None:
        if guide.name == "autoguidance":
            raise ValueError(f"{name} needs a weaker network; give --guide_path (in Python network=)")
        if not model.num_classes:
            raise ValueError(f"{name}: {model.path} is unconditional; give --guide_path to a class-conditional file")
        if guide.name != "random_label" and model.null_label is None:
            raise ValueError(
                f"{name}: {model.path} has no label for no class; give --guide_path to an unconditional file, train with "
                "--class_dropout 0.1, or take --guidance random_label"
            )
        return
    ours, theirs = model.config.model, guide.network.config.model
    pairs = {
        "image size": (ours.size, theirs.size),
        "image channels": (ours.image_channels, theirs.image_channels),
        "small size": (model.small_size, guide.network.small_size),
    }
    if guide.network.num_classes:
        pairs["number of classes"] = (model.num_classes, guide.network.num_classes)
    if wrong := [f"{what} {a} and {b}" for what, (a, b) in pairs.items() if a != b]:
        raise ValueError(f"{name}: {model.path} and {guide.network.path} differ in {'; '.join(wrong)}")
