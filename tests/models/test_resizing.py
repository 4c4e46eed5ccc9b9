"""Convolving a doubled image without doubling it: the same numbers and gradients; bypassed where somebody listens."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from small_networks import images, times, unet

from guided_diffusion.models import resizing
from guided_diffusion.models.layers import Conv2d
from guided_diffusion.models.resizing import Upsample, doubled_conv, resized_conv, worth_joining


def example(channels: int = 8, size: int = 6) -> tuple[torch.Tensor, Conv2d]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, size, size + 2, generator=generator).to(memory_format=torch.channels_last)
    conv = Conv2d(channels, 5, 3, padding=1)
    with torch.no_grad():
        conv.weight.normal_(generator=generator)
    return x, conv


def test_values_and_gradients_are_those_of_doubling_first() -> None:
    x, conv = example()
    assert worth_joining(x, conv)
    results = []
    for call in (doubled_conv, lambda x, conv: conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))):
        leaf = x.clone().requires_grad_()
        out = call(leaf, conv)
        grads = torch.autograd.grad(out.square().sum(), [leaf, conv.weight, conv.bias])
        results.append((out.detach(), *grads))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-5 * float(plain.abs().max()))


def test_learned_upsampling_takes_it_too() -> None:
    x, conv = example()
    up = Upsample(8, True, out_channels=5)
    up.conv.load_state_dict(conv.state_dict())
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    with patch.object(resizing, "doubled_conv", wraps=doubled_conv) as used:
        torch.testing.assert_close(up(x), expected, rtol=1e-5, atol=1e-5)
    assert used.called


@pytest.mark.parametrize("where", ["resize", "conv"])
def test_hooks_are_still_called(where: str) -> None:
    x, conv = example()
    up, heard = Upsample(8, False), []
    (up if where == "resize" else conv).register_forward_hook(lambda *_: heard.append(1))
    expected = conv(up(x))
    heard.clear()
    torch.testing.assert_close(resized_conv(x, up, conv), expected)
    assert heard == [1]


def test_few_pixels_and_other_formats_take_the_plain_way() -> None:
    x, conv = example()
    assert not worth_joining(x[:, :, :1, :2], conv)
    assert not worth_joining(x.bfloat16(), conv)
    assert not worth_joining(x.contiguous(), conv)
    assert not worth_joining(x, Conv2d(8, 5, 3, padding=1, stride=2))


def test_a_network_answers_the_same_both_ways() -> None:
    net = unet(image_size=16)
    x = images(4, size=(16, 16))
    with torch.no_grad():
        joined = net(x, times(4))
        with patch.object(resizing, "worth_joining", return_value=False):
            plain = net(x, times(4))
    assert not torch.equal(joined, plain)  # the shorter way was taken
    torch.testing.assert_close(joined, plain, rtol=1e-5, atol=1e-5)
