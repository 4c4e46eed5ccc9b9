"""Guidance: Denoiser -> Denoiser. No sampler knows it is guided. `GUIDANCES` holds every kind by name, in the order of application."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from .combining import (
    Interval,
    Scale,
    Watched,
    apg,
    check_scale,
    classifier_free,
    clipped,
    interval,
    pag,
    rescaled,
    sag,
    scale_at,
    scale_eps,
    threshold,
    watching,
)
from .denoiser import Denoiser
from .gradients import (
    GradLogProb,
    GradOfClean,
    classifier,
    classifier_mean,
    classifier_x0,
    classifier_x0_mean,
    clean_gradient,
    log_prob_gradient,
    mean_shift,
    score_shifted_eps,
)

__all__ = [
    "GUIDANCES", "GradLogProb", "GradOfClean", "Guide", "Interval", "Kind", "Scale", "Watched", "apg", "chain", "check_scale",
    "check_together", "classifier", "classifier_free", "classifier_mean", "classifier_x0", "classifier_x0_mean", "clean_gradient",
    "clipped", "interval", "log_prob_gradient", "mean_shift", "pag", "rescaled", "sag", "scale_at", "scale_eps",
    "score_shifted_eps", "threshold", "watching",
]  # fmt: skip

# (process, source, scale, **options) -> guidance; see `Kind`.
Make = Callable[..., Callable[[Denoiser], Denoiser]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of guidance.

    stage      2: each network's own prediction. 3: predictions are combined. 4: a gradient. 5: the prediction is corrected
    make       (process, source, scale, **options) -> guidance. `scale` is a number, a tensor that broadcasts to x, or a function of the
               noise level
    needs      what `source` is: "classifier" a `GradLogProb`, "clean" a `GradOfClean`, "weak" the denoiser of a second prediction,
               "watched" the prediction with an attention map (`Watched`); "" nothing
    excludes   the name of a group of which a chain takes one
    neutral    the scale at which it does nothing, and `source` is not called; None: it has no such scale
    scale      the usual scale
    options    what `make` takes besides, and the defaults
    source     the same for what makes the source: `log_prob_gradient`, `clean_gradient`, or the layers whose attention is changed
    by_size    defaults that differ for images of this size
    mean       as `make`, but shifts the mean of a step: for ancestral sampling
    state      the option that, unless it is 0, makes a denoiser depend on its last call: it cannot be recorded, and `make` takes
               `memory`, an empty dict for each chain
    """

    stage: int
    make: Make
    needs: str = ""
    excludes: str = ""
    neutral: float | None = 1.0
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    by_size: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    mean: Make | None = None
    state: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """`options` and `source`."""
        return {**self.options, **self.source}


def _with_source(function: Callable[..., Denoiser]) -> Make:
    """Of a function (denoiser, process, source, scale)."""
    return lambda process, source, scale, **options: (
        lambda denoise: function(denoise, process, source, scale, **options)
    )


def _combining(function: Callable[..., Denoiser]) -> Make:
    """Of a function (denoiser, second denoiser, scale, process)."""
    return lambda process, source, scale, **options: (
        lambda denoise: function(denoise, source, scale, process, **options)
    )


_RESCALE = {"rescale": 0.0}
GUIDANCES: dict[str, Kind] = {
    "epsilon_scaling": Kind(
        stage=2,
        make=lambda process, source, scale, **options: lambda denoise: scale_eps(denoise, process, scale, **options),
        options={"slope": 0.0},
    ),
    "sag": Kind(
        stage=3,
        make=_with_source(sag),
        needs="watched",
        excludes="perturbed",
        neutral=0.0,
        scale=0.1,
        options={"blur": 3.0, "kernel": 31},
        source={"layers": ("output_blocks.8.1",)},
        by_size={256: {"scale": 0.5, "blur": 9.0, "layers": ("output_blocks.2.1",)}},
    ),
    "pag": Kind(
        stage=3,
        make=_combining(pag),
        needs="weak",
        excludes="perturbed",
        neutral=0.0,
        scale=3.0,
        options=_RESCALE,
        source={"layers": ("middle_block.1",)},
        by_size={256: {"layers": ("input_blocks.14.1", "input_blocks.16.1", "input_blocks.17.1", "middle_block.1")}},
    ),
    "classifier_free": Kind(
        stage=3,
        make=_combining(classifier_free),
        needs="weak",
        excludes="second prediction",
        options=_RESCALE,
    ),
    "random_label": Kind(
        stage=3,
        make=_combining(classifier_free),
        needs="weak",
        excludes="second prediction",
        options=_RESCALE,
    ),
    "autoguidance": Kind(
        stage=3,
        make=_combining(classifier_free),
        needs="weak",
        excludes="second prediction",
        scale=2.0,
        options=_RESCALE,
    ),
    "apg": Kind(
        stage=3,
        make=_combining(apg),
        needs="weak",
        excludes="second prediction",
        options={"eta": 0.0, "norm": 0.0, "momentum": 0.0, **_RESCALE},
        state="momentum",
    ),
    "classifier_x0": Kind(
        stage=4,
        make=lambda process, source, scale, gamma=0.0: lambda denoise: classifier_x0(denoise, process, source, scale),
        mean=_with_source(classifier_x0_mean),
        needs="clean",
        neutral=0.0,
        options={"gamma": 0.3},
        source={"tau1": 1.0, "tau2": 0.5},
    ),
    "classifier": Kind(
        stage=4,
        make=_with_source(classifier),
        mean=_with_source(classifier_mean),
        needs="classifier",
        neutral=0.0,
        source={"entropy": False, "cap": 20.0},
    ),
    "clip": Kind(
        stage=5,
        make=lambda process, source, scale: clipped,
        excludes="correction",
        neutral=None,
    ),
    "threshold": Kind(
        stage=5,
        make=lambda process, source, scale: lambda denoise: threshold(denoise, scale),
        excludes="correction",
        neutral=None,
        scale=0.995,
    ),
}


@dataclass(frozen=True)
class Guide:
    """One guidance of a chain: `name` is its key in `GUIDANCES`, `apply` what its `make` returned, or a function of the user like it."""

    name: str
    apply: Callable[[Denoiser], Denoiser]


def chain(guides: Iterable[Guide]) -> Callable[[Denoiser], Denoiser]:
    """The guidances one after the other, in the order of `GUIDANCES`, whatever order they are given in.

    ValueError for an unknown name, or two that exclude each other. A guidance in `Guide("epsilon_scaling", ...)` sees the first network
    only: wrap a second one in it by hand.
    """
    guides = list(guides)
    check_together([guide.name for guide in guides])
    ordered = sorted(guides, key=lambda guide: list(GUIDANCES).index(guide.name))
    return lambda denoise: reduce(lambda inner, guide: guide.apply(inner), ordered, denoise)


def check_together(names: Sequence[str]) -> None:
    """ValueError unless all are names of `GUIDANCES` and no two of them exclude each other."""
    chosen: dict[str, str] = {}
    for name in names:
        if name not in GUIDANCES:
            raise ValueError(f"guidance {name!r} is not one of {', '.join(GUIDANCES)}")
        group = GUIDANCES[name].excludes
        if group and group in chosen:
            others = ", ".join(other for other, kind in GUIDANCES.items() if kind.excludes == group)
            raise ValueError(f"guidance {chosen[group]} and {name} exclude each other: give one of {others}")
        chosen[group] = name
