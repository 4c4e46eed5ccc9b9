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

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
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


class Mixed35(nn.Module):
    """35x35 block (`mixed`, `mixed_1`, `mixed_2`): 1x1, 5x5, double 3x3 and pooled branch."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class Reduce35(nn.Module):
    """From 35x35 to 17x17 (`mixed_3`)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halve(x)], 1)


class Mixed17(nn.Module):
    """17x17 block (`mixed_4` .. `mixed_7`): 1x1, 7x7 in two steps, double 7x7 in four steps, pooled branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, **row)  # type: ignore[arg-type]
        self.branch7x7_3 = Conv(width, 192, **column)  # type: ignore[arg-type]
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, **column)  # type: ignore[arg-type]
        self.branch7x7dbl_3 = Conv(width, width, **row)  # type: ignore[arg-type]
        self.branch7x7dbl_4 = Conv(width, width, **column)  # type: ignore[arg-type]
        self.branch7x7dbl_5 = Conv(width, 192, **row)  # type: ignore[arg-type]
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch1x1(x), *self.others(x)], 1)

    def others(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The three branches after the 1x1 one (whose output is read by itself in `mixed_6`)."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [seven, double, self.branch_pool(_average(x))]


class Reduce17(nn.Module):
    """From 17x17 to 8x8 (`mixed_8`)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, _halve(x)], 1)


class Mixed8(nn.Module):
    """8x8 block (`mixed_9`, `mixed_10`): 1x1, two branches that split into 1x3 and 3x1, pooled branch."""

    def __init__(self, channels: int, pool_is_maximum: bool) -> None:
        super().__init__()
        self.pool_is_maximum = pool_is_maximum
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _maximum(x) if self.pool_is_maximum else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """The 2015 graph from its scaled input to its features; `fc` gives the logits of the Inception Score, **without** its bias.

    Made with zero-information weights; `weights.load_inception` fills it. `source` and `sha256` tell where the weights
    came from (empty until loaded); `verified` is true when that hash is the published one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.source = ""
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
        first = self.Mixed_6d.branch1x1(x)
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
