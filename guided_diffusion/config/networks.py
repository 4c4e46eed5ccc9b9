"""The three kinds of network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .fields import Numbers, Section, flag, numbers

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


def default_multipliers(image_size: int, *, super_resolution: bool = False) -> Numbers:
    """Channel multipliers by level for an image size: the entry of the largest listed size that is not larger."""
    table = _SR_MULTIPLIERS if super_resolution else _MULTIPLIERS
    known = [size for size in table if size <= image_size]
    if not known:
        raise ValueError(
            f"--image_size is {image_size}; sizes below {min(table)} have no default --channel_mult: give one"
        )
    return table[max(known)]


@dataclass(frozen=True)
class _DenoiserConfig(Section):
    """What the two kinds of denoising network share."""

    num_channels: int = flag(128, "channels of the first level", low=1)
    num_res_blocks: int = flag(2, "residual blocks per level", low=1)
    num_heads: int = flag(4, "attention heads, where --num_head_channels is -1", low=1)
    num_heads_upsample: int = flag(-1, "attention heads on the way up; -1 = as on the way down", low=-1)
    num_head_channels: int = flag(-1, "channels per attention head; -1 = use --num_heads", low=-1)
    attention_resolutions: str = flag("16,8", "resolutions in pixels at which attention works")
    channel_mult: str = flag("", "channel multiplier of each level, such as 1,2,3,4; empty = by image size")
    dropout: float = flag(0.0, "probability of dropping a feature while training", low=0.0, high=1.0)
    class_cond: bool = flag(False, "whether the network is told the class")
    use_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = flag(True, "the time embedding scales and shifts the normalised features (AdaGN)")
    resblock_updown: bool = flag(False, "residual blocks change the resolution")
    use_fp16: bool = flag(False, "compute in float16 on a GPU; --precision says more")
    use_new_attention_order: bool = flag(False, "queries, keys, values are split before the heads are")
    num_classes: int = flag(0, "number of classes; 0 = counted in the data", low=0)
    image_channels: int = flag(3, "1 = grey, 3 = colour", low=1)

    def _check(self) -> None:
        _check_network(self.size, self.multipliers, "channel_mult")
        _ = self.attention_downsamplings

    @property
    def sample_size(self) -> int:
        """Height of what the network makes in pixels, by which levels and attention are chosen."""
        raise NotImplementedError

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network makes, in pixels."""
        return self.sample_size, self.sample_size

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

    image_size: int = flag(64, "height and width of the images in pixels", low=1)
    image_width: int = flag(0, "width in pixels, where it is not --image_size; 0 = square", low=0)

    @property
    def sample_size(self) -> int:
        return self.image_size

    @property
    def size(self) -> tuple[int, int]:
        return self.image_size, self.image_width or self.image_size


@dataclass(frozen=True)
class SuperResConfig(_DenoiserConfig):
    """The denoising network that is shown a smaller version of the image it makes."""

    kind: ClassVar[str] = "super_resolution"

    large_size: int = flag(256, "height and width of what is made, in pixels", low=1)
    small_size: int = flag(64, "height and width of what is given, in pixels", low=1)

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
class ClassifierConfig(Section):
    """The network that names the class of a noisy image, for guidance."""

    kind: ClassVar[str] = "classifier"

    image_size: int = flag(64, "height and width of the images in pixels", low=1)
    image_width: int = flag(0, "width in pixels, where it is not --image_size; 0 = square", low=0)
    classifier_use_fp16: bool = flag(False, "compute in float16 on a GPU; --precision says more")
    classifier_width: int = flag(128, "channels of the first level", low=1)
    classifier_depth: int = flag(2, "residual blocks per level", low=1)
    classifier_attention_resolutions: str = flag("32,16,8", "resolutions in pixels at which attention works")
    classifier_use_scale_shift_norm: bool = flag(True, "the time embedding scales and shifts the normalised features")
    classifier_resblock_updown: bool = flag(True, "residual blocks change the resolution")
    classifier_pool: str = flag(
        "attention", "from features to logits", choices=("attention", "adaptive", "spatial", "spatial_v2")
    )
    classifier_num_head_channels: int = flag(64, "channels per attention head", low=1)
    classifier_channel_mult: str = flag("", "channel multiplier of each level; empty = by image size")
    num_classes: int = flag(0, "number of classes; 0 = counted in the data", low=0)
    image_channels: int = flag(3, "1 = grey, 3 = colour", low=1)

    def _check(self) -> None:
        _check_network(self.size, self.multipliers, "classifier_channel_mult")
        _ = self.attention_downsamplings
        if self.classifier_pool == "attention" and self.size[0] != self.size[1]:
            raise ValueError(
                f"--classifier_pool is 'attention', which needs square images; these are {self.size[0]}x{self.size[1]}. "
                "Take adaptive, spatial or spatial_v2"
            )

    @property
    def sample_size(self) -> int:
        """Height of the images in pixels, by which levels and attention are chosen."""
        return self.image_size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.image_size, self.image_width or self.image_size

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


def _check_network(size: tuple[int, int], multipliers: Numbers, flag: str) -> None:
    if any(value <= 0 for value in multipliers):
        raise ValueError(f"--{flag} gives {multipliers}; every multiplier must be larger than 0")
    if any(length % 2 ** (len(multipliers) - 1) for length in size):
        raise ValueError(
            f"image size {size[0]}x{size[1]} cannot be halved {len(multipliers) - 1} times, as the {len(multipliers)} levels of "
            f"--{flag} {','.join(map(str, multipliers))} need; give fewer levels or another size"
        )


NETWORKS: dict[str, type[ModelConfig] | type[SuperResConfig] | type[ClassifierConfig]] = {
    config.kind: config for config in (ModelConfig, SuperResConfig, ClassifierConfig)
}
Network = ModelConfig | SuperResConfig | ClassifierConfig


# Classes of ImageNet, which the networks of 2021 have whenever they know classes at all.
CLASSES_OF_2021 = 1000


def classes_of(model: Network) -> int:
    """The number of classes, 0 where the network is told none; of a network of 2021 those of ImageNet."""
    return (model.num_classes or CLASSES_OF_2021) if getattr(model, "class_cond", True) else 0
