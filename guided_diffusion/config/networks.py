"""Configurations of networks in their three roles: diffusion, super-resolution, classifier.

Any role may have any architecture: `--architecture unet`, whose flags are fields here, or a key of
`models.architectures.ARCHITECTURES`, whose arguments are given by `--arch_options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .fields import Numbers, Section, flag, numbers, options

UNET = "unet"

# Default channel multipliers by image size; from 64 on those of the paper.
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


class _Role(Section):
    """Properties and checks of all three roles, from fields that the subclasses declare."""

    prefix: ClassVar[str] = ""
    """How the names of its flags begin."""
    unet_flags: ClassVar[tuple[str, ...]]
    architecture: Any
    arch_options: Any
    sample_size: Any
    """Height of the images in pixels, from which default levels and the levels with attention follow."""
    size: Any
    """Height and width of the images in pixels."""

    @property
    def fp16(self) -> bool:
        """Whether --use_fp16, or --classifier_use_fp16, is set."""
        return bool(getattr(self, f"{self.prefix}use_fp16"))

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that --arch_options gives an architecture other than the U-Net."""
        return options(self.arch_options, f"{self.prefix}arch_options")

    @property
    def multipliers(self) -> Numbers:
        """Channel multiplier of each level."""
        name, upsampler = f"{self.prefix}channel_mult", isinstance(self, SuperResConfig)
        return numbers(getattr(self, name), name) or default_multipliers(self.sample_size, super_resolution=upsampler)

    @property
    def attention_downsamplings(self) -> tuple[int, ...]:
        """The levels with attention, as downsampling factors; 0 for a resolution above `sample_size`."""
        name = f"{self.prefix}attention_resolutions"
        resolutions = numbers(getattr(self, name), name)
        if any(resolution < 1 or resolution != int(resolution) for resolution in resolutions):
            raise ValueError(f"--{name} is {getattr(self, name)!r}; it must be whole numbers of pixels, at least 1")
        return tuple(self.sample_size // int(resolution) for resolution in resolutions)

    def to_dict(self) -> dict[str, Any]:
        """All fields; without the architecture flags of a U-Net and a null row that there is not, so that files and receipts stay
        equal to those of older versions."""
        left_out = [f"{self.prefix}architecture", f"{self.prefix}arch_options"] if self.architecture == UNET else []
        left_out += [] if getattr(self, "null_row", False) else ["null_row"]
        return {name: value for name, value in super().to_dict().items() if name not in left_out}

    def _check(self) -> None:
        if self.architecture != UNET:
            changed = [name for name in self.unet_flags if getattr(self, name) != getattr(type(self), name)]
            if changed:
                flags = ", ".join(f"--{name} {getattr(self, name)}" for name in changed)
                raise ValueError(
                    f"--{self.prefix}architecture is {self.architecture!r}, but {flags} is for the U-Net; "
                    f"leave it out, or give --{self.prefix}arch_options"
                )
            _ = self.options  # raises ValueError if they cannot be read
            return
        if self.options:
            raise ValueError(
                f"--{self.prefix}arch_options is {self.arch_options!r}, but the U-Net has flags of its own; --help lists them"
            )
        _ = self.attention_downsamplings
        multipliers, halvings = self.multipliers, len(self.multipliers) - 1
        if any(value <= 0 for value in multipliers):
            raise ValueError(f"--{self.prefix}channel_mult gives {multipliers}; every multiplier must be larger than 0")
        if any(length % 2**halvings for length in self.size):
            raise ValueError(
                f"image size {self.size[0]}x{self.size[1]} cannot be halved {halvings} times, as the {len(multipliers)} levels of "
                f"--{self.prefix}channel_mult {','.join(map(str, multipliers))} need; give fewer levels or another size"
            )


@dataclass(frozen=True)
class _ImageSize(Section):
    image_size: int = flag(64, "height and width of the images in pixels", low=1)
    image_width: int = flag(0, "width in pixels, where it is not --image_size; 0 = square", low=0)

    @property
    def sample_size(self) -> int:
        return self.image_size

    @property
    def size(self) -> tuple[int, int]:
        return self.image_size, self.image_width or self.image_size


@dataclass(frozen=True)
class _UNetFlags(Section):
    """Flags of the U-Net as a denoising network."""

    num_channels: int = flag(128, "channels of the first level", low=1)
    num_res_blocks: int = flag(2, "residual blocks per level", low=1)
    num_heads: int = flag(4, "attention heads, where --num_head_channels is -1", low=1)
    num_heads_upsample: int = flag(-1, "attention heads on the way up; -1 = as on the way down", low=-1)
    num_head_channels: int = flag(-1, "channels per attention head; -1 = use --num_heads", low=-1)
    attention_resolutions: str = flag("16,8", "resolutions in pixels at which attention works")
    channel_mult: str = flag("", "channel multiplier of each level, such as 1,2,3,4; empty = by image size")
    dropout: float = flag(0.0, "probability of dropping a feature while training", low=0.0, high=1.0)
    use_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = flag(True, "the time embedding scales and shifts the normalised features (AdaGN)")
    resblock_updown: bool = flag(False, "residual blocks change the resolution")
    use_new_attention_order: bool = flag(False, "queries, keys, values are split before the heads are")


@dataclass(frozen=True)
class _DenoiserConfig(_UNetFlags, _Role):
    """Fields of both denoising roles, diffusion and super-resolution."""

    unet_flags: ClassVar[tuple[str, ...]] = _UNetFlags.names()

    class_cond: bool = flag(False, "whether the network is conditioned on the class")
    use_fp16: bool = flag(False, "compute in float16 on a GPU; --precision says more")
    num_classes: int = flag(0, "number of classes; 0 = counted in the data", low=0)
    null_row: bool = flag(
        False, "the label embedding ends with a row that stands for no class, as --class_dropout trains it"
    )
    image_channels: int = flag(3, "1 = grey, 3 = colour", low=1)
    architecture: str = flag(
        UNET, "what computes: unet, or a network of yours", table="models.architectures:ARCHITECTURES"
    )
    arch_options: str = flag("", "arguments of a network of yours, such as depth=6,width=384")

    def _check(self) -> None:
        super()._check()
        if self.null_row and not self.class_cond:
            raise ValueError(
                "--null_row is True, but --class_cond is False: a network without classes has no label embedding"
            )


@dataclass(frozen=True)
class ModelConfig(_ImageSize, _DenoiserConfig):
    """The denoising network of one image size."""

    kind: ClassVar[str] = "diffusion"


@dataclass(frozen=True)
class SuperResConfig(_DenoiserConfig):
    """The denoising network that is conditioned on a smaller version of the image."""

    kind: ClassVar[str] = "super_resolution"

    large_size: int = flag(256, "height and width of the images that are made, in pixels", low=1)
    small_size: int = flag(64, "height and width of the small images, in pixels", low=1)

    def _check(self) -> None:
        if self.small_size > self.large_size:
            raise ValueError(f"--small_size is {self.small_size}; it must not exceed --large_size {self.large_size}")
        super()._check()

    @property
    def sample_size(self) -> int:
        return self.large_size

    @property
    def size(self) -> tuple[int, int]:
        return self.large_size, self.large_size


@dataclass(frozen=True)
class _ClassifierUNetFlags(Section):
    """Flags of the classifier: the encoder half of the U-Net and a pooling head."""

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


@dataclass(frozen=True)
class ClassifierConfig(_ImageSize, _ClassifierUNetFlags, _Role):
    """The network that classifies noisy images, for guidance."""

    kind: ClassVar[str] = "classifier"
    prefix: ClassVar[str] = "classifier_"
    unet_flags: ClassVar[tuple[str, ...]] = _ClassifierUNetFlags.names()

    classifier_use_fp16: bool = flag(False, "compute in float16 on a GPU; --precision says more")
    classifier_architecture: str = flag(UNET, "as --architecture, of the classifier")
    classifier_arch_options: str = flag("", "as --arch_options, of the classifier")
    num_classes: int = flag(0, "number of classes; 0 = counted in the data", low=0)
    image_channels: int = flag(3, "1 = grey, 3 = colour", low=1)

    @property
    def architecture(self) -> str:
        return self.classifier_architecture

    @property
    def arch_options(self) -> str:
        return self.classifier_arch_options

    def _check(self) -> None:
        super()._check()
        if self.architecture == UNET and self.classifier_pool == "attention" and self.size[0] != self.size[1]:
            raise ValueError(
                f"--classifier_pool is 'attention', which needs square images; these are {self.size[0]}x{self.size[1]}. "
                "Take adaptive, spatial or spatial_v2"
            )


NETWORKS: dict[str, type[ModelConfig] | type[SuperResConfig] | type[ClassifierConfig]] = {
    config.kind: config for config in (ModelConfig, SuperResConfig, ClassifierConfig)
}
Network = ModelConfig | SuperResConfig | ClassifierConfig


# Classes of ImageNet, which every class-conditional network and classifier of 2021 has.
CLASSES_OF_2021 = 1000


def classes_of(model: Network) -> int:
    """The number of classes, 0 if the network uses none; where the configuration does not say, ImageNet's, as in 2021."""
    return (model.num_classes or CLASSES_OF_2021) if getattr(model, "class_cond", True) else 0


def label_rows(model: Network) -> int:
    """The rows of the label embedding: one for each class and, after them, the null row if there is one; 0 without classes."""
    return classes_of(model) + getattr(model, "null_row", False)
