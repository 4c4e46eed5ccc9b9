"""State dicts of the 15 released checkpoints: names, shapes and order."""

from __future__ import annotations

import pytest
import torch
from network_recipe import build, layouts
from small_networks import SMALL, images, times, unet

from guided_diffusion.models.unet import UNetModel

LAYOUTS = layouts()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_that_of_the_released_file(name: str) -> None:
    layout = LAYOUTS[name]
    with torch.device("meta"):
        net = build(layout["kind"], layout["flags"])
    assert [(key, list(value.shape)) for key, value in net.state_dict().items()] == list(layout["keys"].items())
    assert sum(parameter.numel() for parameter in net.parameters()) == layout["num_parameters"]
    assert all(parameter.is_meta for parameter in net.parameters())


def test_weights_can_be_assigned_to_a_network_without_memory() -> None:
    net, x, t = unet(), images(), times()
    with torch.device("meta"):
        empty = UNetModel(**SMALL, use_scale_shift_norm=True, resblock_updown=True)
    empty.load_state_dict(net.state_dict(), assign=True)
    torch.testing.assert_close(empty.eval()(x, t), net(x, t), rtol=0, atol=0)
