"""What `sample`, `upsample` and `cascade` share: flags, reading of weights, jobs and their receipts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..config import NETWORKS, SWITCH, ClassifierConfig, DiffusionConfig, SampleConfig, flag
from . import arguments, runs

if TYPE_CHECKING:
    from ..runtime.signals import Stop
    from ..runtime.world import World
    from ..sampling.jobs import Job, LabelPlan, Request
    from ..sampling.pipeline import ClassifierGuidance, ImagePipeline
    from ..sampling.queue import Saving
    from ..weights.load import Loaded

# Flags of the noise process in which a classifier and the model it guides must agree.
_SHARED_PROCESS = ("noise_schedule", "diffusion_steps", "rescale_timesteps")
M = TypeVar("M", bound="Making")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making(SampleConfig, arguments.Common):
    """The flags of a command that makes images. Those of networks and noise process are only in `typed`, if the user gave them."""

    kind: ClassVar[str] = "diffusion"  # of the network
    out: str = flag("", "folder for the npz, the picture and the receipt")
    typed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def flags(cls, argv: Sequence[str], program: str, *, script: bool = False) -> arguments.Parsed:
        """Parse a command line. script: as the scripts of 2021, which write into a new temporary folder unless told otherwise."""
        return arguments.parse(
            argv,
            (cls, NETWORKS[cls.kind], DiffusionConfig, ClassifierConfig),
            program=program,
            description=cls.__doc__ or "",
            defaults={"out": runs.script_folder()} if script else {},
            groups=arguments.SAMPLING,
        )

    @classmethod
    def of(cls: type[M], parsed: arguments.Parsed) -> M:
        """The options of a parsed command line. ValueError for an impossible value."""
        return replace(cls.from_flags(parsed.flags), typed=parsed.typed)


@contextmanager
def session(options: Making) -> Iterator[tuple[World, Stop]]:
    """Yield the processes of a command, and the object that knows whether a signal has asked it to stop."""
    from ..runtime import signals

    arithmetic = {"tf32": options.tf32, "deterministic": options.deterministic}
    with signals.Stop() as stop, runs.session(options.device, debug=options.debug, **arithmetic) as world:
        yield world, stop


@dataclass(frozen=True)
class Setup:
    """All that a command samples with: its flags, the model, and guidance by a classifier if the flags ask for it."""

    options: Making
    world: World
    model: Loaded
    guidance: ClassifierGuidance | None = None

    @classmethod
    def read(cls, options: Making, world: World, known: dict[str, Loaded] | None = None) -> Setup:
        """Read the weights; ValueError if model and classifier do not fit together. known: networks that were read, and will be."""
        from ..runtime.devices import require_compiler
        from ..sampling import pipeline
        from ..weights.load import check_pair

        if options.compile == "on":
            require_compiler(world.device)
        known = {} if known is None else known
        model = _load(options.model_path, options.kind, options, world, known)
        if not (options.classifier_path and options.classifier_scale):
            return cls(options, world, model)
        classifier = _load(options.classifier_path, "classifier", options, world, known)
        check_pair(model, classifier)
        log.info("guided by %s at scale %g", classifier.path, options.classifier_scale)
        return cls(options, world, model, pipeline.classifier(classifier, scale=options.classifier_scale))

    @property
    def classifier(self) -> Loaded | None:
        return self.guidance.classifier if self.guidance else None

    @property
    def num_classes(self) -> int:
        """The number of classes of the model, else of the classifier; 0 if neither has classes."""
        return self.model.num_classes or (self.classifier.num_classes if self.classifier else 0)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.model.class_names or (self.classifier.class_names if self.classifier else ())

    def labels(self, options: Making | None = None, where: str = "--classes") -> LabelPlan:
        """How images get classes: those of `--classes` (empty = all), assigned as `--labels` says. ValueError beginning with `where`."""
        from ..data.classes import choose_classes
        from ..sampling.jobs import LabelPlan

        options = options or self.options
        classes = choose_classes(options.classes, self.num_classes, self.class_names, where)
        return LabelPlan(classes, options.labels == "balanced", options.seed)

    def pipeline(self) -> ImagePipeline:
        """The sampler that the flags ask for."""
        from ..sampling.pipeline import make_pipeline

        return make_pipeline(
            self.model,
            guidance=self.guidance,
            sampler=self.options.method,
            eta=self.options.eta,
            clip=self.options.clip_denoised,
            compile=not self.options.deterministic and SWITCH[self.options.compile],
            graphs=SWITCH[self.options.cuda_graphs],
        )

    def job(self, request: Request, kind: str, **receipt: Any) -> Job:
        """The job of a request. kind: begins the folder's name where --out gives none. receipt: further entries of its receipt.

        In messages, a request with a name stands for all requests of a file, each of which has its own seed.
        """
        from ..runtime.devices import describe_products
        from ..sampling.jobs import Job
        from ..sampling.pipeline import DETERMINISTIC_BATCH, largest_batch
        from ..sampling.receipts import receipt_of

        options, model, classifier, world = self.options, self.model, self.classifier, self.world
        out, chosen = world.broadcast_object(runs.run_folder(options.out, kind), name=f"folder of {kind}")
        batch_size = DETERMINISTIC_BATCH if options.deterministic else options.batch_size
        if not batch_size:
            limit = max(1, -(-request.num_samples // world.size))
            fitting = largest_batch(model, self.guidance, limit) if world.is_main else 0
            batch_size = world.broadcast_object(fitting, name="images that fit")
            if not batch_size:
                raise ValueError("not even one image fits into the memory of this device; try --precision bf16")
            log.info("--batch_size auto: %d images at a time", batch_size)
        (_, height, width), classes = model.shape, len(request.labels.classes)
        what = f"{request.name}, " if request.name else ""
        what += f"{request.num_samples} images of {height}x{width}, {options.method}, {len(model.process)} steps"
        what += f", {classes} classes" if classes else ""
        what += "" if request.name else f", seed {options.seed}"
        log.info("%s, into %s (%s)", what, out, chosen)
        not_stored = ("out", "device", "debug", "requests")  # where and how this command runs, not what it makes
        typed = {name: value for name, value in options.typed.items() if name not in not_stored}
        flags = {name: getattr(options, name) for name in SampleConfig.names()}
        return Job(
            request,
            out,
            model.shape,
            batch_size,
            receipt={**receipt_of(flags, options.method, model, classifier), **receipt},
            about={
                "model": model.path,
                "classifier": classifier and classifier.path,
                "device": str(world.device),
                "float32 products": describe_products(world.device),
            },
            config={**flags, **typed},
            grid=options.grid,
            class_names=self.class_names,
        )

    def make(self, jobs: Sequence[Job], folder: str, stop: Stop) -> Saving:
        """Make the images of all jobs, in shared batches unless --deterministic."""
        from ..sampling.queue import generate_all

        pipeline = self.pipeline()
        options: dict[str, Any] = {"world": self.world, "should_stop": lambda: stop.requested}
        options |= {"after_batch": pipeline.execution.after_batch, "share": not self.options.deterministic}
        return generate_all(pipeline, jobs, folder, **options)


def _load(path: str, kind: str, options: Making, world: World, known: dict[str, Loaded]) -> Loaded:
    from ..weights.load import load

    typed, names = dict(options.typed), set(DiffusionConfig.names())
    precision, weights = options.precision, options.weights
    if kind == "classifier":
        names = set(_SHARED_PROCESS)  # the other diffusion flags, such as respacing, concern the generator only
        typed["image_size"] = typed.get("large_size", typed.get("image_size"))
        precision, weights = options.classifier_precision or precision, ""
    names |= set(NETWORKS[kind].names())
    flags = {name: value for name, value in typed.items() if name in names and value is not None}
    asked: dict[str, Any] = {"kind": kind, "flags": flags, "precision": precision, "weights": weights}
    key = repr((path, asked))
    if key not in known:
        known[key] = load(path, device=world.device, **asked)
    return known[key]
