"""What `sample`, `upsample` and `cascade` share: flags, reading of weights, jobs and their receipts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..config import NETWORKS, SWITCH, ClassifierConfig, DiffusionConfig, SampleConfig, fields, flag
from ..runtime import storage
from . import arguments, runs

if TYPE_CHECKING:
    from ..data.images import Size
    from ..data.samples import Images
    from ..diffusion.guidance import Kind
    from ..runtime.signals import Stop
    from ..runtime.world import World
    from ..sampling.chains import Chain
    from ..sampling.guiding import Guidance, Guided
    from ..sampling.jobs import Job, LabelPlan, Request
    from ..sampling.pipeline import ImagePipeline
    from ..sampling.queue import Saving
    from ..weights.load import Loaded

# Flags of the noise process in which a classifier and the model it guides must agree.
_SHARED_PROCESS = ("noise_schedule", "diffusion_steps", "rescale_timesteps")
WHERE = ("timestep_respacing", "steps", "nodes")  # flags that say where steps are
_OF_TWO = ("classifier_free", "autoguidance", "apg")  # guidances by a second network, of --guide_path
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
        made = replace(cls.from_flags(parsed.flags), typed=parsed.typed)
        where = [name for name in WHERE if parsed.typed.get(name)]
        if len(where) > 1:
            said = " and ".join(f"--{name} {parsed.typed[name]}" for name in where)
            raise ValueError(f"{said} are two ways to say where steps are; leave one of the two out")
        return made

    def require(self, **what: str) -> None:
        """ValueError for the first of these flags that is empty, saying what to give."""
        for name, needed in what.items():
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give {needed}")


@contextmanager
def session(options: Making) -> Iterator[tuple[World, Stop]]:
    """Yield the processes of a command, and the object that knows whether a signal has asked it to stop."""
    from ..runtime import signals

    arithmetic = {"tf32": options.tf32, "deterministic": options.deterministic}
    with signals.Stop() as stop, runs.session(options.device, debug=options.debug, **arithmetic) as world:
        yield world, stop


@dataclass(frozen=True)
class Setup:
    """All that a command samples with: its flags, the model with its guidances, and the chain."""

    options: Making
    world: World
    guided: Guided
    chain: Chain

    @classmethod
    def read(cls, options: Making, world: World, known: dict[str, Loaded] | None = None) -> Setup:
        """Read the weights; ValueError if networks, guidances and sampler do not fit together. known: networks read, and to be added to."""
        from ..runtime.devices import require_compiler
        from ..sampling.chains import make_chain
        from ..sampling.guiding import guided

        if options.compile == "on":
            require_compiler(world.device)
        known = {} if known is None else known
        guidances = _guidances(options, world, known)  # errors in flags come before the model is read
        model = _load(options.model_path, options.kind, options, world, known)
        clip = "none" if not options.clip_denoised else options.clip or True
        chosen = guided(model, guidances, clip=clip, sampler=options.method)
        for guide in chosen.guides:
            by = f" ({guide.network.path})" if guide.network else ""
            log.info("guided by %s%s, scale %s", guide.name, by, guide.scale)
        where: dict[str, Any] = {"steps": options.steps or None, "grid": options.grid or None}
        chain = make_chain(chosen.model.process, options.method, **where, options=options.chain_options)
        return cls(options, world, chosen, chain)

    @property
    def model(self) -> Loaded:
        return self.guided.model

    def labels(self, options: Making | None = None, where: str = "--classes") -> LabelPlan:
        """How images get classes: those of `--classes` (empty = all), assigned as `--labels` says. ValueError beginning with `where`."""
        from ..data.classes import choose_classes
        from ..sampling.jobs import LabelPlan

        options = options or self.options
        classes = choose_classes(options.classes, self.guided.num_classes, self.guided.class_names, where)
        return LabelPlan(classes, options.labels == "balanced", options.seed)

    def images(self, flag: str, size: Size, *, own: bool = False) -> tuple[Images, LabelPlan, LabelPlan]:
        """The images that a flag names, the classes of what is made of them, and their own classes.

        What is made has the classes of `--classes`, else those of the images. The images' own are read where they are needed for that,
        or `own` asks for them; elsewhere, and where images have none that the networks know, they are said to be those of what is made.
        ValueError if the networks cannot use them.
        """
        from ..data.samples import open_images
        from ..sampling.jobs import RECEIPT, LabelPlan, class_names_beside, finished_npz

        path, count = getattr(self.options, flag), self.guided.num_classes
        if not storage.exists(path):
            raise FileNotFoundError(f"--{flag} {path}: there is no such file or folder")
        chosen = self.labels() if self.options.classes or not count else None
        if not chosen and self.options.labels != "random":
            log.warning("--labels %s assigns --classes, and none are given: images keep their own", self.options.labels)
        images = None
        try:
            if storage.exists(storage.join(path, RECEIPT)):  # a folder of samples, whose picture is not meant
                path = finished_npz(path)
            labels, names = "auto" if own or not chosen else "none", class_names_beside(path)
            images = open_images(path, size, self.model.shape[0], labels=labels, class_names=names)
            labelled = images.records.labels is not None
            if not chosen and not labelled:
                raise ValueError(
                    f"{images.records.root} has no labels{' (arr_1)' * (images.records.kind == 'npz')}, and the networks need classes; "
                    f"give --classes with one or more of 0 to {count - 1}"
                )
            if chosen and not (own and count and labelled):
                return images, chosen, chosen
            fixed = LabelPlan.fixed(images.labels_for(count, self.guided.class_names, self.model.path))
        except ValueError as error:
            if chosen and images is not None:
                log.info(f"--{flag} {error}; here they are taken as of --classes {self.options.classes}")
                return images, chosen, chosen
            raise ValueError(f"--{flag} {error}") from None
        return images, chosen or fixed, fixed

    def pipeline(self) -> ImagePipeline:
        """The sampler that the flags ask for."""
        from ..sampling.pipeline import pipeline_of

        compile = not self.options.deterministic and SWITCH[self.options.compile]
        return pipeline_of(self.guided, self.chain, compile=compile, graphs=SWITCH[self.options.cuda_graphs])

    def job(self, request: Request, kind: str, **receipt: Any) -> Job:
        """The job of a request. kind: begins the folder's name where --out gives none. receipt: further entries of its receipt.

        In messages, a request with a name stands for all requests of a file, each of which has its own seed.
        """
        from ..runtime.devices import describe_products
        from ..sampling.jobs import Job
        from ..sampling.pipeline import DETERMINISTIC_BATCH, batch_that_fits
        from ..sampling.receipts import receipt_of

        options, model, world = self.options, self.model, self.world
        out, chosen = world.broadcast_object(runs.run_folder(options.out, kind), name=f"folder of {kind}")
        batch_size = DETERMINISTIC_BATCH if options.deterministic else options.batch_size
        batch_size = batch_size or batch_that_fits(self.guided, request.num_samples, world)
        (_, height, width), classes = model.shape, len(request.labels.classes)
        what = [request.name, f"{request.num_samples} images of {height}x{width}", self.chain.sampler]
        what += [f"{len(self.chain.nodes)} steps", f"{classes} classes" if classes else ""]
        what.append("" if request.name else f"seed {options.seed}")
        log.info("%s, into %s (%s)", ", ".join(filter(None, what)), out, chosen)
        # Not stored: where and how this command runs, which is not what it makes.
        elsewhere = ("out", "device", "debug", "requests")
        typed = {name: value for name, value in options.typed.items() if name not in elsewhere}
        flags = {name: getattr(options, name) for name in SampleConfig.names()}
        return Job(
            request,
            out,
            model.shape,
            batch_size,
            receipt={**receipt_of(flags, self.chain, self.guided), **receipt},
            about={
                "model": model.path,
                "guided by": [network.path for network in self.guided.networks[1:]],
                "device": str(world.device),
                "float32 products": describe_products(world.device),
            },
            config={**flags, **typed},
            grid=options.picture,
            class_names=self.guided.class_names,
        )

    def make(self, jobs: Sequence[Job], folder: str, stop: Stop) -> Saving:
        """Make the images of all jobs, in shared batches unless --deterministic."""
        from ..sampling.queue import generate_all

        pipeline = self.pipeline()
        hooks: dict[str, Any] = {"should_stop": lambda: stop.requested, "after_batch": pipeline.execution.after_batch}
        return generate_all(pipeline, jobs, folder, world=self.world, share=not self.options.deterministic, **hooks)


def _guidances(options: Making, world: World, known: dict[str, Loaded]) -> list[Guidance]:
    """The guidances that the flags ask for, in any order. ValueError for flags that no guidance has, or that contradict each other."""
    from ..diffusion.guidance import GUIDANCES, check_together, interval
    from ..sampling.guiding import Guidance

    names = [name.strip() for name in options.guidance.split(",") if name.strip()]
    if options.classifier_path and not options.guidance:
        names.append("classifier")
    if options.epsilon_scale != "1":
        names.append("epsilon_scaling")
    if options.threshold:
        names.append("threshold")
    names = list(dict.fromkeys(names))
    check_together(names)
    kinds = {name: GUIDANCES[name] for name in names}
    _require_used(options, kinds)
    more = _guidance_options(options, kinds)
    between = fields.numbers(options.guidance_interval, "guidance_interval", 2) if options.guidance_interval else ()
    scales: dict[int, Any] = {  # by stage
        2: fields.numbers(options.epsilon_scale, "epsilon_scale", 1, 2)[-1],
        3: fields.numbers(options.guidance_scale, "guidance_scale", 1)[0] if options.guidance_scale else None,
        4: options.classifier_scale,
        5: options.threshold or None,
    }
    made = []
    for name, kind in kinds.items():
        scale, network = scales[kind.stage], None
        # Of two networks for classifier_free or apg either may be the one with classes, which samples: both are read.
        if scale == kind.neutral and (kind.needs == "classifier" or name == "autoguidance"):
            log.info("guidance %s has the scale %g, which does nothing: its network is not read", name, scale)
            continue
        if between and kind.stage in (3, 4) and scale != kind.neutral:
            if scale is None:
                raise ValueError("--guidance_interval is for a scale that is given; give --guidance_scale too")
            scale = interval(scale, *between)
        if kind.needs == "classifier" and options.classifier_path:
            network = _load(options.classifier_path, "classifier", options, world, known)
        elif name in _OF_TWO and options.guide_path:
            network = _load(options.guide_path, options.kind, options, world, known)
        made.append(Guidance(name, scale, network, {n: v for n, v in more.items() if n in kind.defaults}))
    return made


def _require_used(options: Making, kinds: Mapping[str, Kind]) -> None:
    """ValueError for a flag of a guidance that is not among `kinds`."""
    stages = {kind.stage for kind in kinds.values()}
    used = {
        "classifier_path": (any(kind.needs == "classifier" for kind in kinds.values()), "classifier"),
        "guide_path": (not kinds.keys().isdisjoint(_OF_TWO), "classifier_free, or autoguidance"),
        "guidance_scale": (3 in stages, "classifier_free"),
        "guidance_interval": (bool(stages & {3, 4}), "classifier"),
    }
    for name, (is_used, remedy) in used.items():
        value = getattr(options, name)
        if value and not is_used:
            raise ValueError(f"--{name} is {value!r}, and no guidance here uses it; add --guidance {remedy}")


def _guidance_options(options: Making, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The further options of all guidances, by name. ValueError for one that none of `kinds` has."""
    from ..diffusion.guidance import GUIDANCES

    more = fields.options(options.guidance_options, "guidance_options")
    if isinstance(more.get("layers"), str):
        more["layers"] = tuple(more["layers"].split("+"))
    if options.entropy_scale:
        more["entropy"] = True
    if options.rescale:
        more["rescale"] = options.rescale
    for option in more:
        having = [name for name, kind in GUIDANCES.items() if option in kind.defaults]
        if not having:
            there = ", ".join(sorted({name for kind in GUIDANCES.values() for name in kind.defaults}))
            raise ValueError(f"--guidance_options has {option!r}, and no guidance has it; there are {there}")
        if kinds.keys().isdisjoint(having):
            flag = {"entropy": "--entropy_scale", "rescale": "--rescale"}.get(option, f"--guidance_options {option}")
            raise ValueError(f"{flag} is of guidance {' and '.join(having)}; give --guidance {having[0]}")
    *slope, _ = fields.numbers(options.epsilon_scale, "epsilon_scale", 1, 2)
    return {**more, "slope": slope[0]} if slope else more


def _load(path: str, kind: str, options: Making, world: World, known: dict[str, Loaded]) -> Loaded:
    from ..weights.load import load

    typed, names = dict(options.typed), set(DiffusionConfig.names()) | set(NETWORKS[kind].names())
    precision, weights = options.precision, options.weights
    if kind == "classifier":
        names = set(_SHARED_PROCESS) | set(NETWORKS[kind].names())  # other diffusion flags concern the generator only
        typed["image_size"] = typed.get("large_size", typed.get("image_size"))
        precision, weights = options.classifier_precision or precision, ""
    elif path == options.guide_path:  # the flags are those of the model
        typed, weights = {}, ""
    flags = {name: value for name, value in typed.items() if name in names and value is not None}
    asked: dict[str, Any] = {"kind": kind, "flags": flags, "precision": precision, "weights": weights}
    key = repr((path, asked))
    if key not in known:
        known[key] = load(path, device=world.device, **asked)
    return known[key]
