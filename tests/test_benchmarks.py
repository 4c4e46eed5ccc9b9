"""The benchmarks measure what they say, and a report comes out. No time that is measured here matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import against, execution, networks, profiling, shapes
from benchmarks.timing import Plan, Report, Row, alternate, as_rows, compare
from guided_diffusion.models.kernels import norm

ROOT = Path(__file__).resolve().parents[1]
SMALL = shapes.small(32, batch=1, train_batch=2)


def levels(mult: str, attention: str) -> shapes.Shape:
    """The small shape at 16 pixels, with these levels."""
    ours = {"image_size": 16, "attention_resolutions": attention, "channel_mult": mult}
    theirs = {"image_size": 16, "classifier_attention_resolutions": attention, "classifier_channel_mult": mult}
    return SMALL._replace(model={**SMALL.model, **ours}, classifier={**SMALL.classifier, **theirs})


SHAPE = levels("1,1", "8")
RATES = {"matmul float32 GFLOP/s": 100.0, "convolution float32 GFLOP/s": 50.0, "matmul bfloat16 GFLOP/s": 200.0}
PLAN = Plan(quick=True, rounds=1, rates=RATES, shapes=[SHAPE])


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def spend(self, seconds: float) -> float:
        self.seconds += seconds
        return seconds


@pytest.mark.parametrize(("limit", "rounds"), [(float("inf"), 7), (10.0, 5), (3.9, 2), (0.0, 2)])
def test_ways_take_turns_until_time_is_over(limit: float, rounds: int) -> None:
    """Each round takes two seconds of the fake clock, and begins with another way."""
    clock, order = Clock(), []
    ways: dict[str, Callable[[], float]] = {}
    for name in ("a", "b"):
        ways[name] = lambda name=name: order.append(name) or clock.spend(1)  # type: ignore[misc,func-returns-value]
    times = alternate(ways, rounds=7, limit=limit, now=clock)
    assert times == {"a": [1] * rounds, "b": [1] * rounds}
    assert "".join(order) == ("abba" * 4)[: 2 * rounds]


def test_ratios_are_those_of_each_round() -> None:
    base, other = as_rows("x", {"a": [2, 4, 6, 8], "b": [1, 1, 1, 2]}, {"b": "said"})
    assert (base.what, base.value, base.ratio) == ("x: a", 5000, None)
    assert (other.what, other.against, other.value, other.note) == ("x: b", "a", 1000, "said")
    assert (other.ratio, other.low, other.high, other.rounds) == (4, 4, 6, 4)  # of 2, 4, 4 and 6


def test_what_is_compared_says_how_far_it_is_apart() -> None:
    base = torch.ones(4)
    ways = {"a": lambda: base, "b": lambda: base * 1.5, "c": lambda: None}
    notes = [row.note for row in compare("x", ways, Plan(rounds=2))]
    assert notes == ["", "differs 5.0e-01 in norm", ""]


def test_operations_of_the_released_networks_are_the_published_ones() -> None:
    """Half of them are the "Gflops" of table 4 of arXiv 2212.09748 (Peebles & Xie 2022) for ADM at 256 pixels: 1120."""
    net, critic = networks.operations(shapes.released(256, 1, 1))
    assert round(net / 2e9) == 1120 and critic < net


@pytest.mark.parametrize(("name", "count"), [("forward", 2), ("sampling", 2), ("training", 8)])
def test_networks_are_measured_in_both_formats(name: str, count: int) -> None:
    ((_, measure),) = command.tasks([name], PLAN)
    rows = list(measure())
    assert len(rows) == count and any("bfloat16" in row.what for row in rows)
    if name == "forward":  # the share of the best rate is that of the time
        share = float(rows[0].note.split("%")[0]) / 100
        flops, _ = networks.operations(SHAPE)
        assert share == pytest.approx(flops / 100e9 / (1e-3 * rows[0].value), abs=0.006)


def test_memory_is_saved_in_the_ways_that_rows_name(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = networks.updates(SHAPE, "cpu", "float32")
    seen: list[tuple[bool, bool, int]] = []

    def step(self: Any, batch: Any) -> None:
        blocks = [m for m in self.net.modules() if hasattr(m, "emb_layers")]
        seen.append((blocks[0].recompute_norms, blocks[0].use_checkpoint, self.microbatch))

    monkeypatch.setattr(type(trainer), "step", step)
    rows = list(networks.training(SHAPE, Plan(rounds=1)))
    ways = ["all kept", "--recompute norms", "--recompute all", "--microbatch 1"]
    assert [row.what.split(": ")[1] for row in rows] == ways
    assert seen[:4] == [(False, False, 0), (True, False, 0), (False, True, 0), (False, False, 1)]


def test_compiled_and_eager_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and run as they are: generating code for them takes minutes."""
    from guided_diffusion.sampling import execution

    monkeypatch.setattr(execution, "Compiled", partial(execution.Compiled, backend="eager"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    shape = levels("1", "")  # little to trace
    plan = Plan(rounds=1, rates={"matmul float32 GFLOP/s": 1.0, "matmul bfloat16 GFLOP/s": 0.0})
    for measure in (networks.compiled_forward, networks.compiled, networks.compiled_training):
        eager, compiled = measure(shape, plan)
        assert compiled.against == "eager" and eager.ratio is None
        if measure is not networks.compiled_training:
            assert float(compiled.note.split("differs ")[1].split(" ")[0]) < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("few", [1, 8, 64])
@pytest.mark.parametrize("bent", [1.0, 1.2])
def test_the_largest_batch_is_found_by_few_steps(few: int, bent: float) -> None:
    """Memory of 1000 + 7 per image, or of `bent` times as much per image in large batches, of 2000."""

    def peak(count: int) -> int:
        tried.append(count)
        if (needed := 1000 + 7 * count * (bent if count > 64 else 1)) > 2000:
            raise torch.OutOfMemoryError
        return int(needed)

    tried: list[int] = []
    count, steps = networks.most_that_fits(peak, few, 2000)
    most = int(1000 / 7 / bent)
    assert 0.96 * most - 1 <= count <= most and steps == len(tried) < 10


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, float>", "layout"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("void at::native::elementwise_kernel<128, 4, gpu_kernel_impl<direct_copy_kernel_cuda>>", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, 4>", "cat"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<c10::BFloat16>>", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "optimizer"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, sum_functor>>", "sums"),
        ("_chunk_moments", "norms"),
        (norm.FusedNorm.__name__, "norms"),  # as a profile of a CPU names them
        (norm.FusedNorm._backward_cls.__name__, "norms"),
        ("triton_poi_fused_add_silu_3", "compiled"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert profiling.kind_of(name).startswith(kind)


def test_a_profile_is_a_table_of_kinds() -> None:
    some = [("gemm_a", 2.0, 3), ("gemm_b", 1.0, 1), ("reduce_kernel", 1.0, 4)]
    whole, products, sums = profiling.table("x", [profiling.Kernel(*each) for each in some])
    assert (whole.value, whole.note) == (4000, "8 kernels")
    assert products.value == 3000 and products.note == "75.0% in 4; 2000.00 ms in 3 gemm_a"
    assert sums.value == 1000
    rows = list(profiling.profile(SHAPE, PLAN))
    for what in ("forward", "training step"):
        whole, *kinds = (row for row in rows if what in row.what)
        assert whole.value == pytest.approx(sum(row.value for row in kinds))
        assert "convolutions" in " ".join(row.what for row in kinds)


def test_the_first_networks_are_measured_before_the_last() -> None:
    plan = Plan(shapes=[SHAPE._replace(name=name) for name in ("a", "b", "c")])
    names = [name for name, _ in command.tasks(["forward", "features", "training"], plan)]
    assert names == ["forward, a", "forward, b", "features", "training, a", "training, b", "forward, c", "training, c"]


def test_blocks_and_the_whole_network_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plan = Plan(rounds=1, rates={"matmul float32 GFLOP/s": 1.0, "matmul bfloat16 GFLOP/s": 0.0})
    rows = list(execution.blocks(levels("1", ""), plan))
    torch.compiler.reset()
    assert [row.what.split(": ")[1] for row in rows[:3]] == [f"{name}, first call" for name in execution.WAYS]
    assert [row.unit for row in rows] == 2 * ["s", "s", "s", "ms", "ms", "ms"]


def test_batch_sizes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(execution.batches(levels("1", ""), Plan(quick=True, rounds=1)))
    assert len(rows) == 12 and all("batches of 4, 1" in row.note for row in rows if row.unit == "of 255")
    assert [row.value for row in rows if "deterministic: largest" in row.what] == [0, 0, 0]


@pytest.mark.parametrize("name", ["features", "distances", "loader", "feeding", "loading", "saving", "start"])
def test_other_parts_find_something(name: str) -> None:
    rows = list(command.ONCE[name](PLAN))
    assert rows and all(row.value > 0 for row in rows)
    if name == "distances":  # SciPy's matrix square root gives the same distance
        assert float(rows[1].note.split("differs ")[1].split(" ")[0]) < 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# Against the package of 2021, whose place this package takes here


def test_two_equal_packages_compute_the_same() -> None:
    first, again, ours = against.measure("sampling", SHAPE, Plan(quick=True, rounds=1), str(ROOT))
    assert first.ratio is None and again.against == ours.against == "2021"
    assert again.note.startswith("differs 0.0e+00") and ours.note.startswith("differs 0.0e+00")


def test_what_the_host_costs_is_measured_once_for_all_networks() -> None:
    todo = dict(command.tasks(["host"], Plan(quick=True, rounds=1), str(ROOT)))
    assert list(todo) == ["host, forward", "host, training"]
    _, _, ours = todo["host, forward"]()
    assert ours.note.startswith("differs 0.0e+00") and "64 px depth on 16 px" in ours.what


def test_a_worker_trains_and_says_why_it_ends() -> None:
    order = {"work": "training", "device": "cpu", "steps": 2, "batch": 1, "folder": str(ROOT)}
    worker = against.Worker("2021", {**order, "model": dict(SHAPE.model), "classifier": {}})
    try:
        assert worker.answer() == "ready" and worker.ask("save nothing") is False
        assert worker.ask("time") > 0 and worker.ask("peak") > 0
    finally:
        worker.close()
    worker = against.Worker("2021", {**order, "device": "nowhere", "folder": str(ROOT / "docs")})
    with pytest.raises(RuntimeError, match=r"2021: (.|\n)*ImportError: guided_diffusion was found in .*not in .*docs"):
        worker.answer()
    worker.close()


def test_a_folder_without_the_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--against", str(tmp_path)])
    assert "holds no guided_diffusion/script_util.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--against", str(ROOT), "--only", "loader"])
    assert "--only loader has nothing to do with --against" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--only", "host"])
    assert "give its folder with --against" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_a_part_that_fails_leaves_the_table_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def fails(plan: Any) -> Any:
        yield Row("b", 43.0)
        seen.append(json.loads((tmp_path / "benchmarks.json").read_text()))
        raise RuntimeError("out of luck")

    def lacks(plan: Any) -> Any:
        raise ImportError("no diffusers here")

    for name, part in {"features": lambda plan: [Row("a", 42.0)], "loader": fails, "saving": lacks}.items():
        monkeypatch.setitem(command.ONCE, name, part)
    words = ["--quick", "--only", "features", "--only", "loader", "--only", "saving", "--out", str(tmp_path)]
    assert command.main(words) == 1
    assert [row["what"] for row in seen[0]["rows"]] == ["a", "b"]  # written before the part failed
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report["failed"] == {"loader": "RuntimeError: out of luck"}
    assert report["left_out"] == {"saving": "no diffusers here"}
    assert report["machine"]["torch"] == torch.__version__ and report["command"].endswith("--only saving")
    table = (tmp_path / "benchmarks.md").read_text()
    assert "FAILED: loader" in table and "| a | 42 ms |" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.json", "benchmarks.md"]


def test_no_part_begins_after_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, {"machine": {}, "command": "", "rates": {}})
    command.run(iter([("late", lambda: [Row("a", 1.0)])]), report, budget=-1)
    assert list(report.left_out) == ["late"] and not report.rows
    with pytest.raises(SystemExit):
        command.main(["--budget", "0"])
    assert "--budget 0 leaves no time" in capsys.readouterr().err


def test_a_score_that_moves_less_than_it_varies_is_within_its_error_bar() -> None:
    from benchmarks.quality import SCORES, compared

    usual = [dict.fromkeys(SCORES, value) for value in (1.0, 1.2, 0.8)]
    near = [{name: run[name] + 0.05 for name in SCORES} for run in usual]
    far = [{name: run[name] + (0.5 if name == "fd" else 0.0) for name in SCORES} for run in usual]
    for name, row in compared(usual, near).items():
        assert row["within"] and row["difference"] == pytest.approx(0.05)
        assert row["error_bar"] == pytest.approx(0.2), name  # of 0.8, 1 and 1.2, by hand
        assert row["difference_error"] == pytest.approx(0, abs=1e-12)
    assert [name for name, row in compared(usual, far).items() if not row["within"]] == ["fd"]
