"""`sample`: weights -> images, guided by a classifier where one is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import ClassifierConfig, DiffusionConfig, ModelConfig, SampleConfig
from . import arguments, making, requests, runs

if TYPE_CHECKING:
    from ..runtime.world import World

EXTRA: dict[str, tuple[Any, str]] = {
    "out": ("", "folder for the npz, the picture and the receipt"),
    "requests": ("", f"JSON file of many small requests, made in shared batches; fields: {', '.join(requests.FIELDS)}"),
}
_CONFIGS = (SampleConfig, ModelConfig, DiffusionConfig, ClassifierConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion sample`."""
    return run(argv, program="guided-diffusion sample")


def image_sample(argv: Sequence[str] | None = None) -> int:
    """`scripts/image_sample.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, program="image_sample.py", script=True), argv)


def classifier_sample(argv: Sequence[str] | None = None) -> int:
    """`scripts/classifier_sample.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, program="classifier_sample.py", script=True, guided=True), argv)


def flags(argv: Sequence[str] | None, *, program: str, script: bool = False) -> arguments.Parsed:
    """The flags of a sampling command."""
    defaults = {"out": runs.script_folder()} if script else {}
    return arguments.parse(
        argv, _CONFIGS, program=program, description="Make images from weights.", extra=EXTRA, defaults=defaults
    )


def run(argv: Sequence[str] | None, *, program: str, script: bool = False, guided: bool = False) -> int:
    """Sample as the flags say; returns the exit code: 0, or 85 where it was asked to stop early and start again later."""
    parsed = flags(argv, program=program, script=script)
    config = SampleConfig.from_flags(parsed.flags)
    if not config.model_path:
        raise ValueError("--model_path is empty; give the weights of a diffusion model, or the folder of a run")
    if guided and config.classifier_scale and not config.classifier_path:
        raise ValueError(
            "--classifier_path is empty; give the weights of a classifier, or --classifier_scale 0 for none"
        )
    if parsed.flags["requests"]:
        asked = requests.read(parsed.flags["requests"], parsed)
        return making.session(parsed, lambda world, stop: requests.work(asked, parsed, world, stop))

    return making.session(parsed, lambda world, stop: work(parsed, world, stop))


def work(parsed: arguments.Parsed, world: World, stop: Any) -> str:
    """Sample and return the path of the npz. Called on every process."""
    from ..sampling.generate import LabelPlan

    config = SampleConfig.from_flags(parsed.flags)
    pieces = making.prepare(parsed, config, "diffusion", world)
    classes = making.choose_classes(config.classes, pieces.num_classes, pieces.names)
    labels = LabelPlan(classes, config.labels == "balanced", config.seed)
    return making.make(parsed, config, pieces, labels, world, stop, folder="samples")
