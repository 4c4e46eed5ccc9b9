"""The parts of a run of the benchmarks, each cut into tasks that can be left out when time is short."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from . import shapes
from .budget import Task
from .shapes import Shape
from .timing import Ratio

if TYPE_CHECKING:
    from . import gpu, networks

Figures = dict[str, float]
Result = tuple[list[Ratio], Figures]
# Where nothing is known of a part but how long it usually takes: seconds.
USUAL = {
    "forward": 60, "arithmetic": 15, "sampling": 300, "training": 200, "recomputing": 200, "classifier": 60, "features": 30,
    "metrics": 120, "loader": 30, "growth": 60, "processes": 90, "startup": 60, "memory": 90, "demo": 60,
}  # fmt: skip
NORM_SECONDS = 90  # of one network, most of it compiling
ON_CPU = tuple(USUAL)
# By how much is to be learned from them: time may not suffice for all.
ON_GPU = (
    "gpu-sampling", "gpu-training", "features", "gpu-fitting", "gpu-compiled", "norm",
    "forward", "arithmetic", "classifier", "loader", "startup",
)  # fmt: skip
ON_REQUEST = {"compiled": 1500}  # most of it compiling; seconds, as above
NAMES = (*ON_CPU, *(name for name in ON_GPU if name not in ON_CPU), *ON_REQUEST)


class Plan:
    """What to measure and how often."""

    def __init__(self, device: str, quick: bool, rounds: int, rates: Figures) -> None:
        from . import floor, networks

        self.device, self.quick = device, quick
        self.rounds = rounds or (2 if quick else 7)
        self.on_gpu = device.startswith("cuda")
        self.low = "bfloat16"
        bandwidth = floor.bandwidth(rates)
        self.rates = networks.Rates(floor.best(rates), bandwidth)
        self.rates_low = networks.Rates(floor.best(rates, self.low), bandwidth)

    def shapes(self) -> list[Shape]:
        """The networks that fit this machine, the most telling first."""
        if self.quick:
            return [shapes.tiny()]
        if self.on_gpu:
            return [shapes.released(64, 64, 64), shapes.released(256, 16, 16), shapes.released(128, 32, 32)]
        return [shapes.small()]

    def both(self) -> tuple[tuple[str, networks.Rates], tuple[str, networks.Rates]]:
        """Full and half precision, each with what the machine does at best in it."""
        return ("float32", self.rates), (self.low, self.rates_low)

    def worthwhile(self) -> tuple[str, ...]:
        """Full precision, and half where the machine has instructions for it: elsewhere it is only slow."""
        faster = self.rates_low.flops > self.rates.flops
        return ("float32", self.low) if faster else ("float32",)

    def gpu(self) -> gpu.Setting:
        """As the parts for a GPU want it."""
        from .gpu import Setting

        return Setting(self.device, self.rounds, self.rates_low)


def forward(plan: Plan) -> Result:
    from . import networks

    rows = []
    for shape in plan.shapes():
        for dtype, rates in plan.both():
            rows += networks.forward(shape, device=plan.device, rounds=plan.rounds, dtype=dtype, rates=rates)
        rows += networks.against_diffusers(shape, device=plan.device, rounds=plan.rounds)
    return rows, {}


def arithmetic(plan: Plan) -> Result:
    from . import networks

    shape = plan.shapes()[0]
    rows = []
    for guided in (False, True):
        rows += networks.arithmetic(shape, device=plan.device, rounds=plan.rounds, guided=guided)
    return rows, {}


def sampling(plan: Plan) -> Result:
    from . import networks

    rows, rounds = [], max(1, plan.rounds // 2)
    for shape in plan.shapes():
        for dtype in plan.worthwhile():
            rows += networks.sampling(shape, device=plan.device, rounds=rounds, dtype=dtype)
    return rows, {}


def training(plan: Plan) -> Result:
    from . import networks

    rows = []
    for shape in plan.shapes():
        for precision, (_, rates) in zip(("fp32", "bf16"), plan.both()):
            rows += networks.training(shape, device=plan.device, rounds=plan.rounds, precision=precision, rates=rates)
    return rows, {}


def recomputing(plan: Plan) -> Result:
    from . import networks

    rows = []
    for shape in plan.shapes():
        shape = shapes.with_train_batch(shape, 2 * shape.train_batch)
        for precision in ("fp32", "bf16") if len(plan.worthwhile()) > 1 else ("fp32",):
            rounds = max(2, plan.rounds // 2)
            rows += networks.less_memory(shape, device=plan.device, rounds=rounds, precision=precision)
    return rows, {}


def classifier(plan: Plan) -> Result:
    from . import networks

    rows = []
    for shape in plan.shapes():
        for dtype in plan.worthwhile():
            rows += networks.classifier_gradient(shape, device=plan.device, rounds=plan.rounds, dtype=dtype)
    return rows, {}


def features(plan: Plan) -> Result:
    from . import inception

    images = 4 if plan.quick else 8
    found = inception.measure(device=plan.device, images=images, rounds=2 if plan.quick else plan.rounds)
    ratio = found.pop("ratio")
    found |= inception.whole_job(device=plan.device, images=4096 if plan.on_gpu else images)
    return [ratio], {f"features, {name.replace('_', ' ')}": value for name, value in found.items()}


def metrics(plan: Plan) -> Result:
    from . import metrics as m

    small = {"dim": 256, "images": 600, "samples": 2000, "references": 1000, "neighbour_dim": 256}
    found = m.measure(**small) if plan.quick else m.measure(samples=10_000, references=10_000)
    neighbours = found["neighbours"]
    figures = {f"precision and recall, {name.replace('_', ' ')}": float(value) for name, value in neighbours.items()}
    figures["Frechet distance, scipy / ours"] = found["frechet_ratio"]
    figures["Frechet distance, relative difference"] = found["frechet_relative_difference"]
    return [], figures


def loader(plan: Plan) -> Result:
    from . import images

    return images.loader(rounds=plan.rounds, count=64 if plan.quick else 256), {}


def growth(plan: Plan) -> Result:
    from . import growth as g

    return [], g.measure(device=plan.device, quick=plan.quick)


def processes(plan: Plan) -> Result:
    from . import growth as g

    return [], g.processes("tiny()" if plan.quick else "small()", steps=2 if plan.quick else 5)


def startup(plan: Plan) -> Result:
    from . import startup as s

    rounds = 1 if plan.quick else 3
    found = s.import_time(rounds)
    for shape in ("tiny()",) if plan.quick else ("small()", "small(num_channels=128)", "released(64, 1, 1)"):
        found.update({f"{name}, {shape}": value for name, value in s.loading(shape, rounds).items()})
    return [], found


def memory(plan: Plan) -> Result:
    from . import startup as s

    return [], s.memory("tiny()" if plan.quick else "small()")


def demo(plan: Plan) -> Result:
    from . import startup as s

    return [], {} if plan.quick else s.demo()


def compiled(plan: Plan) -> Result:
    from . import compiled as c

    shape, rows = plan.shapes()[0], []
    for measured in (c.forward, c.guided):
        for dtype in plan.worthwhile():
            rows += measured(shape, device=plan.device, rounds=plan.rounds, dtype=dtype)
    return rows, {}


PARTS: dict[str, Callable[[Plan], Result]] = {name: globals()[name] for name in (*USUAL, *ON_REQUEST)}


def tasks(name: str, plan: Plan) -> list[Task]:
    """A part as tasks in order of importance."""
    if name in PARTS:
        seconds = (USUAL | ON_REQUEST)[name]
        return [Task(name, 10 if plan.quick else seconds, partial(PARTS[name], plan))]
    from . import gpu, norm

    at, what = plan.gpu(), name.removeprefix("gpu-")
    if name == "norm":
        return [Task(f"norm, {shape.name}", NORM_SECONDS, partial(norm.norms, shape, at)) for shape in plan.shapes()]
    compiled = [
        ("compiled sampling", gpu.compiled_sampling),
        ("compiled training", gpu.compiled_training),
        ("compiled sampling of few images", gpu.compiled_requests),
    ]
    single = {"sampling": gpu.sampling, "training": gpu.training, "fitting": gpu.fitting}
    return [
        Task(f"gpu {title}, {shape.name}", gpu.expected(shape, at, what), partial(call, shape, at))
        for shape in plan.shapes()
        for title, call in (compiled if what == "compiled" else [(what, single[what])])
    ]
