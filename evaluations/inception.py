"""InceptionV3 of December 2015: the network behind FID, sFID, Inception Score, precision and recall.

Published scores are computed with one frozen graph, `classify_image_graph_def.pb`. This module is that graph in PyTorch, with the
state-dict names under which its weights are published for PyTorch (472 tensors). It differs from the InceptionV3 of the paper and
of torchvision in three ways: average pools do not count their padding, the pooled branch of the last block takes a maximum instead
of an average, and the classifier has 1008 outputs.

Shapes: B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

BATCHNORM_EPS = 1e-3
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
NUM_CLASSES = 1008
SPLIT = (0, 0)
Size = int | tuple[int, int]
Layers = list[Any]


class InceptionOutputs(NamedTuple):
    """Features of a batch from which the scores are computed, float32."""

    pool: torch.Tensor
    """[B, 2048], `pool_3` of the graph: FID, precision, recall."""
    spatial: torch.Tensor
    """[B, 2023], first 7 channels of `mixed_6/conv` as (row, column, channel): sFID."""


class Frozen(nn.Module):
    """Batch normalisation by stored statistics: (x - mean) / sqrt(variance + 0.001) * weight + bias."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=BATCHNORM_EPS)


class Conv(nn.Module):
    """Convolution without bias, frozen batch normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn: Frozen | nn.Identity = Frozen(channels_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        if conv.bias is not None and conv.kernel_size == (1, 1) and x.device.type == "cpu":
            # Pass each row of pixels as an image of its own: PyTorch uses oneDNN for 1x1 convolutions of 16 images or more, else a
            # matrix product with copies, which on some processors is less than half as fast.
            n, c, height, width = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(n * height, 1, width, c).permute(0, 3, 1, 2)
            y = F.conv2d(rows, conv.weight, conv.bias).permute(0, 2, 3, 1).reshape(n, height, width, -1)
            return F.relu(y.permute(0, 3, 1, 2), inplace=True)
        return F.relu(self.bn(conv(x)), inplace=True)

    def fold(self) -> None:
        """Move the normalisation into the convolution; computed in float64, stored in the dtype of the weights."""
        bn = self.bn
        if not isinstance(bn, Frozen):
            return
        scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + BATCHNORM_EPS)
        bias = bn.bias.double() - bn.running_mean.double() * scale
        weight = self.conv.weight
        self.conv.weight = nn.Parameter((weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), False)
        self.conv.bias = nn.Parameter(bias.to(weight.dtype), False)
        self.bn = nn.Identity()


def _average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2)


class Block(nn.Module):
    """Parallel branches, concatenated along the channels: branch name -> its layers (output channels, kernel, stride) in sequence.

    The branch `branch_pool` gets the pooled input; a block without it has the halved input as its last branch. The kernel SPLIT
    stands for two parallel convolutions at the end of a branch, 1x3 and 3x1. Modules have the published names.
    """

    def __init__(
        self, channels: int, pool: Callable[[torch.Tensor], torch.Tensor] = _average, **branches: Layers
    ) -> None:
        super().__init__()
        self.pool = pool
        self.chains: dict[str, list[list[str]]] = {}
        """Branch -> names of the convolutions of each of its layers: one, or two for a SPLIT."""
        for branch, layers in branches.items():
            self.chains[branch], width = [], channels
            for k, (out, kernel, *stride) in enumerate(layers, 1):
                name = branch if len(layers) == 1 else f"{branch}_{k}"
                kernels = {name: (kernel, kernel) if isinstance(kernel, int) else kernel}
                if kernel == SPLIT:
                    kernels = {f"{name}a": (1, 3), f"{name}b": (3, 1)}
                for module, (height, across) in kernels.items():
                    padding = 0 if stride else (height // 2, across // 2)
                    self.add_module(module, Conv(width, out, (height, across), stride[0] if stride else 1, padding))
                self.chains[branch].append(list(kernels))
                width = out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for branch, chain in self.chains.items():
            parts = [self.pool(x) if branch == "branch_pool" else x]
            for names in chain:
                parts = [getattr(self, name)(parts[0]) for name in names]
            outputs += parts
        if "branch_pool" not in self.chains:
            outputs.append(_halve(x))
        return torch.cat(outputs, 1)


def _mixed35(channels: int, pooled: int) -> Block:
    """35x35 block (`mixed`, `mixed_1`, `mixed_2`): 1x1, 5x5, double 3x3 and pooled branch."""
    dbl = [(64, 1), (96, 3), (96, 3)]
    return Block(
        channels, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=dbl, branch_pool=[(pooled, 1)]
    )


def _mixed17(width: int) -> Block:
    """17x17 block (`mixed_4` .. `mixed_7`): 1x1, 7x7 in two steps, double 7x7 in four steps, pooled branch."""
    row, column = (width, (1, 7)), (width, (7, 1))
    two = [(width, 1), row, (192, (7, 1))]
    four = [(width, 1), column, row, column, (192, (1, 7))]
    return Block(768, branch1x1=[(192, 1)], branch7x7=two, branch7x7dbl=four, branch_pool=[(192, 1)])


def _mixed8(channels: int, pool: Callable[[torch.Tensor], torch.Tensor]) -> Block:
    """8x8 block (`mixed_9`, `mixed_10`): 1x1, two branches that split into 1x3 and 3x1, pooled branch."""
    one, dbl = [(384, 1), (384, SPLIT)], [(448, 1), (384, 3), (384, SPLIT)]
    return Block(channels, pool, branch1x1=[(320, 1)], branch3x3=one, branch3x3dbl=dbl, branch_pool=[(192, 1)])


class InceptionV3(nn.Module):
    """The 2015 graph from its scaled input to its features. The Inception Score uses `fc` **without** its bias.

    It starts with random weights; `weights.load_inception` loads the published ones. `sha256`: of the weights file (empty until
    loaded). `verified`: whether that is a published file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = ""
        self.verified = False
        self.folded = False
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = _mixed35(192, 32)
        self.Mixed_5c = _mixed35(256, 64)
        self.Mixed_5d = _mixed35(288, 64)
        self.Mixed_6a = Block(288, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)])
        self.Mixed_6b = _mixed17(128)
        self.Mixed_6c = _mixed17(160)
        self.Mixed_6d = _mixed17(160)
        self.Mixed_6e = _mixed17(192)
        long = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
        self.Mixed_7a = Block(768, branch3x3=[(192, 1), (320, 3, 2)], branch7x7x3=long)
        self.Mixed_7b = _mixed8(1280, _average)
        self.Mixed_7c = _mixed8(2048, _maximum)
        self.fc = nn.Linear(POOL_FEATURES, NUM_CLASSES)
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> InceptionOutputs:
        """Features of x [B, 3, 299, 299] in [-1, 1] (see `resize.to_inception_range`); outputs in float32."""
        if x.ndim != 4 or x.shape[1:] != (3, 299, 299):
            raise ValueError(f"the network takes [B, 3, 299, 299], got {tuple(x.shape)}; use resize.tf1_bilinear first")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # The first channels are those of the block's first branch, branch1x1. Order (row, column, channel) as in the graph, and thus
        # in published mu_s.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.float().mean((2, 3))
        return InceptionOutputs(pool, spatial.float())

    def fold(self) -> InceptionV3:
        """Fold every normalisation into its convolution and store weights channels_last; returns self.

        About 1.6 times faster on a CPU; features change by about 4e-7 of the largest. State-dict names change
        (`conv.bias` instead of `bn.*`), so load weights before folding.
        """
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()
        self.folded = True
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
