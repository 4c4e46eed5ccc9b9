"""Configuration of a sweep: a grid of samplers, numbers of steps and scales of guidance, and what its images are scored against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from .fields import Section, flag, numbers


class Setting(NamedTuple):
    """One way of sampling: a sampler's name, its number of steps, the scale of guidance."""

    sampler: str
    steps: int
    scale: float

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.sampler}-{self.steps}-scale_{self.scale:g}"


@dataclass(frozen=True)
class SweepConfig(Section):
    """Which ways of sampling are compared, and by what."""

    samplers: str = flag("ddim", "samplers, separated by commas: ddim,unipc,fast")
    steps: str = flag("25", "numbers of steps: 10,25,50")
    scales: str = flag("", "scales of the guidance: 0,0.5,1,2; empty = 0,1,2,4, or 0 where nothing guides")
    reference: str = flag("", "reference of the data set, as the evaluator takes it, for FID, precision and recall")
    inception: str = flag("", "Inception weights (default: looked for as the evaluator does)")
    allow_other_weights: bool = flag(False, "accept Inception weights other than the original ones")
    data_dir: str = flag("", "without --reference: real images, for FID-like scores in the classifier's features")

    def settings(self, guided: bool = True) -> tuple[Setting, ...]:
        """Every sampler with every number of steps at every scale, each once. guided: whether there is guidance."""
        names = tuple(word.strip() for word in self.samplers.split(",") if word.strip())
        steps, scales = numbers(self.steps, "steps"), numbers(self.scales or ("0,1,2,4" if guided else "0"), "scales")
        for name, values in (("samplers", names), ("steps", steps), ("scales", scales)):
            if not values:
                raise ValueError(
                    f"--{name} is {getattr(self, name)!r}; give at least one, or several separated by commas"
                )
        if wrong := [count for count in steps if count != int(count) or count < 1]:
            raise ValueError(f"--steps has {wrong[0]:g}; it must be whole numbers from 1 on, such as 10,25,50")
        if any(scales) and not guided:
            raise ValueError(
                f"--scales is {self.scales!r}, but nothing guides; give --classifier_path or --guidance, or --scales 0"
            )
        return tuple(dict.fromkeys(Setting(*each) for each in product(names, map(int, steps), scales)))

    def _check(self) -> None:
        self.settings()


def each_setting(
    asked: SweepConfig, flags: Mapping[str, Any], typed: Mapping[str, Any]
) -> Iterator[tuple[Setting, dict[str, Any], dict[str, Any]]]:
    """The settings of a sweep, each with all flags of its `sample` command, and those that count as typed there.

    ValueError for flags of `sample` that a sweep cannot have, or must.
    """
    for name in ("model_path", "out"):
        if not flags[name]:
            raise ValueError(f"--{name} is empty; a sweep needs it")
    for name in _INSTEAD.keys() & typed.keys():
        raise ValueError(f"--{name} is one for all images; for a sweep give --{_INSTEAD[name]}")
    guided = bool(flags["classifier_path"] or flags["guidance"])
    if asked.data_dir and not (asked.reference or flags["classifier_path"]):
        raise ValueError(
            f"--data_dir is {asked.data_dir!r}, for scores in a classifier's features: give --classifier_path; or give --reference"
        )
    shared = {name: value for name, value in typed.items() if name not in SweepConfig.names()}
    for setting in asked.settings(guided):
        own: dict[str, Any] = {"sampler": setting.sampler, "steps": setting.steps}
        if flags["classifier_path"]:
            own["classifier_scale"] = float(setting.scale)
        elif guided:
            own["guidance_scale"] = f"{setting.scale:g}"
        out = f"{flags['out'].rstrip('/')}/{setting.name}"
        yield setting, {**flags, **own, "out": out}, {**shared, **own}


# Flags of `sample` that a sweep has in another form -> that form.
_INSTEAD = dict.fromkeys(("sampler", "use_ddim"), "samplers") | dict.fromkeys(("timestep_respacing", "nodes"), "steps")
_INSTEAD |= dict.fromkeys(("classifier_scale", "guidance_scale"), "scales")
