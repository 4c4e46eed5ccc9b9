"""The networks that are measured, by name: a tiny one, one that a CPU can run, and the released ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guided_diffusion import build
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, ModelConfig, RunConfig
from guided_diffusion.weights import released as presets

from .plain import Plain


@dataclass(frozen=True)
class Shape:
    """A generator, the classifier that guides it, and batch sizes for a forward pass and for a training step."""

    name: str
    model: ModelConfig
    classifier: ClassifierConfig
    batch: int
    train_batch: int
    diffusion: DiffusionConfig = DiffusionConfig(learn_sigma=True, rescale_learned_sigmas=True)

    @property
    def config(self) -> RunConfig:
        """As a training run would have it."""
        return RunConfig(model=self.model, diffusion=self.diffusion)


class Batch(NamedTuple):
    """A training batch as the loader gives it."""

    images: Tensor  # uint8 [B, H, W, C]
    labels: Tensor
    positions: Tensor


def small(num_channels: int = 64, image_size: int = 64, batch: int = 2, train_batch: int = 4) -> Shape:
    """A 64x64 network in the shape of the released ones, of 18 million parameters at 64 channels."""
    model = ModelConfig(
        image_size=image_size,
        num_channels=num_channels,
        num_res_blocks=1,
        attention_resolutions="32,16,8",
        num_head_channels=32,
        channel_mult="1,2,3,4",
        resblock_updown=True,
        class_cond=True,
        num_classes=10,
    )
    classifier = ClassifierConfig(
        image_size=image_size,
        classifier_width=max(32, num_channels // 2),
        classifier_depth=1,
        classifier_num_head_channels=32,
        classifier_channel_mult="1,2,3,4",
        num_classes=10,
    )
    name = f"{image_size}px, {num_channels} channels"
    return Shape(name, model, classifier, batch, train_batch)


def tiny() -> Shape:
    """As `small`, of half the size and half the channels: for a look within a minute."""
    return replace(small(num_channels=32, image_size=32), name="32px, 32 channels")


def released(size: int, batch: int, train_batch: int) -> Shape:
    """The class-conditional network released for this image size, with its classifier."""
    model = presets.get(f"{size}x{size}_diffusion")
    classifier = presets.get(f"{size}x{size}_classifier")
    assert isinstance(model.model, ModelConfig) and isinstance(classifier.model, ClassifierConfig)
    return Shape(f"released {size}px", model.model, classifier.model, batch, train_batch, model.diffusion)


def with_train_batch(shape: Shape, size: int) -> Shape:
    """The shape with another batch to train on."""
    return replace(shape, train_batch=size)


def stir(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of usual size everywhere; a fresh network ends in zeros, which would make half of it trivial."""
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return net.eval()


def generator(shape: Shape, device: str = "cpu") -> Any:
    """The generator with random weights."""
    with torch.device(device):  # hundreds of millions of numbers are drawn faster where they are needed
        return stir(build.build_model(shape.model, shape.diffusion))


def critic(shape: Shape, device: str = "cpu") -> Any:
    """The classifier with random weights."""
    with torch.device(device):
        return stir(build.build_classifier(shape.classifier), seed=1)


def plainly(net: Any, dtype: torch.dtype = torch.float32) -> Plain:
    """A plain variant with copies of the weights in the usual layout, which ask for gradients as a fresh network's do.

    In float16 the torso's convolutions are stored so, and all else stays float32, as in 2021.
    """
    twin = copy.deepcopy(net).requires_grad_(True)
    twin.set_compute_dtype(dtype, store=dtype != torch.float32)
    for parameter in twin.parameters():
        parameter.data = parameter.data.contiguous()
    return Plain(twin)


def inputs(shape: Shape, batch: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Noise [B, C, H, W], times and labels."""
    generator = torch.Generator().manual_seed(2)
    size = shape.model.image_size
    x = torch.randn(batch, shape.model.image_channels, size, size, generator=generator).to(device)
    y = torch.arange(batch, device=device) % shape.model.num_classes
    return x, torch.linspace(3, 900, batch, device=device), y


def training_batch(shape: Shape, device: str = "cpu") -> Batch:
    """Random pixels."""
    size, count = shape.model.image_size, shape.train_batch
    pixels = torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    labels = torch.arange(count) % shape.model.num_classes
    return Batch(pixels.to(device), labels.to(device), torch.arange(count))
