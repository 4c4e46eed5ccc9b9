"""One product for all blocks' embedding layers: same numbers, and never with weights that are no longer the network's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import classifier, images, times, unet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.models.unet import ResBlock

MAKE = pytest.mark.parametrize("make", [unet, classifier, lambda: unet(use_scale_shift_norm=False)])


def both(make: Callable[[], Any]) -> tuple[Any, Any]:
    """A frozen network with joined embeddings, and its twin without."""
    net = make().requires_grad_(False)
    twin = copy.deepcopy(net)
    net.join_embeddings()
    return net, twin


@MAKE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_numbers_and_the_same_state_dict(make: Callable[[], Any], dtype: torch.dtype) -> None:
    net, twin = both(make)
    for each in (net, twin):
        each.set_compute_dtype(dtype, store=True)
    assert net.joined.holds()
    torch.testing.assert_close(net(images(), times()), twin(images(), times()))
    state, expected = net.state_dict(), twin.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_fewer_products() -> None:
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += "addmm" in str(func)
            return func(*args, **(kwargs or {}))

    net, twin = both(unet)
    counts = []
    for each in (net, twin):
        with Products() as products:
            each(images(), times())
        counts.append(products.count)
    blocks = sum(hasattr(module, "emb_layers") for module in net.modules())
    assert counts[1] - counts[0] == blocks - 1 > 1


def change_in_place(net: Any) -> None:
    net.middle_block[0].emb_layers[1].weight.mul_(2)


def replace(net: Any) -> None:
    layer = net.middle_block[0].emb_layers[1]
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)


def load(net: Any) -> None:
    net.load_state_dict({name: 1.1 * value for name, value in net.state_dict().items()})


def assign(net: Any) -> None:
    net.load_state_dict({name: 1.1 * value for name, value in net.state_dict().items()}, assign=True)


def cast(net: Any) -> None:
    net.double()


@pytest.mark.parametrize("change", [change_in_place, replace, load, assign, cast])
def test_weights_that_change_afterwards_are_heard(change: Callable[[Any], None]) -> None:
    net, twin = both(unet)
    for each in (net, twin):
        with torch.no_grad():
            change(each)
    x = images().to(next(net.parameters()).dtype)
    torch.testing.assert_close(net(x, times()), twin(x, times()))


def test_copies_and_hooks() -> None:
    net, twin = both(unet)
    duplicate = copy.deepcopy(net)
    change_in_place(duplicate)
    torch.testing.assert_close(net(images(), times()), twin(images(), times()))
    change_in_place(twin)
    torch.testing.assert_close(duplicate(images(), times()), twin(images(), times()))
    assert net.joined is not None and duplicate.joined is None
    duplicate.join_embeddings()
    torch.testing.assert_close(duplicate(images(), times()), twin(images(), times()))
    heard: list[Tensor] = []
    net.middle_block[0].emb_layers[1].register_forward_hook(lambda module, args, out: heard.append(out))
    net(images(), times())
    assert len(heard) == 1


def test_gradients_at_the_input_and_one_graph() -> None:
    torch.compiler.reset()
    net, twin = both(classifier)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = []
    for each in (net, twin, compiled):
        x = images().requires_grad_()
        found.append(torch.autograd.grad(each(x, times()).logsumexp(1).sum(), x)[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[1])


def test_what_is_not_frozen_or_not_there_any_more_is_not_joined() -> None:
    net, _ = both(unet)
    net.requires_grad_(True)
    net(images(), times()).square().mean().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if "emb_layers" in name)

    net, twin = both(unet)
    for each in (net, twin):
        each.middle_block[0].emb_layers[1] = nn.Linear(128, 128).requires_grad_(False)
        nn.init.constant_(each.middle_block[0].emb_layers[1].weight, 0.1)
        nn.init.zeros_(each.middle_block[0].emb_layers[1].bias)
    torch.testing.assert_close(net(images(), times()), twin(images(), times()))


def test_a_second_join_moves_nothing_that_somebody_may_have_recorded() -> None:
    net, _ = both(unet)
    place = net.middle_block[0].emb_layers[1].weight.data_ptr()
    net.join_embeddings()
    assert net.middle_block[0].emb_layers[1].weight.data_ptr() == place


def test_blocks_of_somebodys_own_get_the_embedding_itself() -> None:
    class Own(ResBlock):
        def _forward(self, x: Tensor, emb: Any) -> Tensor:
            assert isinstance(emb, Tensor)
            return super()._forward(x, emb)

    net, twin = unet().requires_grad_(False), None
    twin = copy.deepcopy(net)
    for block in net.modules():
        if isinstance(block, ResBlock):
            block.__class__ = Own
    net.join_embeddings()
    torch.testing.assert_close(net(images(), times()), twin(images(), times()))


def test_compiled_networks_hear_weights_that_are_put_in_place_of_others() -> None:
    torch.compiler.reset()
    net, twin = both(unet)
    state = {name: 1.1 * value for name, value in net.state_dict().items()}
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(images(), times())
    for each in (net, twin):
        each.load_state_dict(state, assign=True)
    torch.testing.assert_close(compiled(images(), times()), twin(images(), times()), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_function_transforms_over_the_weights() -> None:
    net, twin = both(unet)
    given = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights: dict[str, Tensor], of: Any) -> Tensor:
        return torch.func.functional_call(of, weights, (images(), times())).square().mean()

    found = torch.func.grad(lambda weights: loss(weights, net))(given)
    expected = torch.func.grad(lambda weights: loss(weights, twin))(given)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
