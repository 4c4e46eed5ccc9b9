"""What every command that makes images from noise shares: its networks, its sampler, what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import NETWORKS, ClassifierConfig, DiffusionConfig, SampleConfig, Section
from . import arguments, runs

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime.world import World
    from ..sampling.generate import Job, LabelPlan
    from ..sampling.pipeline import Sample
    from ..weights.load import Loaded

# A batch of large images can take longer than the usual patience of a process for the others.
PATIENCE_S = 3600.0
# What a classifier and the model it guides must agree on.
_SHARED_PROCESS = ("noise_schedule", "diffusion_steps", "rescale_timesteps")
# Fields of the configurations that are not in the receipt as they are. All others are: a new one need not be named anywhere.
NOT_IN_RECEIPT = frozenset(
    # the content counts: its hash, and which of a file's weights were taken
    ["model_path", "classifier_path", "weights"]
    # what they led to stands with each network
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
Work = Callable[["World", Any], Any]
Tell = Callable[[str], None]


def session(parsed: arguments.Parsed, work: Work) -> int:
    """Call `work(world, stop)`; returns the exit code: 0, or 85 where it was asked to stop early and start again later."""
    from ..runtime import signals
    from ..runtime.log import mute_unheard
    from ..sampling.generate import Interrupted

    with signals.Stop() as stop, runs.session(parsed.flags, timeout_s=PATIENCE_S) as here:
        try:
            work(here, stop)
        except Interrupted as told:
            mute_unheard()
            if here.is_main:
                print(f"stopped on request: {told}")
            return runs.REQUEUE
    return 0


def teller(world: World) -> Tell:
    """print on the main process, nothing on the others."""
    return print if world.is_main else _silent


def _silent(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Pieces:
    """Networks and how they are used.

    num_classes  of the model, else of the classifier; 0 where neither knows any
    receipt      all that the images depend on, besides seed and labels
    """

    model: Loaded
    critic: Loaded | None
    sample: Sample
    names: tuple[str, ...]
    num_classes: int
    receipt: dict[str, Any]


def prepare(parsed: arguments.Parsed, config: SampleConfig, kind: str, world: World) -> Pieces:
    """Read the model of `kind`, and the classifier where one is asked for; ValueError where they do not fit together."""
    from ..config import classes_of
    from ..runtime.devices import require_compiler
    from ..sampling.pipeline import build_sample
    from ..weights.load import check_pair

    tell = teller(world)
    if config.compile:
        require_compiler(world.device)
    model = _load(config.model_path, kind, parsed, config, world)
    critic = None
    if config.classifier_path and config.classifier_scale:
        critic = _load(config.classifier_path, "classifier", parsed, config, world)
        check_pair(model, critic)
        tell(f"guided by {critic.path} at scale {config.classifier_scale:g}")
    sample = build_sample(
        model,
        model.process,
        critic=critic,
        scale=config.classifier_scale,
        method=config.method,
        eta=config.eta,
        clip=config.clip_denoised,
        compile=config.compile,
        graphs=config.cuda_graphs,
    )
    classes = classes_of(model.config.model) or (classes_of(critic.config.model) if critic else 0)
    return Pieces(
        model,
        critic,
        sample,
        model.class_names or (critic.class_names if critic else ()),
        classes,
        receipt_of(config, model, critic),
    )


def receipt_of(config: SampleConfig, model: Loaded, critic: Loaded | None) -> dict[str, Any]:
    """All that images depend on besides seed and labels, made of the configurations of model, process, classifier and sampler."""
    return {
        **_telling(config),
        "sampler": config.method,
        "eta": config.eta if config.method == "ddim" else None,
        "steps": len(model.process),
        "model": {**_identity(model), **_telling(model.config.model)},
        "diffusion": _telling(model.config.diffusion),
        # Its own process plays no part: the generator's tells it the time.
        "classifier": {**_identity(critic), **_telling(critic.config.model)} if critic else None,
        "classifier_scale": config.classifier_scale if critic else 0.0,
    }


def _telling(section: Section) -> dict[str, Any]:
    return {name: value for name, value in section.to_dict().items() if name not in NOT_IN_RECEIPT}


def make(
    parsed: arguments.Parsed,
    config: SampleConfig,
    pieces: Pieces,
    labels: LabelPlan,
    world: World,
    stop: Any,
    *,
    folder: str,
    seed: int | None = None,
    conditions: Callable[[Sequence[int]], dict[str, Tensor]] | None = None,
    depends: Mapping[str, Any] | None = None,
) -> str:
    """Make the images into a folder and return the path of their npz.

    `folder` begins the folder's name where none is given; `seed` replaces the config's; `conditions` are further inputs of
    the network by image number, `depends` what those depend on.
    """
    from ..sampling import generate as g

    tell = teller(world)
    job, chosen = job_of(parsed, config, pieces, world, folder)
    job = replace(job, seed=config.seed if seed is None else seed, labels=labels, conditions=conditions)
    job = replace(job, receipt={**job.receipt, **(depends or {})})
    what = what_is_made(config, pieces)
    what += f", {len(labels.classes)} classes" if labels.classes else ""
    tell(f"{config.num_samples} {what}, seed {config.seed}, into {job.out} ({chosen})")
    return g.generate(pieces.sample, job, world=world, tell=tell, should_stop=lambda: stop.requested)


def what_is_made(config: SampleConfig, pieces: Pieces) -> str:
    """ "images of 64x64, ddim, 25 steps"."""
    height, width = pieces.model.config.model.size
    return f"images of {height}x{width}, {config.method}, {len(pieces.model.process)} steps"


def job_of(
    parsed: arguments.Parsed, config: SampleConfig, pieces: Pieces, world: World, folder: str
) -> tuple[Job, str]:
    """(a job of the config's number of images, without seed and labels; how its folder was chosen)."""
    from ..data.images import to_uint8
    from ..sampling.generate import Job

    model, critic = pieces.model, pieces.critic
    out, chosen = world.broadcast_object(runs.run_folder(parsed.flags["out"], folder), name=f"folder of {folder}")
    typed = {name: value for name, value in parsed.typed.items() if name not in ("out", "device", "debug", "requests")}
    job = Job(
        out=out,
        num_samples=config.num_samples,
        shape=(model.config.model.image_channels, *model.config.model.size),
        batch_size=config.batch_size or _batch_that_fits(config, pieces, world),
        to_uint8=to_uint8,
        receipt=pieces.receipt,
        about={"model": model.path, "classifier": critic.path if critic else None, "device": str(world.device)},
        grid=config.grid,
        class_names=pieces.names,
        config={**SampleConfig.from_flags(parsed.flags).to_dict(), **typed},
    )
    return job, chosen


_ON_CPU = 16  # images per pass where nobody says and memory is no question: more bring no speed there
_LARGEST_TRIED = 1024


def _batch_that_fits(config: SampleConfig, pieces: Pieces, world: World) -> int:
    """How many images at a time fit into the main process's device, found by one step of each size; all use the same."""
    import torch

    from ..diffusion.process import respace
    from ..runtime.fitting import largest_that_fits
    from ..sampling.pipeline import build_sample

    limit = max(1, -(-config.num_samples // world.size))
    if world.device.type == "cpu":
        return min(limit, _ON_CPU)
    model = pieces.model
    one = respace(model.process, [len(model.process) - 1])
    sample = build_sample(model, one, critic=pieces.critic, scale=config.classifier_scale)
    small = getattr(model.config.model, "small_size", 0)

    def attempt(count: int) -> None:
        noise = torch.randn(count, model.config.model.image_channels, *model.config.model.size, device=world.device)
        cond = {"y": torch.zeros(count, dtype=torch.int64, device=world.device)}
        if small:
            cond["low_res"] = torch.zeros(count, noise.shape[1], small, small, device=world.device)
        sample(noise, torch.randn_like, cond)

    found = largest_that_fits(attempt, min(limit, _LARGEST_TRIED)) if world.is_main else None
    size = world.broadcast_object(found, name="images that fit")
    if not size:
        raise ValueError("not even one image fits into the memory of this device; try --precision bf16")
    teller(world)(f"--batch_size auto: {size} images at a time fit")
    return int(size)


def _load(path: str, kind: str, parsed: arguments.Parsed, config: SampleConfig, world: World) -> Loaded:
    from ..weights.load import load

    own = set((ClassifierConfig if kind == "classifier" else NETWORKS[kind]).names())
    shared = set(DiffusionConfig.names())
    if kind == "classifier":  # respacing and the meaning of the output are the generator's business
        shared &= set(_SHARED_PROCESS)
    typed = {name: value for name, value in parsed.typed.items() if name in own | shared}
    if kind == "classifier" and "large_size" in parsed.typed:
        typed["image_size"] = parsed.typed["large_size"]
    precision = config.precision
    if kind == "classifier":
        precision = config.classifier_precision or precision
    weights = config.weights if kind != "classifier" else ""
    return load(path, kind=kind, flags=typed, device=world.device, precision=precision, weights=weights)


def _identity(loaded: Loaded) -> dict[str, Any]:
    from ..runtime import storage

    # The file itself is read: what stands beside it may tell of what it was before.
    recorded = loaded.sha256 if storage.is_remote(loaded.path) else ""
    precision = str(getattr(loaded.net, "dtype", "torch.float32")).removeprefix("torch.")
    identity = {"sha256": recorded or storage.sha256_of(loaded.path), "step": loaded.step, "precision": precision}
    return {**identity, **({"weights": loaded.weights} if loaded.weights else {})}


def choose_classes(text: str, count: int, names: Sequence[str], where: str = "--classes") -> tuple[int, ...]:
    """ "3,7" or "cat,dog" -> class numbers; "" -> all `count` of them. ValueError for those that do not exist, naming `where`.

    A name counts before a number.
    """
    from ..data.classes import number_of

    if not text:
        return tuple(range(count))
    if not count:
        raise ValueError(f"{where} is {text!r}, but this model knows no classes and there is no classifier")
    chosen = []
    for word in (part.strip() for part in text.split(",")):
        number = number_of(word, names, count)
        if number is None:
            known = f" or names such as {', '.join(names[:5])}" if names else ""
            raise ValueError(f"{where} has {word!r}; there are the numbers 0 to {count - 1}{known}")
        chosen.append(number)
    return tuple(chosen)
