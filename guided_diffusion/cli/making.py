"""What every command that makes images from noise shares: its flags, its networks, its receipt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import NETWORKS, ClassifierConfig, DiffusionConfig, SampleConfig, Section, flag
from . import arguments, runs

if TYPE_CHECKING:
    from ..runtime.signals import Stop
    from ..runtime.world import World
    from ..sampling.jobs import Job, LabelPlan, Request
    from ..sampling.pipeline import ClassifierGuidance
    from ..sampling.queue import Pipeline
    from ..weights.load import Loaded

# What a classifier and the model it guides must agree on.
_SHARED_PROCESS = ("noise_schedule", "diffusion_steps", "rescale_timesteps")
# Fields of the configurations that are not in the receipt as they are. All others are: a new one need not be named anywhere.
NOT_IN_RECEIPT = frozenset(
    # the content counts: its hash, and which of a file's weights were taken
    ["model_path", "classifier_path", "weights"]
    # what they led to is recorded with each network
    + ["precision", "classifier_precision", "use_fp16", "classifier_use_fp16"]
    # image i is image i
    + ["num_samples", "batch_size", "grid"]
    # the same arithmetic, rounded otherwise
    + ["compile", "cuda_graphs"]
    # the job adds them
    + ["seed", "classes", "labels"]
    # another spelling of sampler
    + ["use_ddim"]
    # of training alone
    + ["dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas"]
)
M = TypeVar("M", bound="Making")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making(SampleConfig):
    """All flags of a command that makes images; those of its networks are in `typed`, if they were given."""

    out: str = flag("", "folder for the npz, the picture and the receipt")
    device: str = "auto"
    debug: bool = False
    typed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls: type[M], parsed: arguments.Parsed) -> M:
        """The flags of a command line. ValueError for an impossible value."""
        return replace(cls.from_flags(parsed.flags), typed=parsed.typed)


def flags(
    argv: Sequence[str] | None,
    kind: type[Making],
    network: type[Section],
    *,
    program: str,
    script: bool = False,
    given: Mapping[str, Any] | None = None,
) -> arguments.Parsed:
    """The flags of a command that makes images with a network; scripts write into a folder of their own. `given` as in `parse`."""
    return arguments.parse(
        argv,
        (kind, network, DiffusionConfig, ClassifierConfig),
        program=program,
        description=kind.__doc__ or "",
        defaults={"out": runs.script_folder()} if script else {},
        groups=arguments.SAMPLING,
        given=given,
    )


def in_session(asked: Making, work: Callable[[World, Stop], object]) -> int:
    """Call `work(world, stop)` on every process; returns the exit code 0."""
    from ..runtime import signals

    with signals.Stop() as stop, runs.session({"device": asked.device, "debug": asked.debug}) as world:
        work(world, stop)
    return 0


@dataclass(frozen=True)
class Networks:
    """The model, and the guidance by a classifier if one is asked for."""

    model: Loaded
    guidance: ClassifierGuidance | None

    @property
    def classifier(self) -> Loaded | None:
        return self.guidance.classifier if self.guidance else None

    @property
    def num_classes(self) -> int:
        """Of the model, else of the classifier; 0 if neither knows any."""
        return self.model.num_classes or (self.classifier.num_classes if self.classifier else 0)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.model.class_names or (self.classifier.class_names if self.classifier else ())


def read_networks(asked: Making, kind: str, world: World) -> Networks:
    """Read the model of `kind`, and the classifier if one is asked for; ValueError if they do not fit together."""
    from ..runtime.devices import require_compiler
    from ..sampling import pipeline
    from ..weights.load import check_pair

    if asked.compile:
        require_compiler(world.device)
    model = _load(asked.model_path, kind, asked, world)
    if not (asked.classifier_path and asked.classifier_scale):
        return Networks(model, None)
    classifier = _load(asked.classifier_path, "classifier", asked, world)
    check_pair(model, classifier)
    log.info("guided by %s at scale %g", classifier.path, asked.classifier_scale)
    return Networks(model, pipeline.classifier(classifier, scale=asked.classifier_scale))


def _load(path: str, kind: str, asked: Making, world: World) -> Loaded:
    from ..weights.load import load

    typed, shared, precision = dict(asked.typed), set(DiffusionConfig.names()), asked.precision
    if kind == "classifier":
        shared = set(_SHARED_PROCESS)  # respacing and the meaning of the output are the generator's business
        typed["image_size"] = typed.get("large_size", typed.get("image_size"))
        precision = asked.classifier_precision or precision
    own = shared | set(NETWORKS[kind].names())
    given = {name: value for name, value in typed.items() if name in own and value is not None}
    options = {"precision": precision, "weights": asked.weights if kind != "classifier" else ""}
    return load(path, kind=kind, flags=given, device=world.device, **options)


def label_plan(asked: Making, networks: Networks) -> LabelPlan:
    """The classes that `--classes` names, all if it names none, dealt out as `--labels` says."""
    from ..data.classes import choose_classes
    from ..sampling.jobs import LabelPlan

    classes = choose_classes(asked.classes, networks.num_classes, networks.class_names)
    return LabelPlan(classes, asked.labels == "balanced", asked.seed)


def pipeline_of(asked: Making, networks: Networks) -> Pipeline:
    """The sampler that the flags ask for."""
    from ..sampling.pipeline import make_pipeline

    return make_pipeline(
        networks.model,
        guidance=networks.guidance,
        sampler=asked.method,
        eta=asked.eta,
        clip=asked.clip_denoised,
        compile=asked.compile,
        graphs=asked.cuda_graphs,
    )


def job_of(asked: Making, networks: Networks, request: Request, world: World, folder: str) -> tuple[Job, str]:
    """(the job of a request, how its folder was chosen); `folder` begins the folder's name if none is given."""
    from ..sampling.jobs import Job
    from ..sampling.pipeline import largest_batch

    model, classifier = networks.model, networks.classifier
    out, chosen = world.broadcast_object(runs.run_folder(asked.out, folder), name=f"folder of {folder}")
    batch_size = asked.batch_size
    if not batch_size:
        limit = max(1, -(-request.num_samples // world.size))
        found = largest_batch(model, networks.guidance, limit) if world.is_main else 0
        batch_size = world.broadcast_object(found, name="images that fit")
        if not batch_size:
            raise ValueError("not even one image fits into the memory of this device; try --precision bf16")
        log.info("--batch_size auto: %d images at a time", batch_size)
    typed = {name: value for name, value in asked.typed.items() if name not in ("out", "device", "debug", "requests")}
    job = Job(
        request,
        out,
        model.shape,
        batch_size,
        receipt=receipt_of(asked, model, classifier),
        about={"model": model.path, "classifier": classifier and classifier.path, "device": str(world.device)},
        config={**{name: getattr(asked, name) for name in SampleConfig.names()}, **typed},
        grid=asked.grid,
        class_names=networks.class_names,
    )
    return job, chosen


def make(asked: Making, networks: Networks, job: Job, chosen: str, world: World, stop: Stop) -> str:
    """Make the images of a job and return the path of their npz."""
    from ..sampling.queue import generate

    labels = job.request.labels
    what = what_is_made(asked, networks) + (f", {len(labels.classes)} classes" if labels.classes else "")
    log.info("%d %s, seed %d, into %s (%s)", job.request.num_samples, what, asked.seed, job.out, chosen)
    return generate(pipeline_of(asked, networks), job, world=world, should_stop=lambda: stop.requested)


def what_is_made(asked: Making, networks: Networks) -> str:
    """ "images of 64x64, ddim, 25 steps"."""
    _, height, width = networks.model.shape
    return f"images of {height}x{width}, {asked.method}, {len(networks.model.process)} steps"


def receipt_of(config: SampleConfig, model: Loaded, classifier: Loaded | None) -> dict[str, Any]:
    """All that images depend on besides seed and labels, made of the configurations of model, process, classifier and sampler."""
    from ..diffusion.samplers import SAMPLERS

    return {
        **_in_receipt(config, SampleConfig.names()),
        "sampler": config.method,
        "eta": config.eta if "eta" in SAMPLERS[config.method].options else None,
        "steps": len(model.process),
        "model": {**_identity(model), **_in_receipt(model.config.model)},
        "diffusion": _in_receipt(model.config.diffusion),
        # Not its own process: the time that it is given is that of the model's.
        "classifier": {**_identity(classifier), **_in_receipt(classifier.config.model)} if classifier else None,
        "classifier_scale": config.classifier_scale if classifier else 0.0,
    }


def _in_receipt(section: Section, names: Sequence[str] | None = None) -> dict[str, Any]:
    """What `to_dict` gives, so that the receipts of U-Nets stay what they were; of `names` only, if given."""
    values = section.to_dict()
    return {name: values[name] for name in names or values if name not in NOT_IN_RECEIPT}


def _identity(loaded: Loaded) -> dict[str, Any]:
    from ..runtime import storage

    # The file itself is read: what the JSON beside it says may be of what it was before.
    recorded = loaded.sha256 if storage.is_remote(loaded.path) else ""
    precision = str(getattr(loaded.net, "dtype", "torch.float32")).removeprefix("torch.")
    identity = {"sha256": recorded or storage.sha256_of(loaded.path), "step": loaded.step, "precision": precision}
    return {**identity, **({"weights": loaded.weights} if loaded.weights else {})}
