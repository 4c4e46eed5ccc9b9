"""Networks of the recorded figures: flags of 2021 to constructor arguments, weights and inputs by recipe."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from guided_diffusion.models.unet import EncoderUNetModel, SuperResModel, UNetModel

GOLDEN = Path(__file__).parent.parent / "golden"
CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}


def figures() -> tuple[dict[str, Any], Any]:
    return json.loads((GOLDEN / "golden.json").read_text()), np.load(GOLDEN / "golden.npz")


def layouts() -> dict[str, Any]:
    with gzip.open(GOLDEN / "checkpoint_layouts.json.gz", "rt") as file:
        return json.load(file)


def build(kind: str, flags: dict[str, Any], **more: Any) -> nn.Module:
    """The network of one set of 2021 flags; kind is "diffusion", "super_resolution" or "classifier"."""
    if kind == "classifier":
        size, width = flags["image_size"], flags["classifier_width"]
        arguments: dict[str, Any] = {
            "model_channels": width,
            "out_channels": 1000,
            "num_res_blocks": flags["classifier_depth"],
            "attention_resolutions": _rates(flags["classifier_attention_resolutions"], size),
            "use_scale_shift_norm": flags["classifier_use_scale_shift_norm"],
            "resblock_updown": flags["classifier_resblock_updown"],
            "num_head_channels": 64,
            "pool": flags["classifier_pool"],
        }
        make: Any = EncoderUNetModel
    else:
        size = flags["large_size"] if kind == "super_resolution" else flags["image_size"]
        same = ("num_res_blocks", "dropout", "use_checkpoint", "num_heads", "num_heads_upsample", "num_head_channels")
        arguments = {name: flags[name] for name in (*same, "use_scale_shift_norm", "resblock_updown")}
        arguments |= {
            "model_channels": flags["num_channels"],
            "out_channels": 6 if flags["learn_sigma"] else 3,
            "attention_resolutions": _rates(flags["attention_resolutions"], size),
            "num_classes": 1000 if flags["class_cond"] else None,
            "use_new_attention_order": flags.get("use_new_attention_order", False),
        }
        make = SuperResModel if kind == "super_resolution" else UNetModel
    mult = flags.get("channel_mult", "")
    # the 2021 upsampler lists multipliers of its own only where they are the same
    arguments["channel_mult"] = tuple(float(m) for m in mult.split(",")) if mult else _default_mult(kind, size)
    return make(image_size=size, in_channels=3, **(arguments | more)).eval()


def _default_mult(kind: str, size: int) -> tuple[float, ...]:
    if kind == "super_resolution" and size == 512:
        return (1, 1, 2, 2, 4, 4)
    return CHANNEL_MULT[size]


def _rates(resolutions: str, size: int) -> tuple[int, ...]:
    return tuple(size // int(resolution) for resolution in resolutions.split(","))


def fill(net: nn.Module) -> nn.Module:
    """Give every tensor of the state dict the value that its name stands for."""
    net.load_state_dict({key: tensor_of(key, tuple(value.shape)) for key, value in net.state_dict().items()})
    return net


def tensor_of(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = zlib.crc32(key.encode()) & 0x7FFFFFFF
    w = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    if w.ndim > 1:
        w = w / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    else:
        w = (1 if key.endswith("weight") else 0) + np.float32(0.1) * w
    return torch.from_numpy(w.astype(np.float32))


def normal(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
