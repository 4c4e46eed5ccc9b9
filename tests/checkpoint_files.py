"""Files of weights for tests: the released layouts, and small twins of each architecture, filled by the recorded recipe."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guided_diffusion import build
from guided_diffusion.config import RunConfig
from guided_diffusion.weights import identify
from guided_diffusion.weights.load import Loaded

GOLDEN = Path(__file__).parent / "golden"
Shapes = dict[str, tuple[int, ...]]


def layouts() -> dict[str, Any]:
    """By released name: kind, flags, and `keys` (name -> shape) of its state dict."""
    with gzip.open(GOLDEN / "checkpoint_layouts.json.gz", "rt") as file:
        return json.load(file)


def shapes_of(layout: dict[str, Any]) -> Shapes:
    return {key: tuple(shape) for key, shape in layout["keys"].items()}


# Each released architecture with fewer channels and smaller images. Heads stay in the same relation to the width.
_TWIN = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "8"}
_BASE = {
    **_TWIN, "diffusion_steps": 1000, "learn_sigma": True, "resblock_updown": True, "use_scale_shift_norm": True,
    "class_cond": True, "num_classes": 10, "num_res_blocks": 1,
}  # fmt: skip
_SR = {"large_size": 16, "small_size": 8}
_CRITIC = {
    "image_size": 16, "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "8",
    "classifier_channel_mult": "1,2", "classifier_num_head_channels": 16, "num_classes": 10,
}  # fmt: skip
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "64x64_diffusion": (
        "diffusion",
        {**_BASE, "num_res_blocks": 3, "num_head_channels": 16, "noise_schedule": "cosine", "use_new_attention_order": True},
    ),
    "128x128_diffusion": ("diffusion", {**_BASE, "num_heads": 4, "num_res_blocks": 2}),
    "256x256_diffusion": ("diffusion", {**_BASE, "num_head_channels": 16, "num_res_blocks": 2}),
    "256x256_diffusion_uncond": ("diffusion", {**_BASE, "num_head_channels": 16, "class_cond": False, "num_classes": 0}),
    "512x512_diffusion": ("diffusion", {**_BASE, "num_channels": 64, "channel_mult": "0.5,1", "num_head_channels": 16}),
    "64_256_upsampler": ("super_resolution", {**_BASE, **_SR, "num_heads": 4}),
    "128_512_upsampler": ("super_resolution", {**_BASE, **_SR, "num_head_channels": 16}),
    "64x64_classifier": ("classifier", {**_CRITIC, "classifier_depth": 4, "noise_schedule": "cosine"}),
    "256x256_classifier": ("classifier", _CRITIC),
    "march_2021": (  # improved-diffusion: convolutions change the size, steps are told on a scale of 1000
        "diffusion",
        {**_TWIN, "num_res_blocks": 2, "learn_sigma": True, "noise_schedule": "cosine", "diffusion_steps": 4000,
         "rescale_timesteps": True, "num_heads": 4},
    ),
}  # fmt: skip


def tensor_of(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value that a tensor's name stands for."""
    w = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
    if w.ndim > 1:
        w = w / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    else:
        w = (1 if key.endswith("weight") else 0) + np.float32(0.1) * w
    return torch.from_numpy(w.astype(np.float32))


def filled(kind: str, flags: dict[str, Any]) -> Loaded:
    """The network of these flags with the values of the recipe, ready to use."""
    config = RunConfig.from_flags(kind, flags)
    with torch.device("meta"):
        net = build.build_network(config.model, config.diffusion)
    state = {key: tensor_of(key, tuple(value.shape)) for key, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return Loaded(net.eval().requires_grad_(False), build.build_process(config.diffusion), config, "")


def meta_shapes(kind: str, flags: dict[str, Any]) -> Shapes:
    config = RunConfig.from_flags(kind, flags)
    with torch.device("meta"):
        net = build.build_network(config.model, config.diffusion)
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def enter_as_released(monkeypatch: Any, name: str, kind: str, flags: dict[str, Any], loaded: Loaded) -> None:
    """A small network stands for a released one: its layout is entered as that one's, with these flags."""
    shapes = {key: tuple(value.shape) for key, value in loaded.net.state_dict().items()}
    monkeypatch.setattr(identify, "SIGNATURES", {identify.signature(shapes): (name,)})
    monkeypatch.setattr(identify, "PRESETS", {name: identify.Preset(name, kind, flags)})


def outputs(loaded: Loaded) -> torch.Tensor:
    """What the network says about two fixed images."""
    model = loaded.config.model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, model.image_channels, *model.size, generator=generator)
    cond: dict[str, torch.Tensor] = {}
    if getattr(model, "class_cond", False):
        cond["y"] = torch.tensor([1, 3])
    if loaded.kind == "super_resolution":
        cond["low_res"] = torch.randn(2, model.image_channels, model.small_size, model.small_size, generator=generator)
    with torch.no_grad():
        return loaded.net(x, torch.tensor([7.0, 600.0]), **cond)


# A small generator and the classifier that guides it, for commands that sample.
_SIDES = {"image_size": 8, "num_classes": 4, "diffusion_steps": 100}
BASE = {**_SIDES, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4",
        "num_heads": 2, "class_cond": True, "learn_sigma": True}  # fmt: skip
CRITIC = {**_SIDES, "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "4",
          "classifier_channel_mult": "1,2", "classifier_num_head_channels": 16}  # fmt: skip
