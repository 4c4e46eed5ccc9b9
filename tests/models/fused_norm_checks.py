"""What the kernels of models/triton_norm.py compute, on the CPU by Triton's interpreter: run by test_fused_norm.py in a process of
its own, because the interpreter is switched on before Triton is imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import images, times, unet
from torch import Tensor

from guided_diffusion.models import fused_norm, triton_norm
from guided_diffusion.models.layers import channels_last

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Odd sizes, several chunks (more than 64 tiles of rows), several tiles of channels, one place only.
SIZES = [(2, 64, 6, 6), (1, 96, 16, 20), (3, 192, 5, 7), (1, 32, 130, 65), (2, 256, 1, 1)]


WAYS = {"chunks": 0, "whole": 1 << 20}
"""The largest image, in rows, whose groups are one program each: both ways must do for every size."""


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How an image is cut, whatever its size."""
    monkeypatch.setattr(triton_norm, "_WHOLE", WAYS[request.param])
    return request.param


def inputs(size: tuple[int, ...], scaled: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x far from zero, weight, bias and, if scaled, scale and shift beside each other in one tensor, as the network has them."""
    n, c = size[:2]
    generator = torch.Generator().manual_seed(sum(size))
    made = [3 + 2 * torch.randn(size, generator=generator), *torch.randn(2, c, generator=generator)]
    made[0] = channels_last(made[0].to(dtype))
    made += [torch.randn(n, 2 * c, 1, 1, generator=generator).to(dtype)] if scaled else []
    return [tensor.detach().requires_grad_() for tensor in made]


def answer(function: Any, given: list[Tensor], silu: bool = True) -> Tensor:
    scale, shift = given[3].chunk(2, dim=1) if len(given) > 3 else (None, None)
    return function(*given[:3], scale, shift, 32, 1e-5, silu)


def like(size: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["norm", "scaled"])
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
def test_kernels_compute_what_is_written_out_in_float64(
    size: tuple[int, ...], scaled: bool, silu: bool, way: str
) -> None:
    given = inputs(size, scaled)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    y, want = answer(triton_norm.fused, given, silu), answer(triton_norm.plain, exact, silu)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-5)
    g = like(size)
    for ours, theirs in zip(torch.autograd.grad(y, given, g), torch.autograd.grad(want, exact, g.double())):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_round_once_in_half_precision(dtype: str, way: str) -> None:
    """The answer is the nearest half of the exact one, or its neighbour; written out in that format it is further off."""
    given = inputs((2, 64, 6, 6), True, DTYPES[dtype])
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    y, want = answer(triton_norm.fused, given), answer(triton_norm.plain, exact)
    step = torch.finfo(DTYPES[dtype]).eps
    assert y.dtype == DTYPES[dtype]
    torch.testing.assert_close(y.double(), want, rtol=step, atol=1e-5)
    with torch.no_grad():
        rounded = answer(triton_norm.plain, [tensor.to(DTYPES[dtype]) for tensor in given])
    assert (y - want).abs().mean() < (rounded - want).abs().mean()
    g = like((2, 64, 6, 6)).to(DTYPES[dtype])
    found = torch.autograd.grad(y, given, g)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in given]
    for ours, theirs in zip(found, torch.autograd.grad(want, exact, g.double())):
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * step, atol=2 * step * float(theirs.abs().max()) / 8)


def test_kernels_keep_numbers_that_lie_close_together_far_from_zero(way: str) -> None:
    """A variance as the mean of squares less the square of the mean would be lost at 3000 +- 0.1."""
    x = channels_last(3000 + 0.1 * like((1, 32, 16, 20)))
    ones, zeros = torch.ones(32), torch.zeros(32)
    y = triton_norm.fused(x, ones, zeros, None, None, 32, 1e-5, False)
    want = triton_norm.plain(x.double(), ones.double(), zeros.double(), None, None, 32, 1e-5, False)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-2)


def test_kernels_give_an_image_the_same_numbers_in_any_batch_and_again(way: str) -> None:
    given = inputs((3, 64, 40, 30), True)
    g = channels_last(like((3, 64, 40, 30)))
    y = answer(triton_norm.fused, given)
    (dx, *_, de) = torch.autograd.grad(y, given, g)
    alone = [given[0][1:2], given[1], given[2], given[3][1:2]]
    y_alone = answer(triton_norm.fused, alone)
    dx_alone, de_alone = torch.autograd.grad(y_alone, [alone[0], alone[3]], g[1:2])
    assert torch.equal(y[1:2], y_alone) and torch.equal(dx[1:2], dx_alone) and torch.equal(de[1:2], de_alone)
    again = torch.autograd.grad(answer(triton_norm.fused, given), given, g)
    assert torch.equal(again[0], dx) and torch.equal(again[-1], de)


@pytest.mark.parametrize("asked", [(0,), (1, 2), (0, 3), (2,), (3,)], ids=str)
def test_kernels_give_the_gradients_that_are_asked_for(asked: tuple[int, ...], way: str) -> None:
    given = inputs((2, 64, 3, 4), True)
    for k, tensor in enumerate(given):
        tensor.requires_grad_(k in asked)
    wanted = [given[k] for k in asked]
    g = like((2, 64, 3, 4))
    found = torch.autograd.grad(answer(triton_norm.fused, given), wanted, g)
    # torch's own backward (2.13, CPU) crashes where weights alone have gradients and memory is channels_last
    want = answer(triton_norm.plain, [given[0].contiguous(), *given[1:]])
    for ours, theirs in zip(found, torch.autograd.grad(want, wanted, g)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_kernels_have_second_derivatives(scaled: bool, layout: torch.memory_format) -> None:
    """By the written-out form; the first ones of both ways agree too."""
    given, g = inputs((1, 32, 3, 2), scaled), like((1, 32, 3, 2)).requires_grad_()
    given[0] = given[0].detach().contiguous(memory_format=layout).requires_grad_()
    found = []
    for way in (triton_norm.fused, triton_norm.plain):
        first = torch.autograd.grad(answer(way, given), given, g, create_graph=True)
        found.append((first, torch.autograd.grad(sum(part.pow(2).sum() for part in first), [*given, g])))
    for ours, theirs in zip(*([*first, *second] for first, second in found)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("changes", [{}, {"use_scale_shift_norm": False}, {"use_checkpoint": True}], ids=str)
def test_kernels_within_a_network_change_nothing_but_rounding(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_norm, "on_device", lambda x: True)
    if changes:  # the interpreter takes its time for every program, of which chunks need fewer
        monkeypatch.setattr(triton_norm, "_WHOLE", WAYS["chunks"])
    fused_norm.works.cache_clear()
    calls: list[int] = []
    inner = triton_norm.fused
    monkeypatch.setattr(triton_norm, "fused", lambda *args: calls.append(1) or inner(*args))
    net = unet(channel_mult=(1, 2), **changes).train()
    net.set_fused_norm(False)
    x, t = images(), times()
    want = net(x, t)
    of_want = torch.autograd.grad(want.pow(2).sum(), list(net.parameters()), allow_unused=True)
    assert not calls
    net.set_fused_norm(True)
    got = net(x, t)
    blocks = sum(type(module).__name__ == "ResBlock" for module in net.modules())
    del calls[:2]  # the trial whether they work
    assert len(calls) == blocks * (1 if "use_scale_shift_norm" in changes else 2)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    of_got = torch.autograd.grad(got.pow(2).sum(), list(net.parameters()), allow_unused=True)
    for ours, theirs in zip(of_got, of_want):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * max(1.0, float(theirs.abs().max())))
    calls.clear()
    net.set_fused_norm(False)
    torch.testing.assert_close(net(x, t), want, rtol=0, atol=0)
    assert not calls
