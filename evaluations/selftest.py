"""`evaluator.py selftest`: does this machine compute what the 2021 evaluator computes?

Needs neither a weights file nor the internet. Images, features and weights of the Inception network come from
`numpy.random.RandomState`, which gives the same bits everywhere. The expected numbers were recorded from the original evaluator
(TensorFlow 2.21, SciPy 1.17) on the same inputs, and from exact arithmetic where that evaluator has rounding noise.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from guided_diffusion.runtime.launchers import Place

from . import metrics, neighbours
from .commands import Parser
from .encoders import InceptionEncoder
from .features import extract, pick_device
from .inception import Conv, Frozen, InceptionV3
from .resize import tf1_bilinear
from .scoring import evaluate
from .settings import Settings
from .weights import scope_names

_CONV_SHA256 = "3668bf7666429340374164858a3bd8e8eb1d7f703563c9442aa7cd740c7fede3"
_RESIZED = {
    (3007, 1, 7, 1000): "8cc86b43397c7b2229395c7d9319cfe614b0882b8f00ef4b4f7c543e6b6d6423",
    (2005, 2, 2, 3): "d0bdff1ec46bda7ead482eb79ccc7b7ca423b6759d6e1d1e075262802c8c20bb",
    (2130, 2, 50, 80): "fdd2f157e52b6d6c88d3bd5072ce74aaf7ea175e9a6fb5a0f85196dd58c7d926",
    (2512, 2, 256, 256): "8b24c5a9c6c610a5e171f4c883bd514c7567f61f111052780dea494f2ceb87bb",
    (2128, 2, 64, 64): "4c8c425499df8b8488b3d23e731ef2e1e899f78b2c9af09853e0e7f6d4369196",
    (2064, 3, 32, 32): "56aecc974a937c1cc854acdc9eb6e701cd660b8312d11b7ae770d48735da40ec",
}
_POOL_SUMS = (2917.6887170159025, 1847.6005723600683, 2456.9368474541407, 2287.5230885860874)
_SPATIAL_SUMS = (2253.3724092449993, 1559.5471932645887, 2121.993172965944, 1904.8991069756448)


class Check(NamedTuple):
    """One number: the computed one, the expected one, the relative tolerance (0 = must be equal)."""

    name: str
    found: float | str
    expected: float | str
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the number is within its tolerance."""
        if isinstance(self.found, str) or isinstance(self.expected, str):
            return self.found == self.expected
        return abs(self.found - self.expected) <= self.tolerance * abs(self.expected)

    def line(self) -> str:
        """One line of the table."""
        found, expected = (value[:12] if isinstance(value, str) else repr(value) for value in self[1:3])
        rule = f"within {self.tolerance:g}" if self.tolerance else "equal"
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {found}, expected {expected} ({rule})"


def synthetic_features(seed: int, n: int, d: int, k: int = 8, **change: float) -> np.ndarray:
    """float32 [n, d], non-negative, near a k-dimensional plane; element-wise arithmetic only, so the same everywhere."""
    shift, spread = change.get("shift", 0.3), change.get("spread", 1.0)
    plane = np.random.RandomState(99).standard_normal((k, d)) / math.sqrt(k)
    source = np.random.RandomState(seed)
    coordinates = source.standard_normal((n, k)) * spread
    points = shift + change.get("noise", 0.2) * source.standard_normal((n, d))
    for axis in range(k):
        points = points + coordinates[:, axis : axis + 1] * plane[axis : axis + 1]
    return (np.maximum(points, 0) * change.get("scale", 1.0)).astype(np.float32)


def synthetic_images(seed: int, n: int, height: int, width: int) -> np.ndarray:
    """uint8 [n, height, width, 3]: a colour, two ramps and noise."""
    source = np.random.RandomState(seed)
    colour = source.uniform(0, 255, (n, 1, 1, 3))
    down, across = source.uniform(-1, 1, (n, 1, 1, 3)), source.uniform(-1, 1, (n, 1, 1, 3))
    noise = source.standard_normal((n, height, width, 3))
    rows = np.linspace(-1, 1, height).reshape(1, height, 1, 1)
    columns = np.linspace(-1, 1, width).reshape(1, 1, width, 1)
    values = colour + 90 * down * rows + 90 * across * columns + 25 * noise
    return np.clip(np.floor(values), 0, 255).astype(np.uint8)


def synthetic_network(seed: int = 1234) -> InceptionV3:
    """The Inception network with seeded weights, drawn convolution by convolution in the order of the graph."""
    net = InceptionV3()
    source = np.random.RandomState(seed)
    for name in scope_names().values():
        module = net.get_submodule(name)
        assert isinstance(module, Conv) and isinstance(module.bn, Frozen)
        out, channels, height, width = module.conv.weight.shape
        kernel = source.standard_normal((height, width, channels, out)) * math.sqrt(2 / (height * width * channels))
        module.conv.weight.copy_(_tensor(kernel.transpose(3, 2, 0, 1)))
        module.bn.bias.copy_(_tensor(source.uniform(-0.1, 0.1, out)))
        module.bn.running_mean.copy_(_tensor(source.uniform(-0.1, 0.1, out)))
        module.bn.running_var.copy_(_tensor(source.uniform(0.5, 1.5, out)))
    net.fc.weight.copy_(_tensor((source.standard_normal((2048, 1008)) * 0.05).T))
    net.fc.bias.copy_(_tensor(source.uniform(-1, 1, 1008)))
    return net


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))


def write_trial(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the network and images of the end-to-end check as files: `synthetic.pth`, `ref.npz`, `smp.npz`."""
    weights, reference, samples = paths = [Path(folder, name) for name in ("synthetic.pth", "ref.npz", "smp.npz")]
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(synthetic_network().state_dict(), weights)
    np.savez(reference, synthetic_images(41, 96, 64, 64))
    np.savez(samples, synthetic_images(42, 80, 64, 64))
    return paths


def checks(device: torch.device) -> Iterator[Check | str]:
    """All checks, the quick ones first; a str is the title of the checks that follow."""
    yield "resize and metrics on recorded inputs"
    for (seed, n, height, width), digest in _RESIZED.items():
        resized = tf1_bilinear(torch.from_numpy(synthetic_images(seed, n, height, width)))
        pixels = np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())
        found = hashlib.sha256(pixels.tobytes()).hexdigest()
        yield Check(f"resize of {height}x{width}, every bit", found, digest, 0)
    algebra = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    yield from _metric_checks(algebra)
    yield "synthetic Inception network"
    net = synthetic_network()
    kernel = net.Conv2d_1a_3x3.conv.weight.detach().permute(2, 3, 1, 0).contiguous().numpy()
    yield Check("synthetic weights, every bit", hashlib.sha256(kernel.tobytes()).hexdigest(), _CONV_SHA256, 0)
    net = net.fold().to(device)
    features = extract(synthetic_images(1064, 4, 64, 64), net, Settings(progress=False), world=Place())
    assert features is not None and features.spatial is not None
    tolerance = 1e-5 if device.type == "cpu" else 1e-4
    for name, rows, sums in (("pool_3", features.pool, _POOL_SUMS), ("mixed_6", features.spatial, _SPATIAL_SUMS)):
        for image, expected in enumerate(sums):
            total = float(rows[image].astype(np.float64).sum())
            yield Check(f"{name} of image {image}, sum of activations", total, expected, tolerance)
    yield "end to end: 96 reference and 80 sample images"
    yield from _end_to_end(net, device)


def _metric_checks(device: torch.device) -> Iterator[Check]:
    f = synthetic_features
    value = metrics.frechet_distance_of_features(f(2, 400, 16, shift=0.35, spread=1.1), f(1, 500, 16), device=device)
    yield Check("FID, 16 features", value, 0.3182374142085109, 1e-6)
    value = metrics.frechet_distance_of_features(f(4, 1500, 64, shift=0.25, spread=0.9), f(3, 2000, 64), device=device)
    yield Check("FID, 64 features", value, 0.7741802407852063, 1e-6)
    value = metrics.frechet_distance_of_features(f(6, 30, 64, shift=0.35), f(5, 40, 64), device=device)
    yield Check("FID, fewer images than features, exact", value, 8.08618885264578, 1e-9)
    weight = (np.random.RandomState(5).standard_normal((2048, 1008)) * 0.05).astype(np.float32)
    score = metrics.inception_score(f(21, 1000, 2048, 32), weight.T.copy(), device=device).score
    yield Check("Inception Score, float64", score, 3.165239688561377, 1e-9)
    yield Check("Inception Score, original", score, 3.1652395725250244, 1e-5)
    x, y = f(12, 800, 64, spread=0.9, shift=0.32), f(11, 1000, 64)
    found = neighbours.neighbours(x, y, device=device)
    yield Check("precision, 800 and 1000 images", found.precision, 0.94875, 0)
    yield Check("recall, 800 and 1000 images", found.recall, 0.82, 0)


def _end_to_end(net: InceptionV3, device: torch.device) -> Iterator[Check]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(
            synthetic_images(41, 96, 64, 64),
            synthetic_images(42, 80, 64, 64),
            Settings(progress=False, device=str(device)),
            encoder=InceptionEncoder(net),
            world=Place(),
        )
    assert found is not None
    scores = {score.name: score.value for score in found.sets[0].scores}
    yield Check("end to end: Inception Score, original", scores["Inception Score"], 1.0606019496917725, 1e-5)
    yield Check("end to end: FID, exact", scores["FID"], 17.5258301184, 5e-6)
    yield Check("end to end: FID, original", scores["FID"], 17.525388867915865, 5e-5)
    yield Check("end to end: sFID, exact", scores["sFID"], 85.343085351, 5e-6)
    yield Check("end to end: sFID, original", scores["sFID"], 85.34279080797592, 5e-5)
    yield Check("end to end: precision", scores["Precision"], 0.9625, 0)
    yield Check("end to end: recall", scores["Recall"], 0.9791666666666666, 0)


def main(arguments: Sequence[str]) -> int:
    """Run the command; status 0 when all checks pass."""
    parser = Parser(prog="evaluator.py selftest", description="Check this machine against recorded numbers.")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    parser.add_argument(
        "--write", metavar="FOLDER", help="only write the synthetic weights and images there, to try out"
    )
    asked = parser.parse_args(arguments)
    if asked.write:
        for path in write_trial(asked.write):
            print(f"wrote {path}")
        return 0
    device = pick_device(wanted=asked.device)
    begun, passed = time.perf_counter(), []
    for check in checks(device):
        if isinstance(check, str):
            print(f"-- {check}", flush=True)
        else:
            print(check.line(), flush=True)
            passed.append(check.passed)
    print(f"{sum(passed)} of {len(passed)} checks passed in {time.perf_counter() - begun:.0f} s on {device}")
    return 0 if all(passed) else 1
