"""The networks that are measured, as flags of 2021: both this package and the original one build them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A generator, the classifier that guides it, and batch sizes for sampling and for a training step."""

    name: str
    model: Mapping[str, Any]
    classifier: Mapping[str, Any]
    batch: int
    train_batch: int


def small(num_channels: int = 64, batch: int = 2, train_batch: int = 4) -> Shape:
    """A 64x64 network in the shape of the released ones, of 18 million parameters at 64 channels."""
    both = {"image_size": 64, "num_classes": 1000}
    model = {"num_channels": num_channels, "num_res_blocks": 1, "num_head_channels": 32, "channel_mult": "1,2,3,4"}
    model |= {"attention_resolutions": "32,16,8", "resblock_updown": True, "class_cond": True, "learn_sigma": True}
    critic = {"classifier_width": 64, "classifier_depth": 1}
    return Shape(f"64 px, {num_channels} channels", {**both, **model}, {**both, **critic}, batch, train_batch)


def tiny() -> Shape:
    """Half the channels, one image at a time: for a look within a minute."""
    return small(32, batch=1, train_batch=2)


def narrow() -> Shape:
    """The depth of the released 64 pixel network, on images so small that a pass takes the time that the host needs for it. No classifier
    of 2021 takes these."""
    deep = {"image_size": 16, "num_res_blocks": 3, "attention_resolutions": "8,4,2", "use_scale_shift_norm": True}
    return Shape("64 px depth on 16 px", {**small(32).model, **deep}, {}, batch=1, train_batch=1)


def released(size: int, batch: int, train_batch: int) -> Shape:
    """The class-conditional network released for this image size, with its classifier."""
    import guided_diffusion as gd

    model, critic = (gd.presets.get(f"{size}x{size}_{kind}").flags for kind in ("diffusion", "classifier"))
    return Shape(f"released {size} px", model, critic, batch, train_batch)


def chosen(device: str, quick: bool) -> list[Shape]:
    """The networks that fit this machine, the most telling first."""
    if quick:
        return [tiny()]
    if device.startswith("cuda"):
        return [released(64, 64, 64), released(256, 16, 8), released(128, 32, 16)]
    return [small()]
