"""Weights cast once per training step: the same numbers as casting at each use, and never a copy of other weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import images, times, unet
from torch import Tensor, nn

from guided_diffusion.models import casts
from guided_diffusion.models.layers import Conv2d, Linear

X, T = images(4), times(4)


def network(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    net = unet(use_scale_shift_norm=True, **options)
    net.set_compute_dtype(dtype)
    return net


def warm(net: Any) -> Any:
    """After a first block, which notes what is cast."""
    with net.weights_cast_once():
        net(X, T)
    return net


def casts_of(run: Callable[[], object]) -> int:
    """How many float32 tensors of parameters' shapes are cast to bfloat16 one by one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
                self.count += 1
            return func(*args, **(kwargs or {}))

    with Casts() as mode:
        run()
    return mode.count


def gradients(net: Any, passes: int = 1) -> list[Tensor]:
    net.zero_grad()
    for _ in range(passes):
        net(X, T).float().square().mean().backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("recompute", ["none", "norms", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_casting_at_use(dtype: torch.dtype, recompute: str) -> None:
    """Two microbatches, and a pass in which the network is used twice."""
    net = network(dtype, use_checkpoint=recompute == "all")
    net.set_recompute_norms(recompute == "norms")
    net(X, T).sum().backward()
    warm(net)

    def twice() -> list[Tensor]:
        net.zero_grad()
        (net(X, T) * net(X.flip(0), T).float()).mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    for run in (lambda: gradients(net, 2), twice):
        at_use = run()
        with net.weights_cast_once():
            once = run()
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(at_use, once))


def test_weights_are_cast_once_for_all_uses() -> None:
    net = network(use_checkpoint=True)
    at_use = casts_of(lambda: gradients(net, 2))
    warm(net)
    assert casts_of(lambda: gradients(net, 2)) == at_use > 100  # outside of a block
    with net.weights_cast_once():
        assert casts_of(lambda: gradients(net, 2)) == 0


def test_nothing_is_copied_in_float32() -> None:
    net = warm(network(torch.float32))
    with net.weights_cast_once():
        assert not net._copies._casts and gradients(net)


def in_place(net: Any) -> None:
    with torch.no_grad():
        net.input_blocks[0][0].weight.mul_(2)


def exchanged(net: Any) -> None:
    weight = net.input_blocks[0][0].weight
    weight.data = weight.data * 2


def replaced(net: Any) -> None:
    net.input_blocks[0][0].weight = nn.Parameter(net.input_blocks[0][0].weight.detach() * 2)


def loaded(net: Any) -> None:
    net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()})


def bias_only(net: Any) -> None:
    net.input_blocks[0][0].bias.detach().add_(1)


def through_data(net: Any) -> None:
    net.input_blocks[0][0].weight.data.mul_(2)


def fused_optimizer(net: Any) -> None:
    gradients(net)
    torch.optim.AdamW(net.parameters(), lr=0.1, fused=True).step()


INSIDE = [in_place, exchanged, replaced, loaded, bias_only]


@pytest.mark.parametrize("change", INSIDE)
def test_a_weight_changed_inside_the_block_is_cast_again(change: Callable[[Any], None]) -> None:
    net = warm(network())
    with net.weights_cast_once(), torch.no_grad():
        before = net(X, T)
        change(net)
        after = net(X, T)
    assert not torch.equal(before, after) and torch.equal(after, net(X, T))


@pytest.mark.parametrize("change", [*INSIDE, through_data, fused_optimizer])
def test_a_weight_changed_between_blocks_is_never_an_old_one(change: Callable[[Any], None]) -> None:
    net = warm(network())
    with net.weights_cast_once():
        before = gradients(net)
    change(net)
    at_use = net(X, T)
    with net.weights_cast_once():
        assert torch.equal(net(X, T), at_use)
        after = gradients(net)
    assert any(not torch.equal(a, b) for a, b in zip(before, after))


def test_a_frozen_weight_is_not_differentiated() -> None:
    layer = Conv2d(3, 4, 3)
    layer.weight.requires_grad_(False)
    copies = layer.copies = casts.WeightCopies()
    x = torch.randn(1, 3, 5, 5).bfloat16()
    with copies.made():
        layer(x)
    with copies.made():
        weight, bias = layer._parameters_as(x)
        assert not weight.requires_grad and bias is not None and bias.requires_grad


def test_a_copy_or_a_file_of_the_network_has_no_copies_of_weights() -> None:
    net = warm(network())
    names, size = list(net.state_dict()), len(pickle.dumps(network()))
    assert list(network().state_dict()) == names
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other._copies is not net._copies and not other._copies._casts
        layers = [m for m in other.modules() if isinstance(m, Conv2d | Linear)]
        assert all(layer.copies is other._copies for layer in layers)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        warm(other)
        with other.weights_cast_once(), net.weights_cast_once():
            assert not torch.equal(other(X, T), net(X, T))
    assert len(pickle.dumps(net)) < size + 10_000
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    assert all(value.dtype == torch.float32 for value in net.state_dict().values())


def test_copies_follow_a_network_to_another_device() -> None:
    """`Module.to` leaves the parameters the same objects, between a CPU and a GPU."""
    net = warm(network())
    for cast in net._copies._casts.values():
        cast.copies[:] = [torch.empty_like(tensor, device="meta") for tensor in cast.given]
    with net.weights_cast_once():
        assert {copy.device.type for cast in net._copies._casts.values() for copy in cast.copies} == {"cpu"}
        assert casts_of(lambda: net(X, T)) == 0


def test_transforms_and_other_weights_pass_by() -> None:
    net = warm(network())
    weights = {name: 2 * p.detach() for name, p in net.named_parameters()}
    expected = torch.func.functional_call(net, weights, (X, T))
    with net.weights_cast_once():
        assert torch.equal(torch.func.functional_call(net, weights, (X, T)), expected)
        layer, x = net.input_blocks[0][0], X.bfloat16()
        tangent = torch.func.jvp(lambda x: layer(x), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(lambda x: layer(x), (x,), (torch.ones_like(x),))[1])


def test_compiled_networks_cast_for_themselves() -> None:
    """By one graph, inside a block and outside."""
    from torch._dynamo.testing import CompileCounter

    layer = Conv2d(3, 4, 3, padding=1)
    copies = layer.copies = casts.WeightCopies()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(1, 3, 8, 8).bfloat16()
    for _ in range(2):
        with copies.made():
            assert torch.equal(compiled(x), layer.forward(x))
    with copies.made():
        before = compiled(x)
        layer.weight.data.mul_(2)
        assert not torch.equal(compiled(x), before)
    assert torch.equal(compiled(x), layer.forward(x)) and counter.frame_count == 1
    torch.compiler.reset()


def test_backward_after_the_copies_changed_is_an_error() -> None:
    net = warm(network())
    with net.weights_cast_once():
        loss = net(X, T).float().sum()
    in_place(net)
    with net.weights_cast_once(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stored_channels_last_weights_have_the_same_gradients() -> None:
    plain, stored = network(), network()
    stored.store_channels_last()
    for net in (plain, stored):
        warm(net)
    with plain.weights_cast_once(), stored.weights_cast_once():
        pairs = zip(gradients(plain), gradients(stored), stored.parameters())
        for a, b, parameter in pairs:
            torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)
            assert b.stride() == parameter.stride() or 1 in parameter.shape
