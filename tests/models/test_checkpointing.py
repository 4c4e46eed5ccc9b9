"""Recomputation in backward: only where asked for, and invisible in every result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import classifier, images, times, unet
from torch import Tensor

from guided_diffusion.models import unet as room
from guided_diffusion.models.layers import checkpoint

BOTH = pytest.mark.parametrize("use_checkpoint", [False, True])


@BOTH
def test_the_flag_is_obeyed(use_checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def replacement(func: Callable[..., Tensor], inputs: Any, params: Any, flag: bool) -> Tensor:
        calls.append((inputs, tuple(params), flag))
        return func(*inputs)

    monkeypatch.setattr(room, "checkpoint", replacement)
    net = unet(use_checkpoint=use_checkpoint)
    net(images(), times())
    blocks = [m for m in net.modules() if isinstance(m, room.ResBlock | room.AttentionBlock)]
    assert len(calls) == (len(blocks) if use_checkpoint else 0)
    assert all(isinstance(inputs, tuple) and params and flag is True for inputs, params, flag in calls)


@BOTH
@pytest.mark.parametrize("norms", [False, True])
def test_recomputation_happens_once_per_backward(use_checkpoint: bool, norms: bool) -> None:
    """Norms are not computed a third time in blocks that recompute as a whole."""
    net, x, t = unet(use_checkpoint=use_checkpoint), images(), times()
    net.set_recompute_norms(norms)
    runs, again = [], use_checkpoint or norms
    net.middle_block[0].in_layers[0].register_forward_hook(lambda *_: runs.append(1))
    loss = net(x, t).pow(2).mean()
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 1 + again
    with torch.no_grad():
        net(x, t)
    assert len(runs) == 2 + again


def test_gradients_with_dropout_are_those_without_recomputation() -> None:
    gradients = []
    for use_checkpoint in (False, True):
        net = unet(use_checkpoint=use_checkpoint, dropout=0.3).train()
        torch.manual_seed(3)
        net(images(), times()).pow(2).mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain)


@BOTH
def test_frozen_weights_and_repeated_backward(use_checkpoint: bool) -> None:
    net = classifier(use_checkpoint=use_checkpoint).requires_grad_(False)
    x = images().requires_grad_()
    loss = net(x, times()).logsumexp(dim=1).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert first.abs().sum() > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@BOTH
def test_partly_frozen_weights(use_checkpoint: bool) -> None:
    net = unet(use_checkpoint=use_checkpoint)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("qkv", "norm", "proj")))
    net(images(), times()).pow(2).mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("again", ["nothing", "blocks", "norms"])
def test_second_and_forward_derivatives(again: str) -> None:
    net = unet(use_checkpoint=again == "blocks").double()
    net.set_recompute_norms(again == "norms")
    x, t = images(1).double(), times(1)
    v, step = torch.randn_like(x), 1e-6

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(net(at, t).pow(2).sum(), at, create_graph=True)[0]

    at = x.clone().requires_grad_()
    first = torch.autograd.grad(net(at, t).pow(2).sum(), at, create_graph=True)[0]
    (product,) = torch.autograd.grad((first * v).sum(), at)
    torch.testing.assert_close(product, ((gradient(x + step * v) - gradient(x - step * v)) / (2 * step)).detach(),
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    with torch.no_grad():
        slope = (net(x + step * v, t) - net(x - step * v, t)) / (2 * step)
    _, tangent = torch.func.jvp(lambda a: net(a, t), (x,), (v,))
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = net(torch.autograd.forward_ad.make_dual(x, v), t)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.func.grad(lambda a: net(a, t).pow(2).sum())(x), first)


@pytest.mark.parametrize("again", ["blocks", "norms"])
def test_nothing_is_recomputed_in_forward_mode(again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has the tangents, the image or some weights alone: torch 2.11 raises where it is recomputed."""
    net = unet(use_checkpoint=again == "blocks")
    net.set_recompute_norms(again == "norms")
    x, t = images(1), times(1)
    calls: list[int] = []
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda f, *args, **_: calls.append(1) or f(*args))
    net(x, t)
    assert calls
    calls.clear()
    late = {name: weight for name, weight in net.named_parameters() if name.startswith("output_blocks.1.")}
    with torch.autograd.forward_ad.dual_level():
        net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), t)
        dual = {name: torch.autograd.forward_ad.make_dual(w, torch.ones_like(w)) for name, w in late.items()}
        out = torch.func.functional_call(net, dual, (x, t))
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    assert not calls


@pytest.mark.parametrize("again", ["nothing", "norms", "blocks"])
def test_a_backward_pass_within_forward_mode_is_that_of_its_forward_pass(again: str) -> None:
    """The layout that the forward pass had, and the kernels that it took, are those of the backward pass."""
    net = unet(use_checkpoint=again == "blocks")
    net.set_recompute_norms(again == "norms")
    torch.nn.init.normal_(net.out[2].weight)
    found = []
    for level in (contextlib.nullcontext, torch.autograd.forward_ad.dual_level):
        loss = net(images(1), times(1)).square().sum()
        with level():
            found.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found))


def gradients_of(net: Any, seed: int = 3) -> list[Tensor | None]:
    net.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    net(images(), times()).pow(2).mean().backward()
    return [parameter.grad for parameter in net.parameters()]


MAKERS = pytest.mark.parametrize(
    "make",
    [
        lambda: unet(dropout=0.3),
        lambda: unet(dropout=0.3, use_scale_shift_norm=False, resblock_updown=False),
        lambda: unet(use_new_attention_order=True, resblock_updown=True),
        lambda: classifier(),
    ],
    ids=["unet", "plain", "updown", "classifier"],
)


@MAKERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_computed_again_give_the_same_gradients(make: Any, dtype: torch.dtype) -> None:
    net = make().train()
    net.set_compute_dtype(dtype)
    kept = gradients_of(net)
    net.set_recompute_norms()
    again = gradients_of(net)
    assert all(torch.equal(a, b) for a, b in zip(kept, again)) and any(g.abs().sum() > 0 for g in kept)
    net.set_recompute_norms(False)
    runs: list[int] = []
    net.middle_block[0].in_layers[0].register_forward_hook(lambda *_: runs.append(1))
    gradients_of(net)
    assert len(runs) == 1


@MAKERS
def test_only_norms_are_computed_again(make: Any) -> None:
    """No product and no convolution is done twice, and much less is kept than without."""
    from torch.utils.flop_counter import FlopCounterMode

    net, operations, kept = make().train(), [], []
    net.set_fused_norm(False)  # which keeps little by itself
    for wanted in (False, True):
        net.set_recompute_norms(wanted)
        with FlopCounterMode(display=False) as counter:
            gradients_of(net)
        operations.append(counter.get_total_flops())
        sizes: dict[int, int] = {}
        alive = []

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes, alive: list[Any] = alive) -> Tensor:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            alive.append(tensor.untyped_storage())  # while it lives, no other has its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(images(), times())
        own = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        kept.append(sum(size for key, size in sizes.items() if key not in own))
    assert operations[0] == operations[1]
    assert kept[1] < 0.65 * kept[0], kept


def test_checkpoint_takes_parameters_it_does_not_need() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor(2.0, requires_grad=True)
    checkpoint(lambda a: a * weight, (x,), [weight], True).backward()
    assert (x.grad, weight.grad) == (torch.tensor(3.0), torch.tensor(2.0))
