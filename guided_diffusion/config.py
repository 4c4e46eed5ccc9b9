"""What a run is: frozen values, spelled as the flags of 2021 where a flag exists. Imports nothing heavy, nothing of ours.

Every field carries its meaning in the metadata, from which the command line makes its help; `validate` refuses
impossible values by name. Sequences stay strings ("32,16,8") as they are typed and stored; the properties give them as
numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

# Channel multipliers where the user gives none. 64 and above are the paper's.
_MULTIPLIERS = {
    8: (1, 2),
    16: (1, 2, 2),
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
# The released 128 -> 512 upsampler uses six levels, not seven.
_SR_MULTIPLIERS = {**_MULTIPLIERS, 512: (1, 1, 2, 2, 4, 4)}

PRECISIONS = ("", "fp32", "bf16", "fp16")
Numbers = tuple[float, ...]
C = TypeVar("C", bound="_Config")


def _flag(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


def numbers(text: str | Iterable[Any], flag: str) -> Numbers:
    """ "0.5,1, 2" or a sequence -> (0.5, 1, 2); whole numbers come back as int. ValueError names the flag."""
    parts = text.split(",") if isinstance(text, str) else list(text)
    try:
        found = [float(part) for part in parts if str(part).strip()]
    except ValueError:
        raise ValueError(f"--{flag} is {text!r}; it must be numbers separated by commas, such as 32,16,8") from None
    return tuple(int(value) if value == int(value) else value for value in found)


def default_multipliers(image_size: int, *, super_resolution: bool = False) -> Numbers:
    """Channel multipliers by level for an image size: the entry of the largest listed size that is not larger."""
    table = _SR_MULTIPLIERS if super_resolution else _MULTIPLIERS
    known = [size for size in table if size <= image_size]
    if not known:
        raise ValueError(
            f"--image_size is {image_size}; sizes below {min(table)} have no default --channel_mult: give one"
        )
    return table[max(known)]


class _Config:
    """Shared by all configs: reading from flags and JSON, comparison in words, one check per field."""

    def validate(self: C) -> C:
        """Return self if every value is possible, else raise ValueError naming flag, value and what is allowed."""
        for f in fields(self):  # type: ignore[arg-type]
            value, meta = getattr(self, f.name), f.metadata
            wanted = type(f.default)
            if (
                wanted in (int, float, bool, str)
                and type(value) is not wanted
                and not (wanted is float and type(value) is int)
            ):
                raise ValueError(f"--{f.name} is {value!r}; it must be {_KIND_IN_WORDS[wanted]}")
            if meta.get("choices") and value not in meta["choices"]:
                raise ValueError(
                    f"--{f.name} is {value!r}; it must be one of {', '.join(repr(c) for c in meta['choices'])}"
                )
            low, high = meta.get("low"), meta.get("high")
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                allowed = " and ".join(
                    f"at {word} {bound:g}" for word, bound in (("least", low), ("most", high)) if bound is not None
                )
                raise ValueError(f"--{f.name} is {value!r}; it must be {allowed}")
        self._check()
        return self

    def _check(self) -> None:
        """Rules between fields."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_flags(cls: type[C], flags: Mapping[str, Any]) -> C:
        """Take from `flags` what belongs here, leave the rest; missing ones keep their default."""
        return cls(**{name: flags[name] for name in cls.names() if name in flags}).validate()

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`; a key that is no field is refused (a newer version's file, or a slip)."""
        unknown = sorted(set(values) - set(cls.names()))
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(cls.names())}")
        return cls.from_flags(values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]


_KIND_IN_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


@dataclass(frozen=True)
class _DenoiserConfig(_Config):
    """What the two kinds of denoising network share."""

    num_channels: int = _flag(128, "channels of the first level", low=1)
    num_res_blocks: int = _flag(2, "residual blocks per level", low=1)
    num_heads: int = _flag(4, "attention heads, where --num_head_channels is -1", low=1)
    num_heads_upsample: int = _flag(-1, "attention heads on the way up; -1 = as on the way down", low=-1)
    num_head_channels: int = _flag(-1, "channels per attention head; -1 = use --num_heads", low=-1)
    attention_resolutions: str = _flag("16,8", "resolutions in pixels at which attention works")
    channel_mult: str = _flag("", "channel multiplier of each level, such as 1,2,3,4; empty = by image size")
    dropout: float = _flag(0.0, "probability of dropping a feature while training", low=0.0, high=1.0)
    class_cond: bool = _flag(False, "whether the network is told the class")
    use_checkpoint: bool = _flag(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = _flag(True, "the time embedding scales and shifts the normalised features (AdaGN)")
    resblock_updown: bool = _flag(False, "residual blocks change the resolution")
    use_fp16: bool = _flag(False, "compute in float16 on a GPU; --precision says more")
    use_new_attention_order: bool = _flag(False, "queries, keys, values are split before the heads are")
    num_classes: int = _flag(0, "number of classes; 0 = counted in the data", low=0)
    image_channels: int = _flag(3, "1 = grey, 3 = colour", low=1)

    def _check(self) -> None:
        _check_network(self.sample_size, self.multipliers, "channel_mult")
        _ = self.attention_downsamplings

    @property
    def sample_size(self) -> int:
        """Height and width of what the network makes, in pixels."""
        raise NotImplementedError

    @property
    def multipliers(self) -> Numbers:
        """Channel multiplier of each level."""
        return numbers(self.channel_mult, "channel_mult") or default_multipliers(self.sample_size)

    @property
    def attention_downsamplings(self) -> tuple[int, ...]:
        """The levels with attention, as factors by which the image is smaller there."""
        return _downsamplings(self.attention_resolutions, self.sample_size, "attention_resolutions")


@dataclass(frozen=True)
class ModelConfig(_DenoiserConfig):
    """The denoising network of one image size."""

    kind: ClassVar[str] = "diffusion"

    image_size: int = _flag(64, "height and width of the images in pixels", low=1)

    @property
    def sample_size(self) -> int:
        return self.image_size


@dataclass(frozen=True)
class SuperResConfig(_DenoiserConfig):
    """The denoising network that is shown a smaller version of the image it makes."""

    kind: ClassVar[str] = "super_resolution"

    large_size: int = _flag(256, "height and width of what is made, in pixels", low=1)
    small_size: int = _flag(64, "height and width of what is given, in pixels", low=1)

    def _check(self) -> None:
        if self.small_size > self.large_size:
            raise ValueError(f"--small_size is {self.small_size}; it must not exceed --large_size {self.large_size}")
        super()._check()

    @property
    def sample_size(self) -> int:
        return self.large_size

    @property
    def multipliers(self) -> Numbers:
        given = numbers(self.channel_mult, "channel_mult")
        return given or default_multipliers(self.large_size, super_resolution=True)


@dataclass(frozen=True)
class ClassifierConfig(_Config):
    """The network that names the class of a noisy image, for guidance."""

    kind: ClassVar[str] = "classifier"

    image_size: int = _flag(64, "height and width of the images in pixels", low=1)
    classifier_use_fp16: bool = _flag(False, "compute in float16 on a GPU; --precision says more")
    classifier_width: int = _flag(128, "channels of the first level", low=1)
    classifier_depth: int = _flag(2, "residual blocks per level", low=1)
    classifier_attention_resolutions: str = _flag("32,16,8", "resolutions in pixels at which attention works")
    classifier_use_scale_shift_norm: bool = _flag(True, "the time embedding scales and shifts the normalised features")
    classifier_resblock_updown: bool = _flag(True, "residual blocks change the resolution")
    classifier_pool: str = _flag(
        "attention", "from features to logits", choices=("attention", "adaptive", "spatial", "spatial_v2")
    )
    classifier_num_head_channels: int = _flag(64, "channels per attention head", low=1)
    classifier_channel_mult: str = _flag("", "channel multiplier of each level; empty = by image size")
    num_classes: int = _flag(0, "number of classes; 0 = counted in the data", low=0)
    image_channels: int = _flag(3, "1 = grey, 3 = colour", low=1)

    def _check(self) -> None:
        _check_network(self.image_size, self.multipliers, "classifier_channel_mult")
        _ = self.attention_downsamplings

    @property
    def sample_size(self) -> int:
        return self.image_size

    @property
    def multipliers(self) -> Numbers:
        given = numbers(self.classifier_channel_mult, "classifier_channel_mult")
        return given or default_multipliers(self.image_size)

    @property
    def attention_downsamplings(self) -> tuple[int, ...]:
        return _downsamplings(
            self.classifier_attention_resolutions, self.image_size, "classifier_attention_resolutions"
        )


def _downsamplings(text: str, image_size: int, flag: str) -> tuple[int, ...]:
    found = numbers(text, flag)
    if any(resolution < 1 or resolution != int(resolution) for resolution in found):
        raise ValueError(f"--{flag} is {text!r}; it must be whole numbers of pixels, at least 1")
    return tuple(image_size // int(resolution) for resolution in found)


def _check_network(size: int, multipliers: Numbers, flag: str) -> None:
    if any(value <= 0 for value in multipliers):
        raise ValueError(f"--{flag} gives {multipliers}; every multiplier must be larger than 0")
    if size % 2 ** (len(multipliers) - 1):
        raise ValueError(
            f"image size {size} cannot be halved {len(multipliers) - 1} times, as the {len(multipliers)} levels of "
            f"--{flag} {','.join(map(str, multipliers))} need; give fewer levels or another size"
        )


@dataclass(frozen=True)
class DiffusionConfig(_Config):
    """The noise process and how the network's output is read."""

    learn_sigma: bool = _flag(False, "the network also says the variance of each step")
    diffusion_steps: int = _flag(1000, "number of steps from data to noise", low=1)
    noise_schedule: str = _flag("linear", "how noise grows with the step: linear, cosine")
    timestep_respacing: str = _flag("", "sample in fewer steps: 250, or 90,60,60,20,20 by fifths, or ddim25")
    use_kl: bool = _flag(False, "train on the variational bound")
    predict_xstart: bool = _flag(False, "the network predicts the clean image, not the noise")
    rescale_timesteps: bool = _flag(False, "tell the network steps scaled to 0..1000")
    rescale_learned_sigmas: bool = _flag(False, "weigh the bound of learned variances as the mean squared error")
    predict: str = _flag("", "what the network predicts; empty = by --predict_xstart", choices=("", "eps", "x0", "v"))
    sigma_small: bool = _flag(
        False, "variance of a step, where not learned: the posterior's (small) instead of beta (large)"
    )

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
class DataConfig(_Config):
    """Where images come from and how they are cut."""

    data_dir: str = _flag("", "folder of images (local, gs:// or az://)")
    val_data_dir: str = _flag("", "folder of images held out for validation")
    labels: str = _flag("auto", "where classes come from: auto, folders, prefix, none, or a csv or json file")
    val_fraction: float = _flag(
        0.0, "part of the data held out for validation, where --val_data_dir is empty", low=0.0, high=0.9
    )
    random_crop: bool = _flag(False, "cut at a random place and scale instead of the centre")
    random_flip: bool = _flag(True, "mirror half of the images")
    workers: int = _flag(0, "processes that read images besides the main one", low=0)
    on_error: str = _flag("raise", "what an unreadable image does", choices=("raise", "skip"))


@dataclass(frozen=True)
class TrainConfig(_Config):
    """How weights are made."""

    schedule_sampler: str = _flag("uniform", "which steps to train on", choices=("uniform", "loss-second-moment"))
    lr: float = _flag(1e-4, "learning rate", low=0.0)
    weight_decay: float = _flag(0.0, "weight decay of AdamW", low=0.0)
    lr_anneal_steps: int = _flag(0, "lower the learning rate to 0 over this many steps, then end; 0 = never", low=0)
    batch_size: int = _flag(1, "images per step and process", low=1)
    microbatch: int = _flag(-1, "images per forward and backward pass; -1 = the whole batch", low=-1)
    ema_rate: str = _flag("0.9999", "rates of the averaged weights, separated by commas")
    log_interval: int = _flag(10, "steps between two lines of the log", low=1)
    save_interval: int = _flag(10000, "steps between two checkpoints", low=1)
    resume_checkpoint: str = _flag(
        "", "go on from this file or folder; empty or auto = the newest save of the run folder; none = start afresh"
    )
    fp16_scale_growth: float = _flag(1e-3, "growth per step of the logarithm of the loss scale in float16", low=0.0)
    global_batch_size: int = _flag(0, "images per step over all processes; 0 = --batch_size times processes", low=0)
    max_steps: int = _flag(0, "end after this many updates; 0 = with --lr_anneal_steps, else never", low=0)
    warmup_steps: int = _flag(0, "raise the learning rate from 0 over this many steps", low=0)
    grad_clip: float = _flag(0.0, "largest norm of the gradient; 0 = unlimited", low=0.0)
    seed: int = _flag(0, "seed of weights, order, noise and steps", low=0)
    precision: str = _flag("", "arithmetic of the network; empty = by --use_fp16", choices=PRECISIONS)
    keep_last: int = _flag(0, "how many of the newest checkpoints stay; 0 = all", low=0)
    keep_every: int = _flag(0, "checkpoints at multiples of this step stay for good; 0 = none", low=0)
    sample_interval: int = _flag(0, "steps between two pictures of samples; 0 = never", low=0)
    sample_steps: str = _flag("ddim25", "respacing of the sampler for those pictures")
    min_snr_gamma: float = _flag(0.0, "weigh the loss by min(SNR, gamma); 0 = not", low=0.0)

    @property
    def ema_rates(self) -> tuple[float, ...]:
        rates = tuple(float(rate) for rate in numbers(self.ema_rate, "ema_rate"))
        if any(not 0 < rate < 1 for rate in rates):
            raise ValueError(f"--ema_rate is {self.ema_rate!r}; every rate must lie between 0 and 1")
        return rates

    @property
    def last_step(self) -> int:
        """The number of updates after which training ends; 0 = never."""
        return self.max_steps or self.lr_anneal_steps

    def _check(self) -> None:
        _ = self.ema_rates


@dataclass(frozen=True)
class ClassifierTrainConfig(TrainConfig):
    """How a classifier's weights are made; 2021 spelled some flags differently from the generator's."""

    lr: float = _flag(3e-4, "learning rate", low=0.0)
    batch_size: int = _flag(4, "images per step and process", low=1)
    ema_rate: str = _flag("", "rates of averaged weights; empty = none")
    iterations: int = _flag(150000, "end after this many updates", low=1)
    noised: bool = _flag(True, "train on noised images, as guidance needs")
    anneal_lr: bool = _flag(False, "lower the learning rate to 0 over --iterations")
    eval_interval: int = _flag(5, "steps between two batches of validation", low=1)

    @property
    def last_step(self) -> int:
        return self.max_steps or self.iterations


@dataclass(frozen=True)
class SampleConfig(_Config):
    """How images are made from weights."""

    model_path: str = _flag("", "weights of the diffusion model: a file, or a run folder (its newest EMA is taken)")
    classifier_path: str = _flag("", "weights of the classifier: a file or a run folder")
    classifier_scale: float = _flag(1.0, "strength of the guidance; 0 = none", low=0.0)
    clip_denoised: bool = _flag(True, "keep every predicted clean image within [-1, 1]")
    num_samples: int = _flag(10000, "how many images", low=1)
    batch_size: int = _flag(16, "images per pass and process", low=1)
    use_ddim: bool = _flag(False, "sample with DDIM instead of the ancestral chain")
    sampler: str = _flag("", "empty = by --use_ddim", choices=("", "ancestral", "ddim", "heun", "dpm_solver"))
    eta: float = _flag(0.0, "noise of DDIM: 0 = none, 1 = as much as the ancestral chain", low=0.0, high=1.0)
    seed: int = _flag(0, "image i is the same for a seed, whatever the batch size", low=0)
    classes: str = _flag("", "only these classes, by number or name: 3,7")
    labels: str = _flag("random", "how classes are dealt out", choices=("random", "balanced"))
    precision: str = _flag("", "arithmetic of the networks; empty = by --use_fp16", choices=PRECISIONS)
    grid: int = _flag(64, "images in the overview picture; 0 = none", low=0)

    @property
    def method(self) -> str:
        return self.sampler or ("ddim" if self.use_ddim else "ancestral")


NETWORKS: dict[str, type[ModelConfig] | type[SuperResConfig] | type[ClassifierConfig]] = {
    config.kind: config for config in (ModelConfig, SuperResConfig, ClassifierConfig)
}
Network = ModelConfig | SuperResConfig | ClassifierConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run is; stored beside its weights."""

    model: Network = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @property
    def kind(self) -> str:
        """diffusion, super_resolution or classifier."""
        return self.model.kind

    def validate(self) -> RunConfig:
        for section in SECTIONS:
            getattr(self, section).validate()
        return self

    @classmethod
    def sections(cls, kind: str) -> dict[str, type[_Config]]:
        """The config class of each section of a run of this kind."""
        if kind not in NETWORKS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(NETWORKS)}")
        train = ClassifierTrainConfig if kind == "classifier" else TrainConfig
        return {"model": NETWORKS[kind], "diffusion": DiffusionConfig, "data": DataConfig, "train": train}

    @classmethod
    def from_flags(cls, kind: str, flags: Mapping[str, Any]) -> RunConfig:
        return cls(**{name: config.from_flags(flags) for name, config in cls.sections(kind).items()})  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, kind: str, values: Mapping[str, Any]) -> RunConfig:
        found = {name: config.from_dict(values.get(name, {})) for name, config in cls.sections(kind).items()}
        return cls(**found)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {section: getattr(self, section).to_dict() for section in SECTIONS}


SECTIONS = ("model", "diffusion", "data", "train")


def to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections or flags -> flags. Also reads the JSON beside a checkpoint, whose configuration is under "config"."""
    values = values["config"] if isinstance(values.get("config"), Mapping) else values
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    return flat


def difference(file: Mapping[str, Any], asked: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """In words, where two sets of flags contradict: "attention_resolutions is '32,16,8' in the file, '16,8' asked"."""
    shared = [name for name in (names or file) if name in file and name in asked and file[name] != asked[name]]
    return [f"{name} is {file[name]!r} in the file, {asked[name]!r} asked" for name in shared]
