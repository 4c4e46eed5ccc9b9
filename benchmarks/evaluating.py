"""What scoring costs: Inception features, the Frechet distance, precision and recall."""

from __future__ import annotations

import math
from typing import Any

from .timing import Plan, Row, alternate, clocked, compare, run_isolated

IMAGES = 50_000
"""Of the usual FID."""

# Run in a process of its own, so that its peak memory is that of this alone. Rows are spread over 12 directions, as features are.
_NEIGHBOURS = """
import json, sys, time
import numpy as np, torch
from evaluations.neighbours import neighbours
count, dim = map(int, sys.argv[1:])
torch.set_num_threads(1)
rng = np.random.default_rng(0)
plane = rng.standard_normal((12, dim), dtype=np.float32) / 3
def draw(spread):
    rows = 0.3 + 0.15 * rng.standard_normal((count, dim), dtype=np.float32)
    rows += spread * rng.standard_normal((count, 12), dtype=np.float32) @ plane
    return np.maximum(rows, 0, out=rows)
x, y = draw(0.92), draw(1.0)
before, begin = peak_mib(), time.process_time()
neighbours(x, y)
print(json.dumps(dict(seconds=time.process_time() - begin, mib=peak_mib() - before)))
"""


def features(plan: Plan) -> list[Row]:
    """Images per second from uint8 arrays to Inception features in main memory: read, resized, computed in float32, brought back."""
    import numpy as np
    import torch

    from evaluations.features import extract
    from evaluations.inception import Conv, InceptionV3
    from evaluations.settings import Settings

    net = InceptionV3()
    source = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(
            module, Conv
        ):  # weights that keep activations at their usual size; vanishing ones slow arithmetic down
            weight = module.conv.weight
            weight.normal_(0, math.sqrt(2 / weight[0].numel()), generator=source)
    with torch.no_grad():
        net = net.fold().to(plan.device)
    count = IMAGES if plan.on_gpu else 4 if plan.quick else 16
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    quiet = Settings(progress=False)
    extract(pixels[:2048], net, quiet)
    call = clocked(lambda: extract(pixels, net, quiet), plan.device)
    (times,) = alternate({"": call}, rounds=1 if plan.on_gpu else plan.rounds, limit=plan.limit).values()
    rate = count / sorted(times)[len(times) // 2]
    note = f"random weights; {IMAGES} images in {IMAGES / rate:.0f} s"
    return [Row("Inception features of 64 px images", rate, "images/s", rounds=len(times), note=note)]


def distances(plan: Plan) -> list[Row]:
    """The Frechet distance against SciPy's matrix square root, which the 2021 evaluator calls; precision and recall."""
    import numpy as np
    import scipy.linalg
    import torch

    from evaluations import metrics, statistics

    dim, images, count = (256, 600, 1000) if plan.quick else (2048, 3000, 10_000)
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((32, dim)) / 6

    def draw(spread: float) -> statistics.Statistics:
        rows = 0.3 + spread * rng.standard_normal((images, 32)) @ plane + 0.2 * rng.standard_normal((images, dim))
        return statistics.from_features(np.maximum(rows, 0))

    a, b = draw(1.0), draw(0.9)

    def by_scipy() -> Any:
        root = np.asarray(scipy.linalg.sqrtm(a.sigma @ b.sigma))
        shift = a.mu - b.mu
        found = shift @ shift + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root.real)
        return torch.tensor(float(found), dtype=torch.float64)

    def ours() -> Any:
        return torch.tensor(metrics.frechet_distance(a, b), dtype=torch.float64)

    few = Plan(rounds=2)  # of half a minute each
    rows = compare(f"Frechet distance of {dim} features", {"scipy.linalg.sqrtm": by_scipy, "this package": ours}, few)
    found = run_isolated(_NEIGHBOURS, str(count), str(dim))
    what = f"precision and recall, {count} against {count} by {dim}"
    return [*rows, Row(what, found["seconds"], "s", note=f"{found['mib']:.0f} MiB beyond the features")]
