"""A small generator and the classifier that guides it, with random weights of usual size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guided_diffusion import build
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, ModelConfig, RunConfig


@dataclass(frozen=True)
class Shape:
    """The configurations of the two networks and of their process."""

    model: ModelConfig
    classifier: ClassifierConfig
    diffusion: DiffusionConfig = DiffusionConfig(learn_sigma=True, rescale_learned_sigmas=True)

    @property
    def config(self) -> RunConfig:
        """As a training run of the generator would have it."""
        return RunConfig(model=self.model, diffusion=self.diffusion)


class Batch(NamedTuple):
    """A training batch as a loss takes it."""

    images: Tensor  # float [B, C, H, W]
    labels: Tensor
    positions: Tensor


def small(num_channels: int = 32, image_size: int = 16) -> Shape:
    """In the shape of the released 64x64 networks: four levels, attention on three of them, ten classes."""
    generator: dict[str, Any] = {"num_res_blocks": 1, "attention_resolutions": "32,16,8", "channel_mult": "1,2,3,4"}
    generator |= {"resblock_updown": True, "class_cond": True, "num_head_channels": 32}
    critic = {"classifier_width": num_channels, "classifier_depth": 1, "classifier_num_head_channels": 32}
    return Shape(
        ModelConfig(image_size=image_size, num_channels=num_channels, num_classes=10, **generator),
        ClassifierConfig(image_size=image_size, classifier_channel_mult="1,2,3,4", num_classes=10, **critic),
    )


def stir(net: nn.Module, seed: int = 0) -> Any:
    """Random weights everywhere; a fresh network ends in zeros, which would make half of it trivial."""
    device = next(net.parameters()).device
    source = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=source, device=device)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return net.eval()


def generator(shape: Shape, device: str = "cpu") -> Any:
    """The generator with random weights."""
    with torch.device(device):
        return stir(build.build_model(shape.model, shape.diffusion))


def critic(shape: Shape, device: str = "cpu") -> Any:
    """The classifier with random weights."""
    with torch.device(device):
        return stir(build.build_classifier(shape.classifier), seed=1)


def training_batch(shape: Shape, count: int = 4) -> Batch:
    """Images of noise, as the data room finishes them."""
    size, source = shape.model.image_size, torch.Generator().manual_seed(3)
    noise = 2 * torch.rand(count, 3, size, size, generator=source) - 1
    return Batch(noise, torch.arange(count) % shape.model.num_classes, torch.arange(count))
