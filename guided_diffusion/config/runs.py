"""Configurations of the noise process, of data and training, and of a whole training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .fields import SWITCH, Section, flag, numbers
from .networks import NETWORKS, ModelConfig, Network

PRECISIONS = ("", "fp32", "bf16", "fp16")
WEIGHTS = ("", "ema", "model")  # which weights of a file or run folder that holds several
WEIGHTS_HELP = (
    "which weights to take where model_path holds both: those of the EMA (ema) or the raw ones (model); empty = the EMA"
)
TF32_HELP = "a GPU convolves float32 numbers in TF32 (10 bits of their mantissa); False = all products in float32"
_NO_AUTO_BATCH = "the batch size changes what is learned, so give a number; --microbatch auto finds how much of it fits"


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """The noise process and how the network's output is read."""

    learn_sigma: bool = flag(False, "the network also predicts the variance of each step")
    diffusion_steps: int = flag(1000, "number of steps from data to noise", low=1)
    noise_schedule: str = flag("linear", "how noise grows with the step", table="diffusion.schedules:SCHEDULES")
    timestep_respacing: str = flag("", "sample in fewer steps: 250, or 90,60,60,20,20 by fifths, or ddim25")
    use_kl: bool = flag(False, "train on the variational bound")
    predict_xstart: bool = flag(False, "the network predicts the clean image, not the noise")
    rescale_timesteps: bool = flag(False, "give the network steps scaled to 0..1000")
    rescale_learned_sigmas: bool = flag(
        False, "scale the bound of learned variances by steps / 1000: it never outweighs the mse"
    )
    predict: str = flag("", "what the network predicts; empty = by --predict_xstart", choices=("", "eps", "x0", "v"))
    sigma_small: bool = flag(
        False, "variance of a step, where not learned: the posterior's (small) instead of beta (large)"
    )

    zero_terminal_snr: bool = flag(
        False, "shift the schedule so that nothing of the image is left at the last step; needs --predict v or x0"
    )

    def to_dict(self) -> dict[str, Any]:
        """All fields; without zero_terminal_snr where it is False, so that files and receipts stay equal to those of older versions."""
        left_out = () if self.zero_terminal_snr else ("zero_terminal_snr",)
        return {name: value for name, value in super().to_dict().items() if name not in left_out}

    def _check(self) -> None:
        if self.predict and self.predict_xstart and self.predict != "x0":
            raise ValueError(
                f"--predict is {self.predict!r} but --predict_xstart True asks for 'x0'; give one of the two"
            )

    @property
    def reading(self) -> dict[str, str]:
        """How to read the network's output: the keyword arguments of `make_denoiser` and of the training losses."""
        fixed = "fixed_small" if self.sigma_small else "fixed_large"
        return {
            "predicts": self.predict or ("x0" if self.predict_xstart else "eps"),
            "variance": "learned_range" if self.learn_sigma else fixed,
        }

    @property
    def loss(self) -> str:
        """The name of the training loss, as the objectives spell it."""
        if self.use_kl:
            return "rescaled_kl"
        return "rescaled_mse" if self.rescale_learned_sigmas else "mse"


@dataclass(frozen=True)
class DataConfig(Section):
    """Where images and classes come from, and how images are cropped."""

    data_dir: str = flag("", "folder of images (local, gs:// or az://)")
    val_data_dir: str = flag("", "folder of images held out for validation")
    labels: str = flag("auto", "where classes come from: auto, folders, prefix, none, or a csv or json file")
    val_fraction: float = flag(
        0.0, "part of the data held out for validation, where --val_data_dir is empty", low=0.0, high=0.9
    )
    random_crop: bool = flag(False, "crop at a random position and scale, not the centre")
    random_flip: bool = flag(True, "mirror half of the images")
    workers: int = flag(0, "processes that read images besides the main one", low=0)
    on_error: str = flag("raise", "what an unreadable image does", choices=("raise", "skip"))


def relative_lengths(text: str, flag: str) -> tuple[float, ...]:
    """ "0.05,0.1" -> (0.05, 0.1): lengths of averages as shares of the training. ValueError names the flag."""
    lengths = tuple(float(length) for length in numbers(text, flag))
    # The longest average, of all weights alike, has 1 / sqrt(12).
    if any(not 0 < length < 12**-0.5 for length in lengths) or len(set(lengths)) < len(lengths):
        raise ValueError(f"--{flag} is {text!r}; it must be different numbers between 0 and 0.288, such as 0.05,0.1")
    return lengths


@dataclass(frozen=True)
class TrainConfig(Section):
    """How a denoising network is trained."""

    schedule_sampler: str = flag("uniform", "how to draw diffusion steps", choices=("uniform", "loss-second-moment"))
    lr: float = flag(1e-4, "learning rate", low=0.0)
    weight_decay: float = flag(0.0, "weight decay of AdamW", low=0.0)
    lr_anneal_steps: int = flag(0, "lower the learning rate to 0 over this many steps, then end; 0 = never", low=0)
    batch_size: int = flag(1, "images per step and process", low=1, no_auto=_NO_AUTO_BATCH)
    microbatch: int = flag(
        -1,
        "images per forward and backward pass; -1 = the whole batch; auto (or 0) = the whole or half, a quarter ... as fits",
        low=-1,
        auto=0,
    )
    recompute: str = flag(
        "",
        "what is computed again in the backward pass instead of being kept: empty = by --use_checkpoint; norms = norms and "
        "SiLUs of blocks, next to no work; all = whole blocks; auto = the first of none, norms and all that fits into memory",
        choices=("", "none", "norms", "all", "auto"),
    )
    memory_limit_gb: float = flag(
        0.0, "GB (2^30 bytes) for --recompute auto: of a GPU, or of this whole process; 0 = what is free", low=0.0
    )
    ema_rate: str = flag("0.9999", "decays of the EMA weights, separated by commas")
    ema_sigma_rel: str = flag(
        "", "also keep averages over these shares of the training, from which the command ema makes any other: 0.05,0.1"
    )
    log_interval: int = flag(10, "steps between two lines of the log", low=1)
    save_interval: int = flag(10000, "steps between two checkpoints", low=1)
    resume_checkpoint: str = flag(
        "",
        "continue from this file or folder; empty or auto = the newest save of the run folder; none = start afresh, but continue a run "
        "that the same command has begun in --out",
    )
    fp16_scale_growth: float = flag(1e-3, "growth per step of the logarithm of the loss scale in float16", low=0.0)
    global_batch_size: int = flag(0, "images per step over all processes; 0 = --batch_size times processes", low=0)
    max_steps: int = flag(0, "end after this many updates; 0 = with --lr_anneal_steps, else never", low=0)
    warmup_steps: int = flag(0, "raise the learning rate from 0 over this many steps", low=0)
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0 = unlimited", low=0.0)
    seed: int = flag(0, "seed of weights, order, noise and steps", low=0)
    precision: str = flag("", "arithmetic of the network; empty = by --use_fp16", choices=PRECISIONS)
    keep_last: int = flag(0, "how many of the newest checkpoints stay; 0 = all", low=0)
    keep_every: int = flag(0, "checkpoints at multiples of this step stay for good; 0 = none", low=0)
    shard_optimizer: bool = flag(False, "divide the optimizer's state among the processes: less memory on each")
    compile: str = flag(
        "auto",
        "compile the network by torch.compile: minutes at first, then faster on a GPU; auto = where the steps that are left "
        "take so long that it pays",
        choices=tuple(SWITCH),
    )
    tf32: bool = flag(True, TF32_HELP)
    compress_gradients: bool = flag(False, "send gradients between processes in bfloat16: half the bytes, less exact")
    static_graph: bool = flag(
        False,
        "promise that the same weights get gradients in every step, which saves work between processes (DDP's static_graph)",
    )
    shard_ema: bool = flag(False, "divide the EMA weights among the processes: less memory on each")
    sample_interval: int = flag(
        0, "steps between two pictures of samples; 0 = with every checkpoint, -1 = never", low=-1
    )
    sample_steps: str = flag("ddim25", "respacing of the sampler for those pictures")
    loss_weight: str = flag(
        "", "weight of the squared error by noise level; empty = none", table="diffusion.weighting:WEIGHTS"
    )
    min_snr_gamma: float = flag(0.0, "as --loss_weight min_snr, with this gamma; 0 = no such weight", low=0.0)
    class_dropout: float = flag(
        0.0,
        "probability of training on an image without its class, for classifier-free guidance by one network: 0.1",
        low=0.0,
        high=1.0,
    )

    @property
    def ema_rates(self) -> tuple[float, ...]:
        rates = tuple(float(rate) for rate in numbers(self.ema_rate, "ema_rate"))
        if any(not 0 < rate < 1 for rate in rates):
            raise ValueError(f"--ema_rate is {self.ema_rate!r}; every rate must lie between 0 and 1")
        return rates

    @property
    def ema_sigma_rels(self) -> tuple[float, ...]:
        return relative_lengths(self.ema_sigma_rel, "ema_sigma_rel")

    @property
    def last_step(self) -> int:
        """The number of updates after which training ends: by --max_steps, or with a learning rate of 0; 0 = never."""
        return min(filter(None, (self.max_steps, self.lr_anneal_steps)), default=0)

    def _check(self) -> None:
        _ = self.ema_rates, self.ema_sigma_rels
        if self.memory_limit_gb and self.recompute != "auto":
            raise ValueError(
                f"--memory_limit_gb {self.memory_limit_gb:g} is kept by --recompute auto only, and --recompute is {self.recompute!r}; "
                "give both, or --memory_limit_gb 0"
            )


@dataclass(frozen=True)
class ClassifierTrainConfig(TrainConfig):
    """How a classifier is trained. Some flags have other names than for diffusion models, as in 2021."""

    lr: float = flag(3e-4, "learning rate", low=0.0)
    batch_size: int = flag(4, "images per step and process", low=1, no_auto=_NO_AUTO_BATCH)
    ema_rate: str = flag("", "decays of EMA weights; empty = none")
    iterations: int = flag(150000, "end after this many updates", low=1)
    noised: bool = flag(True, "train on noised images, as guidance needs")
    max_steps: int = flag(0, "end after this many updates; 0 = after --iterations", low=0)
    anneal_lr: bool = flag(False, "lower the learning rate to 0 until the last update")
    eval_interval: int = flag(5, "steps between two batches of validation", low=1)

    @property
    def last_step(self) -> int:
        updates = self.max_steps or self.iterations
        return updates if self.anneal_lr else min(updates, self.lr_anneal_steps or updates)


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a training run, which is stored beside its weights."""

    model: Network = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @property
    def kind(self) -> str:
        """diffusion, super_resolution or classifier."""
        return self.model.kind

    def _check_sections(self) -> RunConfig:
        """Return self, with a null row if classes are dropped. ValueError if flags of different sections contradict each other."""
        train = self.train
        if (
            self.diffusion.zero_terminal_snr
            and self.diffusion.reading["predicts"] == "eps"
            and self.kind != "classifier"
        ):
            raise ValueError(
                "--zero_terminal_snr True leaves nothing of the image at the last step, so a network that predicts the noise says nothing "
                "about the image there; give --predict v or --predict x0"
            )
        if train.class_dropout and not getattr(self.model, "class_cond", False):
            raise ValueError(
                f"--class_dropout is {train.class_dropout:g}, but the network is not conditioned on a class; leave it out, or give "
                "a diffusion model or upsampler --class_cond True"
            )
        weight = (
            f"--min_snr_gamma {train.min_snr_gamma:g}" if train.min_snr_gamma else f"--loss_weight {train.loss_weight}"
        )
        if self.diffusion.use_kl and (train.loss_weight or train.min_snr_gamma):
            raise ValueError(
                f"{weight} weighs the mean squared error, which --use_kl True does not have; give one of the two"
            )
        if train.min_snr_gamma and train.loss_weight not in ("", "min_snr"):
            raise ValueError(f"{weight} is for --loss_weight min_snr, not {train.loss_weight}; give one of the two")
        if train.recompute == "norms" and train.compile == "on":
            raise ValueError(
                "--recompute 'norms' has no effect with --compile on: a compiler chooses for itself what to compute again; "
                "leave one of the two out, or give --recompute auto or all"
            )
        if train.recompute in ("none", "norms") and getattr(self.model, "use_checkpoint", False):
            raise ValueError(
                f"--recompute {train.recompute!r} lets no block recompute as a whole, --use_checkpoint True all of them; "
                "give one of the two"
            )
        model: Any = self.model
        return replace(self, model=replace(model, null_row=True)) if train.class_dropout else self

    @classmethod
    def sections(cls, kind: str) -> dict[str, type[Section]]:
        """The config class of each section of a run of this kind."""
        if kind not in NETWORKS:
            raise ValueError(f"--kind is {kind!r}; it must be one of {', '.join(NETWORKS)}")
        train = ClassifierTrainConfig if kind == "classifier" else TrainConfig
        return {"model": NETWORKS[kind], "diffusion": DiffusionConfig, "data": DataConfig, "train": train}

    @classmethod
    def from_flags(cls, kind: str, flags: Mapping[str, Any]) -> RunConfig:
        run = cls(**{name: config.from_flags(flags) for name, config in cls.sections(kind).items()})  # type: ignore[arg-type]
        return run._check_sections()

    @classmethod
    def from_dict(cls, kind: str, values: Mapping[str, Any]) -> RunConfig:
        # `_check_sections` is not called: the configuration may have been stored before one of those rules existed.
        sections = {name: config.from_dict(values.get(name, {})) for name, config in cls.sections(kind).items()}
        return cls(**sections)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {section: getattr(self, section).to_dict() for section in SECTIONS}


SECTIONS = ("model", "diffusion", "data", "train")

# Flag that is typed now -> stored flags that are dropped then, because they would take precedence over it.
_OVERRIDES = {
    "use_fp16": ("precision",),
    "classifier_use_fp16": ("precision",),
    "lr_anneal_steps": ("max_steps",),
    "iterations": ("max_steps",),
    "use_checkpoint": ("recompute", "memory_limit_gb"),
    "recompute": ("use_checkpoint", "memory_limit_gb"),
    "batch_size": ("global_batch_size",),
    "val_fraction": ("val_data_dir",),
    "num_heads": ("num_head_channels",),
    "predict": ("predict_xstart",),
    "predict_xstart": ("predict",),
    "use_ddim": ("sampler",),
    "sampler": ("use_ddim", "eta"),
    "steps": ("timestep_respacing", "nodes"),
    "nodes": ("timestep_respacing", "steps", "grid"),
    "timestep_respacing": ("steps", "grid", "nodes"),
}


def laid_over(stored: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Merge stored flags with those typed now. Typed ones win, and stored ones that would take precedence over them are dropped.

    So `--use_fp16 True` wins over a stored `precision`, `--lr_anneal_steps 6` over a stored `max_steps`. A typed 0 or empty text
    switches its flag off and drops no other.
    """
    # A typed value equal to the stored one drops nothing: repeating --batch_size keeps the stored global batch size.
    new = {name for name, value in typed.items() if (value or isinstance(value, bool)) and value != stored.get(name)}
    dropped = {other for name in new for other in _OVERRIDES.get(name, ())}
    merged = {**{name: value for name, value in stored.items() if name not in dropped}, **typed}
    # --max_steps beyond the end of the stored annealing stretches the annealing to the new last step.
    if "lr_anneal_steps" not in typed and 0 < merged.get("lr_anneal_steps", 0) < typed.get("max_steps", 0):
        merged["lr_anneal_steps"] = typed["max_steps"]
    return merged


def changed(stored: Mapping[str, Any], typed: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A message for each stored flag that was not typed and yet differs in `now`, the result of `laid_over`."""
    untyped = sorted(set(stored) - set(typed) - {"resume_checkpoint", "global_batch_size"})
    return [
        f"--{name} was {stored[name]!r} before and is {now[name]!r} now, because flags given now decide it"
        for name in untyped
        if now[name] != stored[name]
    ]
