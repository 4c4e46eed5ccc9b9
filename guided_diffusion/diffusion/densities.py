"""Normal distributions: KL divergence, the likelihood of 8-bit pixels, and means over all axes but the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) elementwise, in nats. Arguments broadcast; all but one may be numbers."""
    like = next((value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, Tensor)), None)
    if like is None:
        raise ValueError("normal_kl needs at least one tensor among its four arguments")
    logvar1, logvar2 = (v if isinstance(v, Tensor) else torch.as_tensor(v).to(like) for v in (logvar1, logvar2))
    return 0.5 * (logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """P(N(0, 1) <= x), Page's approximation (1977), within 2e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability in nats of 8-bit values under normals of standard deviation e^log_scales, elementwise.

    `x` holds 0..255 mapped to [-1, 1]: a bin is 2/255 wide, and the outermost two reach to infinity (arXiv 2006.11239, eq. 13).
    """
    if not x.shape == means.shape == log_scales.shape:
        shapes = ", ".join(str(tuple(value.shape)) for value in (x, means, log_scales))
        raise ValueError(f"x, means and log_scales must have one shape; got {shapes}")
    centered, inverse_scale = x - means, torch.exp(-log_scales)
    cdf_upper = approx_standard_normal_cdf(inverse_scale * (centered + 1.0 / 255.0))  # at the upper edge of the bin
    cdf_lower = approx_standard_normal_cdf(inverse_scale * (centered - 1.0 / 255.0))
    probability = torch.where(x > 0.999, 1.0 - cdf_lower, cdf_upper - cdf_lower)
    return torch.log(torch.where(x < -0.999, cdf_upper, probability).clamp(min=1e-12))


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over everything but the batch axis, `[B, ...] -> [B]`."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per example, `[B]`."""
    return mean_flat((a - b) ** 2)
