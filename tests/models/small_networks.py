"""Small networks with every weight away from zero (a fresh network answers zero everywhere)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.models.unet import EncoderUNetModel, SuperResModel, UNetModel


def stir(net: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return net.eval()


SMALL: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
}


def unet(**changes: Any) -> UNetModel:
    return stir(UNetModel(**{**SMALL, "use_scale_shift_norm": True, "resblock_updown": True, **changes}))


def super_res(**changes: Any) -> SuperResModel:
    return stir(SuperResModel(**{**SMALL, **changes}))


def classifier(pool: str = "attention", **changes: Any) -> EncoderUNetModel:
    options: dict[str, Any] = {
        "channel_mult": (1, 2),
        "num_head_channels": 16,
        "pool": pool,
        "use_scale_shift_norm": True,
    }
    options["attention_resolutions"] = (2,)
    return stir(EncoderUNetModel(8, 3, 32, 10, 1, **(options | changes)))


def images(n: int = 2, channels: int = 3, size: tuple[int, ...] = (8, 8), seed: int = 1) -> Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed))


def times(n: int = 2) -> Tensor:
    return torch.linspace(3, 900, n)
