"""`sample`: weights -> images, guided by a classifier where one is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..config import ClassifierConfig, DiffusionConfig, ModelConfig, SampleConfig
from . import arguments, runs

if TYPE_CHECKING:
    from ..build import Loaded
    from ..runtime.world import World

EXTRA: dict[str, tuple[Any, str]] = {"out": ("", "folder for the npz, the picture and the receipt")}
_CONFIGS = (SampleConfig, ModelConfig, DiffusionConfig, ClassifierConfig)
# A batch of large images can take longer than the usual patience of a process for the others.
_PATIENCE_S = 3600.0


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

    from ..runtime import signals
    from ..sampling.generate import Interrupted

    with runs.session(parsed.flags, timeout_s=_PATIENCE_S) as here, signals.Stop() as stop:
        try:
            return _run(parsed, config, here, stop)
        except Interrupted as told:
            if here.is_main:
                print(f"stopped on request: {told}")
            return runs.REQUEUE


def _run(parsed: arguments.Parsed, config: SampleConfig, world: World, stop: Any) -> int:
    from .. import build
    from ..data.images import to_uint8
    from ..sampling import generate as g

    tell = print if world.is_main else _silent
    model = _load(config.model_path, "diffusion", parsed, config, world, tell)
    if model.kind != "diffusion":
        raise ValueError(f"--model_path {model.path} is a {model.kind} model; this command needs a diffusion model")
    critic = None
    if config.classifier_path and config.classifier_scale:
        critic = _load(config.classifier_path, "classifier", parsed, config, world, tell)
        if critic.kind != "classifier":
            raise ValueError(f"--classifier_path {critic.path} is a {critic.kind} model, not a classifier")
        build.check_pair(model, critic)
        tell(f"guided by {critic.path} at scale {config.classifier_scale:g}")
    names = model.class_names or (critic.class_names if critic else ())
    count = _classes(model) if getattr(model.config.model, "class_cond", False) else _classes(critic) if critic else 0
    folder, chosen = world.broadcast_object(runs.run_folder(parsed.flags["out"], "samples"), name="folder of samples")
    method = config.method
    sampled = build.build_sample(
        model,
        model.process,
        critic=critic,
        scale=config.classifier_scale,
        method=method,
        eta=config.eta,
        clip=config.clip_denoised,
    )
    shape = (model.config.model.image_channels, *model.config.model.size)
    classes = choose_classes(config.classes, count, names)
    receipt = {
        "model": _identity(model),
        "classifier": _identity(critic) if critic else None,
        "classifier_scale": config.classifier_scale if critic else 0.0,
        "sampler": method,
        "eta": config.eta if method == "ddim" else None,
        "steps": len(model.process),
        "timestep_respacing": model.config.diffusion.timestep_respacing,
        "clip_denoised": config.clip_denoised,
        "precision": config.precision,
    }
    job = g.Job(
        out=folder,
        num_samples=config.num_samples,
        shape=shape,
        batch_size=config.batch_size,
        to_uint8=to_uint8,
        seed=config.seed,
        labels=g.LabelPlan(classes, config.labels == "balanced", config.seed),
        receipt=receipt,
        about={"model": model.path, "classifier": critic.path if critic else None, "device": str(world.device)},
        grid=config.grid,
        class_names=names,
    )
    what = f"{method}, {len(model.process)} steps" + (f", {len(classes)} classes" if classes else "")
    tell(f"{config.num_samples} images of {shape[1]}x{shape[2]}, {what}, seed {config.seed}, into {folder} ({chosen})")
    if world.is_main:
        runs.write_config(folder, parsed, {f.name: getattr(config, f.name) for f in fields(config)})
    g.generate(sampled, job, world=world, tell=tell, should_stop=lambda: stop.requested)
    return 0


def _silent(*_: object) -> None:
    return None


def _load(path: str, kind: str, parsed: arguments.Parsed, config: SampleConfig, world: World, tell: Any) -> Loaded:
    from .. import build

    own = (ModelConfig if kind == "diffusion" else ClassifierConfig).__dataclass_fields__
    shared = set(DiffusionConfig.__dataclass_fields__)
    typed = {name: value for name, value in parsed.typed.items() if name in own or name in shared}
    if kind == "classifier":
        # Respacing and the meaning of the output are the generator's business.
        typed = {name: value for name, value in typed.items() if name not in shared or name in _SHARED_PROCESS}
    return build.load(path, kind=kind, flags=typed, device=world.device, precision=config.precision, tell=tell)


# What a classifier and the model it guides must agree on.
_SHARED_PROCESS = ("noise_schedule", "diffusion_steps", "rescale_timesteps")


def _classes(loaded: Loaded) -> int:
    return int(loaded.config.model.num_classes)


def _identity(loaded: Loaded) -> dict[str, Any]:
    from ..runtime import storage

    return {"sha256": loaded.sha256 or storage.sha256_of(loaded.path), "step": loaded.step}


def choose_classes(text: str, count: int, names: Sequence[str]) -> tuple[int, ...]:
    """ "3,7" or "cat,dog" -> class numbers; "" -> all `count` of them. ValueError for those that do not exist."""
    if not text:
        return tuple(range(count))
    if not count:
        raise ValueError(f"--classes is {text!r}, but this model knows no classes and there is no classifier")
    chosen = []
    for word in (part.strip() for part in text.split(",")):
        if word in names:
            chosen.append(names.index(word))
        elif word.isdigit() and int(word) < count:
            chosen.append(int(word))
        else:
            known = f" or names such as {', '.join(names[:5])}" if names else ""
            raise ValueError(f"--classes has {word!r}; there are the numbers 0 to {count - 1}{known}")
    return tuple(chosen)
