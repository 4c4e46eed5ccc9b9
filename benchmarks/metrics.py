"""Frechet distance against SciPy's matrix square root; time and peak memory of precision and recall.

`python -m benchmarks.metrics` prints one JSON object. The square root is what the 2021 evaluator (and most ports) call.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .timing import compare, machine, run_isolated

_NEIGHBOURS = """
import json, resource, time
import numpy as np, torch
torch.set_num_threads({threads})
from evaluations.neighbours import neighbours
rng = np.random.default_rng(0)
plane = rng.standard_normal((12, {dim}), dtype=np.float32) / 3
def draw(count, spread):
    rows = rng.standard_normal((count, {dim}), dtype=np.float32)
    rows *= 0.15
    rows += 0.3 + spread * rng.standard_normal((count, 12), dtype=np.float32) @ plane
    return np.maximum(rows, 0, out=rows)
x, y = draw({samples}, 0.92), draw({references}, 1.0)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
before, begin = peak(), time.perf_counter()
found = neighbours(x, y)
print(json.dumps(dict(seconds=time.perf_counter() - begin, peak_gb=peak(), gb_before=before,
                      precision=found.precision, recall=found.recall)))
"""


def measure(
    *,
    dim: int = 2048,
    images: int = 3000,
    rounds: int = 1,
    samples: int = 50_000,
    references: int = 10_000,
    neighbour_dim: int = 2048,
) -> dict[str, Any]:
    """Time both Frechet distances on one pair of [dim] statistics, and run precision and recall in a fresh process.

    `samples`, `references`, `neighbour_dim`: size of the second part; 50,000 x 10,000 x 2048 takes some minutes of CPU.
    """
    import scipy.linalg
    import torch

    from evaluations import metrics, statistics

    rng = np.random.default_rng(0)
    plane = rng.standard_normal((32, dim)) / 6

    def draw(spread: float) -> statistics.Statistics:
        rows = 0.3 + spread * rng.standard_normal((images, 32)) @ plane + 0.2 * rng.standard_normal((images, dim))
        return statistics.from_features(np.maximum(rows, 0))

    a, b = draw(1.0), draw(0.9)

    def original() -> float:
        root = np.asarray(scipy.linalg.sqrtm(a.sigma @ b.sigma))
        shift = a.mu - b.mu
        return float(shift @ shift + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root.real))

    small = statistics.from_features(rng.standard_normal((100, 8)))
    metrics.frechet_distance(small, small)  # loads the libraries outside the clock
    scipy.linalg.sqrtm(small.sigma)
    values: dict[str, float] = {}

    def keep(name: str, value: float) -> None:
        values[name] = value

    ratio = compare(
        f"Frechet distance, {dim} features",
        lambda: keep("ours", metrics.frechet_distance(a, b)),
        lambda: keep("scipy", original()),
        against="scipy.linalg.sqrtm",
        rounds=rounds,
        warmup=0,
    )
    code = _NEIGHBOURS.format(
        dim=neighbour_dim, samples=samples, references=references, threads=torch.get_num_threads()
    )
    return {
        "machine": machine(),
        "frechet": ratio.row(),
        "frechet_ratio": ratio.ratio,
        "frechet_relative_difference": abs(values["ours"] - values["scipy"]) / values["scipy"],
        "neighbours": {
            "samples": samples,
            "references": references,
            "features": neighbour_dim,
            **run_isolated(code, 3600),
        },
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
