"""Networks recorded by torch.jit.trace and both of torch's ONNX exporters answer as themselves, at other batch sizes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import classifier, images, super_res, times, unet
from torch import Tensor, nn

Inputs = dict[str, Tensor]


def inputs(count: int, **more: Tensor) -> Inputs:
    return {"x": images(count), "timesteps": times(count), **{name: part[:count] for name, part in more.items()}}


LABELS, SMALL = torch.tensor([3, 0, 1, 2, 3]), images(5, size=(4, 4), seed=9)
CASES: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
    "unet": (unet(), {}),
    "classes": (unet(num_classes=4, use_new_attention_order=True), {"y": LABELS}),
    "learned resampling": (unet(resblock_updown=False, use_scale_shift_norm=False), {}),
    "upsampler": (super_res(), {"low_res": SMALL}),
    "classifier": (classifier("attention"), {}),
    "spatial classifier": (classifier("spatial_v2"), {}),
}
each = pytest.mark.parametrize(("net", "more"), CASES.values(), ids=CASES.keys())


def check(net: nn.Module, answer: Any, more: dict[str, Tensor], counts: tuple[int, ...]) -> None:
    for count in counts:
        given = inputs(count, **more)
        with torch.no_grad():
            want = net(**given)
        assert float((answer(given) - want).abs().max()) < 1e-4 * float(want.std())


@each
def test_a_trace_takes_other_batches(net: nn.Module, more: dict[str, Tensor]) -> None:
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            traced = torch.jit.trace(net, example_kwarg_inputs=inputs(2, **more), check_trace=False)
        check(net, lambda given, traced=traced: traced(**given).detach(), more, (1, 2, 5))


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True], ids=["any batch", "one batch size"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["old exporter", "new exporter"])
@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_onnx(net: nn.Module, more: dict[str, Tensor], dynamo: bool, fixed: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    runtime = pytest.importorskip("onnxruntime")
    given, file, how = inputs(2, **more), tmp_path / "network.onnx", {}
    names = list(given)
    if not fixed and dynamo:
        batch = torch.export.Dim("n", min=1, max=64)
        how["dynamic_shapes"] = tuple({0: batch} for _ in names)
    elif not fixed:
        how["dynamic_axes"] = {name: {0: "n"} for name in names}
    options = {"input_names": names, "output_names": ["out"], "opset_version": 18, "dynamo": dynamo, **how}
    torch.onnx.export(net, tuple(given.values()), file, **options)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def answer(given: Inputs) -> Tensor:
        return torch.from_numpy(session.run(None, {name: part.numpy() for name, part in given.items()})[0])

    check(net, answer, more, (2,) if fixed else (2, 5))
