"""torch.compile sees each network as one graph: forward, training, and a classifier's gradient at its input."""

from __future__ import annotations

import pytest
import torch
from small_networks import classifier, images, times, unet

SMALLEST = {"channel_mult": (1,), "attention_resolutions": (), "num_res_blocks": 1}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_unet_trains_as_one_graph(use_checkpoint: bool) -> None:
    net = unet(**SMALLEST, use_checkpoint=use_checkpoint, num_classes=3)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")  # fullgraph raises at the first graph break
    x, t, y = images(), times(), torch.tensor([0, 2])
    out = compiled(x, t, y)
    torch.testing.assert_close(out, net(x, t, y))
    out.pow(2).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_input_gradient_of_a_frozen_classifier_in_bfloat16() -> None:
    net = classifier(channel_mult=(1,)).requires_grad_(False)
    net.set_compute_dtype(torch.bfloat16)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = images().requires_grad_()
    (found,) = torch.autograd.grad(compiled(x, times())[:, 0].sum(), x)
    (expected,) = torch.autograd.grad(net(x, times())[:, 0].sum(), x)
    assert (found - expected).norm() < 0.05 * expected.norm()
