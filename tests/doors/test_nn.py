"""guided_diffusion.nn and losses."""

from __future__ import annotations

import pytest
import torch

from guided_diffusion import losses
from guided_diffusion import nn as door
from guided_diffusion.models import layers


def test_layers_are_torchs_own_kinds() -> None:
    assert isinstance(door.conv_nd(1, 4, 8, 1), torch.nn.Conv1d)
    assert isinstance(door.conv_nd(2, 4, 8, 3, padding=1), torch.nn.Conv2d)
    assert isinstance(door.conv_nd(3, 4, 8, 3), torch.nn.Conv3d)
    assert isinstance(door.linear(4, 8), torch.nn.Linear)
    assert isinstance(door.avg_pool_nd(2, kernel_size=2), torch.nn.AvgPool2d)
    assert isinstance(door.normalization(64), torch.nn.GroupNorm)
    with pytest.raises(ValueError, match="unsupported dimensions: 4"):
        door.avg_pool_nd(4)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "stride": 2}]
)
def test_convolutions_compute_what_torchs_do(dims: int, options: dict[str, int]) -> None:
    ours = door.conv_nd(dims, 4, 6, **options)
    theirs = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims](4, 6, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, *(5, 6, 7)[:dims])
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(layers.channels_last(x)), theirs(x))


def test_group_norm_computes_what_torchs_does_in_any_layout() -> None:
    ours, theirs = door.GroupNorm32(4, 8), torch.nn.GroupNorm(4, 8)
    x = 3 + torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(layers.channels_last(x)), theirs(x))
    low = ours(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), theirs(x.bfloat16().float()), rtol=1e-2, atol=1e-2)


def test_weights_of_a_norm_may_learn_under_a_frozen_network() -> None:
    norm = door.normalization(32)
    norm(layers.channels_last(torch.randn(2, 32, 4, 4))).pow(2).sum().backward()
    assert norm.weight.grad is not None


def test_zero_and_scale() -> None:
    module = door.linear(3, 2)
    before = module.weight.detach().clone()
    assert door.scale_module(module, 2.0) is module
    torch.testing.assert_close(module.weight, 2 * before)
    assert not any(parameter.any() for parameter in door.zero_module(module).parameters())


def test_losses_accept_numbers_beside_tensors() -> None:
    mean = torch.tensor([0.0, 1.0])
    assert torch.equal(losses.normal_kl(mean, 0.0, 0.0, 0.0), mean**2 / 2)


def test_silu() -> None:
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(door.SiLU()(x), x * torch.sigmoid(x))


def test_mean_flat_and_update_ema() -> None:
    torch.testing.assert_close(door.mean_flat(torch.arange(6.0).reshape(2, 3, 1)), torch.tensor([1.0, 4.0]))
    target, source = [torch.tensor([1.0])], [torch.tensor([2.0])]
    door.update_ema(target, source, rate=0.75)
    torch.testing.assert_close(target[0], torch.tensor([1.25]))


def test_checkpoint_function_of_2021() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor(2.0, requires_grad=True)
    door.CheckpointFunction.apply(lambda a: a * weight, 1, x, weight).backward()
    assert (x.grad, weight.grad) == (torch.tensor(3.0), torch.tensor(2.0))
