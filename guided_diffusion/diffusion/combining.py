"""What guidance is made of besides gradients: strength by noise level, two predictions combined, one prediction corrected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoiser import ByLevel, Denoised, Denoiser, Net, at_level, bounded, failures_kept
from .process import Process

# The strength of a guidance: a number, a tensor that broadcasts to x, or a function of the noise level sigma = sqrt(1/alpha_bar - 1),
# a number of the host, whose None is no guidance at that level.
Scale = float | Tensor | Callable[[float], float | None]


@dataclass(frozen=True)
class Interval:
    """A `Scale`: `value` where low < sigma <= high, elsewhere no guidance."""

    value: float
    low: float
    high: float

    def __call__(self, sigma: float) -> float | None:
        return self.value if self.low < sigma <= self.high else None


def interval(value: float, low: float, high: float) -> Interval:
    """Guidance of the strength `value` where low < sigma <= high only (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Elsewhere it is left out: neither a classifier nor a second network is called there.
    """
    check_scale(value)
    if not 0 <= low < high:
        raise ValueError(f"an interval of noise levels needs 0 <= low < high; got {low} and {high}")
    return Interval(value, low, high)


def scale_at(scale: Scale, sigma: float, neutral: float) -> float | Tensor:
    """The strength at the noise level `sigma`; `neutral`, which does nothing, where the scale is None."""
    value = scale(sigma) if callable(scale) else scale
    return neutral if value is None else value


def check_scale(scale: Scale) -> Scale:
    """`scale`, or ValueError where it is no finite number."""
    if not callable(scale) and not isinstance(scale, Tensor) and (isinstance(scale, str) or not math.isfinite(scale)):
        raise ValueError(f"scale={scale!r} of the guidance must be a finite number; 0 is none")
    return scale


def by_level(
    make: Callable[..., Denoiser], scale: Scale, neutral: float, process: Process | None, *denoisers: Denoiser
) -> Denoiser:
    """`make(scale, *denoisers)`; the first of `denoisers` alone where the scale is `neutral`. A `ByLevel` if scale or denoisers vary."""

    def at(sigma: float) -> Denoiser:
        value = scale_at(scale, sigma, neutral)
        here = [at_level(denoise, sigma) for denoise in denoisers]
        return here[0] if not isinstance(value, Tensor) and value == neutral else make(check_scale(value), *here)

    levels = [denoise.process for denoise in denoisers if isinstance(denoise, ByLevel)]
    if not callable(scale) and not levels:
        return at(math.nan)
    if process is None and not levels:
        raise ValueError("a scale that is a function of the noise level needs the process: give process=")
    return ByLevel(process or levels[0], at)


def wrapped(make: Callable[[Denoiser], Denoiser], denoise: Denoiser) -> Denoiser:
    """`make(denoise)`, at each noise level if `denoise` varies."""
    if not isinstance(denoise, ByLevel):
        return make(denoise)
    return ByLevel(denoise.process, lambda sigma: make(denoise.make(sigma)))


def classifier_free(
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: Scale,
    process: Process | None = None,
    *,
    rescale: float = 0.0,
) -> Denoiser:
    """From the unconditional prediction towards and past the conditional one; 0 is the former, 1 the latter (Ho & Salimans 2022).

    `unconditional` may be any weaker prediction: of a weaker model (autoguidance, Karras et al. 2024, arXiv 2406.02507), or of the same
    network for a random label (Sadat et al. 2024, arXiv 2407.02687). The variance is the conditional one's. With scale 1 the weaker
    network is not called. Neither should be clipped before. `rescale`: see `rescaled`. A scale that is a function needs the process.
    """

    def make(scale: Any, strong: Denoiser, weak: Denoiser) -> Denoiser:
        return _away(strong, weak, scale - 1, rescale)

    return by_level(make, scale, 1.0, process, conditional, unconditional)


def pag(
    denoise: Denoiser, perturbed: Denoiser, scale: Scale, process: Process | None = None, *, rescale: float = 0.0
) -> Denoiser:
    """Away from the prediction of the network with attention `perturbed` in some layers (Ahn et al. 2024, arXiv 2403.17377).

    x0 moves by `scale` times the difference; 0 is none. Other programs may call 1 + scale the scale.
    """

    def make(scale: Any, strong: Denoiser, weak: Denoiser) -> Denoiser:
        return _away(strong, weak, scale, rescale)

    return by_level(make, scale, 0.0, process, denoise, perturbed)


def _away(strong: Denoiser, weak: Denoiser, distance: Any, rescale: float) -> Denoiser:
    def guided(x: Tensor, i: Tensor) -> Denoised:
        best = strong(x, i)
        x0 = best.x0 + distance * (best.x0 - weak(x, i).x0)
        return best.moved(rescaled(x0, best.x0, rescale))

    return guided


def rescaled(x0: Tensor, conditional: Tensor, share: float) -> Tensor:
    """`share` of the way to x0 with the standard deviation of the conditional prediction, by example.

    Lin et al. 2023, arXiv 2305.08891, section 3.4. 0 leaves x0 as it is.
    """
    if not share:
        return x0
    ratio = _by_example(torch.std, conditional) / _by_example(torch.std, x0)
    return x0 * (share * ratio + (1 - share))


def _by_example(reduce: Callable[..., Tensor], values: Tensor) -> Tensor:
    return reduce(values, dim=tuple(range(1, values.ndim)), keepdim=True)


def apg(
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: Scale,
    process: Process | None = None,
    *,
    eta: float = 0.0,
    norm: float = 0.0,
    momentum: float = 0.0,
    rescale: float = 0.0,
    memory: dict[str, Tensor] | None = None,
) -> Denoiser:
    """`classifier_free` with a changed difference of the predictions (Sadat et al. 2024, arXiv 2410.02416, algorithm 1).

    `momentum` times the last difference is added to it; an example's difference longer than `norm` (0 = any) is cut to it; of its part
    along the conditional prediction only `eta` is kept. Momentum needs `memory`, an empty dict for each chain: such a denoiser
    depends on its last call and cannot be recorded or compiled.
    """
    if momentum and memory is None:
        raise ValueError(f"momentum={momentum} needs memory={{}}, a new one for each chain")

    def make(scale: Any, strong: Denoiser, weak: Denoiser) -> Denoiser:
        def guided(x: Tensor, i: Tensor) -> Denoised:
            best = strong(x, i)
            difference = best.x0 - weak(x, i).x0
            if momentum and memory is not None:
                difference = difference + momentum * memory.get("difference", torch.zeros_like(difference))
                memory["difference"] = difference
            if norm:
                difference = difference * (norm / _by_example(torch.linalg.vector_norm, difference)).clamp(max=1)
            along = _by_example(torch.sum, difference * best.x0) / _by_example(torch.sum, best.x0 * best.x0)
            difference = difference - (1 - eta) * along * best.x0
            return best.moved(rescaled(best.x0 + (scale - 1) * difference, best.x0, rescale))

        return guided

    return by_level(make, scale, 1.0, process, conditional, unconditional)


# (x, i) -> (the prediction, the attention that each of T pixels receives [B, T]: mean over heads, sum over queries).
Watched = Callable[[Tensor, Tensor], tuple[Denoised, Tensor]]


def watching(make: Callable[[Net], Denoiser], net: Callable[..., tuple[Tensor, Tensor]]) -> Watched:
    """A `Watched` from `net(x, time, **cond) -> (output, attention)` and from `make`, which reads a network as a denoiser."""

    def predict(x: Tensor, i: Tensor) -> tuple[Denoised, Tensor]:
        seen: list[Tensor] = []

        def plain(*args: Any, **cond: Any) -> Tensor:
            output, attention = net(*args, **cond)
            seen.append(attention)
            return output

        return make(plain)(x, i), seen[0]

    return predict


def sag(
    denoise: Denoiser,
    process: Process,
    watched: Watched,
    scale: Scale,
    *,
    blur: float = 3.0,
    kernel: int = 31,
) -> Denoiser:
    """Away from the prediction for an x whose most attended pixels are blurred (Hong et al. 2023, arXiv 2210.00939).

    `watched` is `denoise` and the attention of one layer. Pixels count as attended where the attention is above its mean, 1. `blur`
    is the deviation of the Gaussian kernel in pixels, `kernel` its width. Costs one call of each. 0 is none. Unclipped predictions.
    """
    if not (blur > 0 and kernel >= 1):
        raise ValueError(f"blur={blur} must be above 0, and kernel={kernel} at least 1")

    def make(scale: Any, denoise: Denoiser) -> Denoiser:
        def guided(x: Tensor, i: Tensor) -> Denoised:
            plain, attention = watched(x, i)
            height, width = x.shape[2:]
            rows = round(math.sqrt(attention.shape[1] * height / width))
            mask = (attention > 1).to(x.dtype).view(len(x), 1, rows, -1)
            mask = F.interpolate(mask, (height, width), mode="nearest")
            clean = plain.x0.clamp(-1, 1)
            mixed = torch.lerp(clean, blurred(clean, blur, kernel), mask)
            # The eps that belongs to the prediction is kept: x moves by sqrt(alpha_bar) times what x0 moves by.
            worse = x + process.at("sqrt_alpha_bar", i, x) * (mixed - plain.x0)
            # eps + scale (eps - eps of the blurred), said of x0
            return plain.moved(plain.x0 + scale * (mixed - denoise(worse, i).x0))

        return guided

    return by_level(make, scale, 0.0, process, denoise)


def blurred(images: Tensor, deviation: float, kernel: int) -> Tensor:
    """Images `[B, C, H, W]` under a Gaussian kernel, mirrored at their edges; the kernel is at most as wide as mirroring allows."""
    for dim in (2, 3):
        half = min(kernel // 2, images.shape[dim] - 1)
        weights = (
            torch.arange(-half, half + 1, device=images.device, dtype=images.dtype).div(deviation).square().mul(-0.5)
        )
        sizes = [1, 1, 1, 1]
        sizes[dim] = -1
        padding = (half, half, 0, 0) if dim == 3 else (0, 0, half, half)
        line = weights.softmax(0).view(sizes).expand(images.shape[1], -1, -1, -1)
        images = F.conv2d(F.pad(images, padding, mode="reflect"), line, groups=images.shape[1])
    return images


def scale_eps(denoise: Denoiser, process: Process, scale: float | Tensor = 1.0, *, slope: float = 0.0) -> Denoiser:
    """Divide eps by `slope` n + `scale`, n the step of `process`, which is the chain's (Ning et al. 2023, arXiv 2308.15321).

    It belongs to each network by itself, before its prediction is clipped or combined.
    """

    def make(denoise: Denoiser) -> Denoiser:
        def scaled(x: Tensor, i: Tensor) -> Denoised:
            plain = denoise(x, i)
            share = 1 / (scale + slope * i.to(x.dtype).view(-1, *(1,) * (x.ndim - 1)))
            # where eps is 0, x0 is x / sqrt(alpha_bar)
            return plain.moved(torch.lerp(process.at("sqrt_recip_alpha_bar", i, x) * x, plain.x0, share))

        return scaled

    check_scale(scale)
    if not isinstance(scale, Tensor) and min(scale, scale + slope * (len(process) - 1)) <= 0:
        raise ValueError(
            f"epsilon_scale={scale}, slope {slope}: noise is divided by it, so it must be above 0, such as 1.004"
        )
    return wrapped(make, denoise)


def clipped(denoise: Denoiser) -> Denoiser:
    """Clamp x0 to [-1, 1]. What is infinite becomes nan."""
    return _corrected(denoise, lambda x0: bounded(failures_kept(x0), True))


def threshold(denoise: Denoiser, p: float = 0.995) -> Denoiser:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487): clamp x0 to [-S, S] and divide by S.

    S is the `p`-quantile of |x0| over an example, interpolated linearly; 1 if it is below. What is infinite becomes nan.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"threshold={p} must lie between 0 and 1, as 0.995 does")

    def correct(x0: Tensor) -> Tensor:
        x0 = failures_kept(x0)
        # sorted: torch.quantile takes at most 16 million elements and no half precision
        levels = x0.abs().flatten(1).to(torch.promote_types(x0.dtype, torch.float32)).sort(dim=1).values
        place = p * (levels.shape[1] - 1)
        low, high = levels[:, math.floor(place)], levels[:, math.ceil(place)]
        limit = torch.lerp(low, high, place - math.floor(place)).clamp(min=1).to(x0.dtype)
        limit = limit.view(-1, *(1,) * (x0.ndim - 1))
        return x0.clamp(-limit, limit) / limit

    return _corrected(denoise, correct)


def _corrected(denoise: Denoiser, correct: Callable[[Tensor], Tensor]) -> Denoiser:
    def make(denoise: Denoiser) -> Denoiser:
        def corrected(x: Tensor, i: Tensor) -> Denoised:
            plain = denoise(x, i)
            return plain.moved(correct(plain.x0))

        return corrected

    return wrapped(make, denoise)
