"""Configurations of the noise process, of data, training and sampling, and of a whole training run."""

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
_FEW = 100  # from so many steps on, ancestral sampling is the default of --steps
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


# Flags that are passed on, by these names, to the sampler or the grid that has them.
CHAIN_OPTIONS = "nodes sigma_max sigma_min rho order final_order exact eta tau churn churn_min churn_max noise_scale restart".split()


@dataclass(frozen=True)
class SampleConfig(Section):
    """How images are sampled."""

    model_path: str = flag("", "weights of the diffusion model: a file, or a run folder (its newest EMA is taken)")
    weights: str = flag("", WEIGHTS_HELP, choices=WEIGHTS)
    classifier_path: str = flag("", "weights of the classifier: a file or a run folder")
    classifier_scale: float = flag(1.0, "strength of the guidance; 0 = none, below 0 = away from the class")
    guidance: str = flag(
        "",
        "which guidances, separated by commas; empty = classifier where --classifier_path is given",
        table="diffusion.guidance:GUIDANCES",
    )
    guidance_scale: str = flag(
        "", "strength of the guidances other than by a classifier; empty = the usual one of each (docs/guidance.md)"
    )
    guidance_interval: str = flag("", "LOW,HIGH: guide at noise levels LOW < sigma/alpha <= HIGH only")
    guidance_options: str = flag("", "further options of the guidances: name=value,... (docs/guidance.md)")
    guide_path: str = flag(
        "", "weights of a second network: without classes for classifier_free, a weaker one for autoguidance"
    )
    entropy_scale: bool = flag(
        False, "scale the classifier's gradient by log(classes) / entropy of its answer, per image"
    )
    rescale: float = flag(0.0, "bring the contrast of a guided image back: 0 = not, 1 = fully", low=0.0, high=1.0)
    epsilon_scale: str = flag("1", "divide predicted noise by this: 1.004; or by K*n + B at the n-th last step: K,B")
    threshold: float = flag(
        0.0,
        "dynamic threshold: the quantile of |x0| that is brought to 1, such as 0.995; 0 = clip at 1",
        low=0.0,
        high=1.0,
    )
    clip: str = flag(
        "",
        "clip x0 before guidance, after it, or not; empty = before where a classifier alone guides, as in 2021, else after",
        choices=("", "before", "after", "none"),
    )
    clip_denoised: bool = flag(True, "keep every predicted clean image within [-1, 1]; False = --clip none")
    num_samples: int = flag(10000, "how many images", low=1)
    batch_size: int = flag(
        16, "images per pass and process; auto (or 0) = as many as fit, found by trying", low=0, auto=0
    )
    use_ddim: bool = flag(False, "sample with DDIM instead of the ancestral chain")
    sampler: str = flag(
        "",
        "empty = by --use_ddim, or with --steps: ancestral from 100 steps on, else ddim; fast = few steps, unipc on the quadratic grid",
        table="diffusion.samplers:SAMPLERS diffusion.samplers:ALIASES",
    )
    steps: int = flag(0, "how many steps, placed by --grid; 0 = those of --timestep_respacing or --nodes", low=0)
    grid: str = flag("", "where the steps are; empty = as fits the sampler", table="diffusion.grids:GRIDS")
    nodes: str = flag("", "the steps themselves, falling: 999,850,736 ... or as noise levels: sigma:14.6,6.4 ...")
    sigma_max: float = flag(
        0.0,
        "noise level sigma/alpha where the grid starts at most; 0 = 164, or no limit for ancestral and ddim",
        low=0.0,
    )
    sigma_min: float = flag(0.0, "noise level at which the grid ends at least; 0 = the process's last", low=0.0)
    rho: float = flag(7.0, "exponent of the karras grid", low=0.0)
    order: int = flag(0, "order of a multistep or single-step solver; 0 = its default", low=0)
    final_order: int = flag(
        1, "order of the move into the last step at most; lower is safer where steps are few", low=1
    )
    exact: bool = flag(False, "dpm_solver of order 3 with exact weights instead of the published ones")
    eta: float = flag(
        -1.0,
        "fresh noise: 0 = none, 1 = as much as the ancestral chain; -1 = 0 for ddim, 1 for other samplers",
        low=-1.0,
    )
    tau: float = flag(1.0, "fresh noise of sa: 0 = none, 1 = as much as the reverse process", low=0.0)
    churn: float = flag(0.0, "noise added again before each step of heun or euler (S_churn of EDM)", low=0.0)
    churn_min: float = flag(0.0, "only from this noise level on", low=0.0)
    churn_max: float = flag(1e9, "only up to this noise level", low=0.0)
    noise_scale: float = flag(1.0, "factor of the noise of churn and restart (S_noise of EDM)", low=0.0)
    restart: str = flag("", "of restart: steps,times,low,high;... between noise levels; empty = none")
    seed: int = flag(0, "image i depends on the seed and i; other batch sizes change it by rounding only", low=0)
    classes: str = flag("", "only these classes, by number or name: 3,7")
    labels: str = flag("random", "how classes are assigned to images", choices=("random", "balanced"))
    precision: str = flag("", "arithmetic of the networks; empty = by --use_fp16", choices=PRECISIONS)
    classifier_precision: str = flag("", "arithmetic of the classifier; empty = as --precision", choices=PRECISIONS)
    picture: int = flag(64, "images in the overview picture; 0 = none", low=0)
    compile: str = flag(
        "auto",
        "compile networks by torch.compile: minutes at first, then faster on a GPU; auto = where the images that are left "
        "take so long that it pays",
        choices=tuple(SWITCH),
    )
    cuda_graphs: str = flag(
        "auto",
        "each guided step as one CUDA graph, which is faster where batches are small; auto = there, from 20 steps on",
        choices=tuple(SWITCH),
    )
    tf32: bool = flag(True, TF32_HELP)
    deterministic: bool = flag(
        False, "image i is the same to the bit for every --batch_size, as networks always get 8 images at a time"
    )

    @property
    def chain_options(self) -> dict[str, Any]:
        """The options of sampler and grid that are not at their defaults, by name."""
        given = {name: getattr(self, name) for name in CHAIN_OPTIONS}
        return {name: value for name, value in given.items() if value != getattr(SampleConfig, name)}

    @property
    def method(self) -> str:
        """The sampler's name, a key of `SAMPLERS`."""
        return self.sampler or ("ddim" if self.use_ddim or 0 < self.steps < _FEW else "ancestral")

    def _check(self) -> None:
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise ValueError(
                f"--use_ddim True and --sampler {self.sampler!r} are two ways to say one thing; leave one of the two out"
            )
        if self.nodes and (self.steps or self.grid):
            other = f"--steps {self.steps}" if self.steps else f"--grid {self.grid!r}"
            raise ValueError(
                f"--nodes {self.nodes!r} and {other} are two ways to say where steps are; leave one of the two out"
            )
        if self.grid in ("sections", "nodes"):
            instead = "--nodes 999,850,736" if self.grid == "nodes" else "--timestep_respacing 90,60,60,20,20"
            raise ValueError(f"--grid {self.grid} is said with its steps: give {instead} instead")
        if not self.clip_denoised and self.clip not in ("", "none"):
            raise ValueError(
                f"--clip_denoised False and --clip {self.clip!r} contradict each other; leave one of the two out"
            )
        if self.grid and not self.steps:
            raise ValueError(f"--grid is {self.grid!r}, and --steps is 0; say how many steps, as in --steps 25")
        if self.deterministic and self.compile == "on":
            raise ValueError(
                "--deterministic True computes without a compiler, and --compile is 'on'; leave one of the two out"
            )


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
