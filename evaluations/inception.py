"""InceptionV3 of December 2015: the network behind FID, sFID, Inception Score, precision and recall.

The published scores rest on one frozen graph, `classify_image_graph_def.pb`. This module is that graph in PyTorch, with
the state-dict names under which its weights are published for PyTorch (472 tensors). It differs from the InceptionV3 of
the paper and of torchvision in three places that change the features: average pools do not count their padding, the
last block takes a maximum where the one before it takes an average, and the classifier has 1008 outputs.

Shapes: B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

BATCHNORM_EPS = 1e-3
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
NUM_CLASSES = 1008
Size = int | tuple[int, int]


class InceptionOutputs(NamedTuple):
    """What the scores need of a batch, float32."""

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
            # Each row of pixels as an image: from 16 images on, PyTorch gives 1x1 convolutions to oneDNN, else to a matrix
            # product with copies around it, which on some processors reaches less than half of the rate.
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
    """Branches side by side, joined along the channels. Each is a chain of convolutions under the published names."""

    def __init__(self) -> None:
        super().__init__()
        self.chains: dict[str, list[str]] = {}
        """Branch -> names of its convolutions, one after the other."""
        self.splits: dict[str, list[str]] = {}
        """Branch -> names of the two convolutions, 1x3 and 3x1, that stand side by side at its end, where it has such."""

    def add(
        self, branch: str, channels: int, *layers: tuple[int, Size] | tuple[int, Size, int], split: int = 0
    ) -> None:
        """Add a branch; `layers`: (channels out, kernel, stride). `split`: channels of each of the two last ones, if any."""
        alone = len(layers) == 1 and not split
        self.chains[branch] = [branch] if alone else [f"{branch}_{k}" for k in range(1, len(layers) + 1)]
        for name, (out, kernel, *stride) in zip(self.chains[branch], layers):
            height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
            padding = 0 if stride else (height // 2, width // 2)
            self.add_module(name, Conv(channels, out, kernel, stride[0] if stride else 1, padding))
            channels = out
        if split:
            self.splits[branch] = [f"{branch}_{len(layers) + 1}{letter}" for letter in "ab"]
            for name, (height, width) in zip(self.splits[branch], ((1, 3), (3, 1))):
                self.add_module(name, Conv(channels, split, (height, width), padding=(height // 2, width // 2)))

    def run(self, branch: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of one branch: one, or two where it splits."""
        for name in self.chains[branch]:
            x = getattr(self, name)(x)
        return [getattr(self, name)(x) for name in self.splits[branch]] if branch in self.splits else [x]


class Mixed35(Block):
    """35x35 block (`mixed`, `mixed_1`, `mixed_2`): 1x1, 5x5, double 3x3 and pooled branch."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.add("branch1x1", channels, (64, 1))
        self.add("branch5x5", channels, (48, 1), (64, 5))
        self.add("branch3x3dbl", channels, (64, 1), (96, 3), (96, 3))
        self.add("branch_pool", channels, (pooled, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [y for branch in ("branch1x1", "branch5x5", "branch3x3dbl") for y in self.run(branch, x)]
        return torch.cat(parts + self.run("branch_pool", _average(x)), 1)


class Reduce35(Block):
    """From 35x35 to 17x17 (`mixed_3`)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add("branch3x3", channels, (384, 3, 2))
        self.add("branch3x3dbl", channels, (64, 1), (96, 3), (96, 3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([*self.run("branch3x3", x), *self.run("branch3x3dbl", x), _halve(x)], 1)


class Mixed17(Block):
    """17x17 block (`mixed_4` .. `mixed_7`): 1x1, 7x7 in two steps, double 7x7 in four steps, pooled branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = (width, (1, 7)), (width, (7, 1))
        self.add("branch1x1", 768, (192, 1))
        self.add("branch7x7", 768, (width, 1), row, (192, (7, 1)))
        self.add("branch7x7dbl", 768, (width, 1), column, row, column, (192, (1, 7)))
        self.add("branch_pool", 768, (192, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.run("branch1x1", x) + self.others(x), 1)

    def others(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The three branches after the 1x1 one (whose output is read by itself in `mixed_6`)."""
        return self.run("branch7x7", x) + self.run("branch7x7dbl", x) + self.run("branch_pool", _average(x))


class Reduce17(Block):
    """From 17x17 to 8x8 (`mixed_8`)."""

    def __init__(self) -> None:
        super().__init__()
        self.add("branch3x3", 768, (192, 1), (320, 3, 2))
        self.add("branch7x7x3", 768, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([*self.run("branch3x3", x), *self.run("branch7x7x3", x), _halve(x)], 1)


class Mixed8(Block):
    """8x8 block (`mixed_9`, `mixed_10`): 1x1, two branches that split into 1x3 and 3x1, pooled branch."""

    def __init__(self, channels: int, pool_is_maximum: bool) -> None:
        super().__init__()
        self.pool_is_maximum = pool_is_maximum
        self.add("branch1x1", channels, (320, 1))
        self.add("branch3x3", channels, (384, 1), split=384)
        self.add("branch3x3dbl", channels, (448, 1), (384, 3), split=384)
        self.add("branch_pool", channels, (192, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [y for branch in ("branch1x1", "branch3x3", "branch3x3dbl") for y in self.run(branch, x)]
        return torch.cat(parts + self.run("branch_pool", _maximum(x) if self.pool_is_maximum else _average(x)), 1)


class InceptionV3(nn.Module):
    """The 2015 graph from its scaled input to its features; `fc` gives the logits of the Inception Score, **without** its bias.

    Made with random weights; `weights.load_inception` fills it. `sha256` is that of the weights file (empty until loaded);
    `verified` is true when it is a published one.
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
        self.Mixed_5b = Mixed35(192, 32)
        self.Mixed_5c = Mixed35(256, 64)
        self.Mixed_5d = Mixed35(288, 64)
        self.Mixed_6a = Reduce35(288)
        self.Mixed_6b = Mixed17(128)
        self.Mixed_6c = Mixed17(160)
        self.Mixed_6d = Mixed17(160)
        self.Mixed_6e = Mixed17(192)
        self.Mixed_7a = Reduce17()
        self.Mixed_7b = Mixed8(1280, pool_is_maximum=False)
        self.Mixed_7c = Mixed8(2048, pool_is_maximum=True)
        self.fc = nn.Linear(POOL_FEATURES, NUM_CLASSES)
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> InceptionOutputs:
        """Features of x [B, 3, 299, 299] in [-1, 1] (see `resize.to_inception_range`); outputs in float32."""
        if x.ndim != 4 or x.shape[1:] != (3, 299, 299):
            raise ValueError(f"the network takes [B, 3, 299, 299], got {tuple(x.shape)}; use resize.tf1_bilinear first")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        (first,) = self.Mixed_6d.run("branch1x1", x)
        # Row, column, channel: the order in which the graph lays out the tensor, and so the order of published mu_s.
        spatial = first[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = torch.cat([first, *self.Mixed_6d.others(x)], 1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.float().mean((2, 3))
        return InceptionOutputs(pool, spatial.float())

    def fold(self) -> InceptionV3:
        """Fold every normalisation into its convolution and store weights channels_last; returns self.

        About 1.6 times faster on a CPU; features move by some 4e-7 of the largest. State-dict names change
        (`conv.bias` instead of `bn.*`), so load weights before folding.
        """
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()
        self.folded = True
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
