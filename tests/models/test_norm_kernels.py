"""What the kernels of norm, scale, shift and SiLU compute: the CPU's here; Triton's in its interpreter, by test_norm_triton.py, which
runs this file in a process of its own, because the interpreter is switched on before Triton is imported."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from small_networks import images, times, unet
from torch import Tensor

from guided_diffusion.models.kernels import norm
from guided_diffusion.models.kernels.layout import channels_last
from guided_diffusion.models.layers import GroupNorm32

TRITON = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Odd sizes, several chunks (more than 64 tiles of rows), several tiles of channels, one place only.
SIZES = [(2, 64, 6, 6), (1, 96, 16, 20), (3, 192, 5, 7), (1, 32, 130, 65), (2, 256, 1, 1)]

WAYS = {"chunks": 0, "whole": 1 << 20}
"""The largest image, in rows, whose groups are one Triton program each: both ways must do for every size."""


@pytest.fixture(params=list(WAYS) if TRITON else ["cpu"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if not TRITON:
        from guided_diffusion.models.kernels import cpu

        return cpu
    from guided_diffusion.models.kernels import norm_triton

    monkeypatch.setattr(norm_triton, "_WHOLE", WAYS[request.param])
    return norm_triton


def inputs(size: tuple[int, ...], shared: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x far from zero, and a and b [N, C]; if shared, the same ones for all images, as without scale and shift."""
    generator = torch.Generator().manual_seed(sum(size))
    x = channels_last((3 + 2 * torch.randn(size, generator=generator)).to(dtype)).requires_grad_()
    lines = torch.randn(2, 1 if shared else size[0], size[1], generator=generator).requires_grad_()
    return [x, *(line.expand(size[0], -1) for line in lines)]


def answer(kernels: Any, given: list[Tensor]) -> Tensor:
    return norm.NormSiLU.apply(*given, 32, 1e-5, kernels)


def exactly(given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same written out in float64, and what it was given."""
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    return norm.written_out(*exact, 32, 1e-5), exact


def like(size: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_kernels_compute_what_is_written_out_in_float64(size: tuple[int, ...], shared: bool, kernels: Any) -> None:
    given = inputs(size, shared)
    y, (want, exact) = answer(kernels, given), exactly(given)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-5)
    g = like(size)
    for ours, theirs in zip(torch.autograd.grad(y, given, g), torch.autograd.grad(want, exact, g.double())):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_round_once_in_half_precision(dtype: str, kernels: Any) -> None:
    """The answer is the nearest half of the exact one, or its neighbour; written out in that format it is further off."""
    given = inputs((2, 64, 6, 6), False, DTYPES[dtype])
    y, (want, exact) = answer(kernels, given), exactly(given)
    step = torch.finfo(DTYPES[dtype]).eps
    assert y.dtype == DTYPES[dtype]
    torch.testing.assert_close(y.double(), want, rtol=step, atol=1e-5)
    with torch.no_grad():
        rounded = norm.written_out(*(tensor.to(DTYPES[dtype]) for tensor in given), 32, 1e-5)
    assert (y - want).abs().mean() < (rounded - want).abs().mean()
    g = like((2, 64, 6, 6)).to(DTYPES[dtype])
    found = torch.autograd.grad(y, given, g)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in given]
    for ours, theirs in zip(found, torch.autograd.grad(want, exact, g.double())):
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * step, atol=2 * step * float(theirs.abs().max()) / 8)


def test_kernels_keep_numbers_that_lie_close_together_far_from_zero(kernels: Any) -> None:
    """A variance as the mean of squares less the square of the mean would be lost at 3000 +- 0.1."""
    given = [channels_last(3000 + 0.1 * like((1, 32, 16, 20))), torch.ones(1, 32), torch.zeros(1, 32)]
    torch.testing.assert_close(answer(kernels, given).double(), exactly(given)[0].detach(), rtol=0, atol=2e-2)


PICTURES = {
    "noise": (0.0, 1.0), "smooth": (1.0, 0.1), "nearly flat": (1.0, 1e-3), "far from zero": (100.0, 1.0), "flat": (0.3, 0.0)
}  # fmt: skip


@pytest.mark.skipif(TRITON, reason="of the CPU's, whose sums run in an order that loses less")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("shape", [(2, 64, 24, 16), (3, 96, 1, 2), (1, 32, 5, 6, 4)], ids=str)
def test_kernels_keep_digits_where_the_mean_is_large(
    picture: str, shape: tuple[int, ...], dtype: str, kernels: Any
) -> None:
    """No further from float64, with the gradients, than three times torch's contiguous kernel in float32."""
    mean, deviation = PICTURES[picture]
    x = channels_last((mean + deviation * like(shape, 1)).to(DTYPES[dtype])).requires_grad_()
    given = [x, torch.ones(shape[:2], requires_grad=True), like(shape[:2], 2).requires_grad_()]
    (want, exact), g = exactly(given), like(shape).to(DTYPES[dtype])
    usual = [tensor.detach().float().requires_grad_() for tensor in given]
    answers = []
    for y, leaves in ((answer(kernels, given), given), (norm.written_out(*usual, 32, 1e-5), usual), (want, exact)):
        answers.append([y, *torch.autograd.grad(y, leaves, g.to(y.dtype))])
    for ours, theirs, right in zip(*answers):
        rounding = torch.finfo(ours.dtype).eps * float(right.detach().square().mean().sqrt())
        wrong, theirs_wrong = (float((part.double() - right).square().mean().sqrt()) for part in (ours, theirs))
        assert wrong <= 3 * theirs_wrong + 4 * rounding


def test_kernels_give_an_image_the_same_numbers_in_any_batch_and_again(kernels: Any) -> None:
    given, g = inputs((3, 64, 40, 30)), channels_last(like((3, 64, 40, 30)))
    found = torch.autograd.grad(answer(kernels, given), given, g)
    alone = [tensor.detach()[1:2].requires_grad_() for tensor in given]
    y = answer(kernels, alone)
    assert torch.equal(answer(kernels, given)[1:2], y)
    assert all(
        torch.equal(part[1:2], own) for part, own in zip(found, torch.autograd.grad(y, alone, g[1:2]), strict=True)
    )
    again = torch.autograd.grad(answer(kernels, given), given, g)
    assert all(torch.equal(part, other) for part, other in zip(found, again))


@pytest.mark.parametrize("asked", [(0,), (1, 2), (0, 2), (1,)], ids=str)
def test_kernels_give_the_gradients_that_are_asked_for(asked: tuple[int, ...], kernels: Any) -> None:
    given, g = inputs((2, 64, 3, 4)), like((2, 64, 3, 4))
    given = [tensor.detach().requires_grad_(k in asked) for k, tensor in enumerate(given)]
    want, exact = exactly(given)
    for create_graph in (False, True):
        found = torch.autograd.grad(answer(kernels, given), [given[k] for k in asked], g, create_graph=create_graph)
        for ours, theirs in zip(
            found, torch.autograd.grad(want, [exact[k] for k in asked], g.double(), retain_graph=True)
        ):
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)


def test_kernels_have_second_derivatives(kernels: Any) -> None:
    given, g = inputs((1, 32, 3, 2)), like((1, 32, 3, 2)).requires_grad_()
    want, exact = exactly(given)
    found = []
    for y, leaves, slope in ((answer(kernels, given), given, g), (want, exact, g.detach().double().requires_grad_())):
        first = torch.autograd.grad(y, leaves, slope, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(part.pow(2).sum() for part in first), [*leaves, slope])])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("batch", [3, 1], ids=["own scales", "one scale for all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_and_shift_weight_and_bias_get_their_gradients(batch: int, dtype: torch.dtype, kernels: Any) -> None:
    """Through one factor and one summand, against the layers one after the other in float64."""
    own = GroupNorm32(32, 64)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    x = channels_last(2 + like((3, 64, 6, 5))).to(dtype).requires_grad_()
    both, g = like((batch, 128, 1, 1), 3).to(dtype).requires_grad_(), like((3, 64, 6, 5), 4)
    y = _norm_silu(x, own, both, kernels)
    found = torch.autograd.grad(y, [x, both, *own.parameters()], g.to(dtype))
    leaves = [part.detach().double().requires_grad_() for part in (x, both, *own.parameters())]
    scale, shift = leaves[1].chunk(2, dim=1)
    want = torch.nn.functional.group_norm(leaves[0].contiguous(), 32, leaves[2], leaves[3])
    want = torch.nn.functional.silu(want * (1 + scale) + shift)
    expected = torch.autograd.grad(want, leaves, g.double())
    for ours, theirs in zip((y, *found), (want, *expected)):
        bound = 1e-5 if ours.dtype == torch.float32 and dtype == torch.float32 else 4e-3  # bfloat16 keeps 8 bits
        assert (ours.double() - theirs).norm() < bound * theirs.norm()


def test_scale_and_shift_of_different_batches_take_torchs_operators() -> None:
    own, x = GroupNorm32(32, 32), channels_last(like((3, 32, 2, 2)))
    one, three = like((1, 32, 1, 1), 1), like((3, 32, 1, 1), 2)
    assert norm._kernels(x, three, three) is not None
    for scale, shift in ((one, three), (three, one)):
        assert norm._kernels(x, scale, shift) is None
        want = torch.nn.functional.silu(own(x) * (1 + scale) + shift)
        torch.testing.assert_close(norm.norm_silu(x, own, (scale, shift)), want)


def test_a_gpu_takes_as_many_images_as_its_grid_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "on_gpu", lambda x: True)
    monkeypatch.setattr(norm, "works", lambda device, dtype: True)
    monkeypatch.setitem(sys.modules, "guided_diffusion.models.kernels.norm_triton", ModuleType("norm_triton"))
    for batch, taken in ((65535, True), (65536, False)):
        assert (norm._kernels(channels_last(torch.empty(batch, 1, 1, 1))) is not None) == taken


def _norm_silu(x: Tensor, own: GroupNorm32, both: Tensor, kernels: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "_kernels", lambda *_: kernels)
        return norm.norm_silu(x, own, both.chunk(2, dim=1))


@pytest.mark.parametrize("changes", [{}, {"use_scale_shift_norm": False}, {"use_checkpoint": True}], ids=str)
def test_kernels_within_a_network_change_nothing_but_rounding(
    changes: dict[str, Any], kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if TRITON and bool(changes) == bool(kernels._WHOLE):
        pytest.skip("the interpreter takes its time for every program, of which chunks need fewer")
    monkeypatch.setattr(norm, "on_gpu", lambda x: TRITON)
    norm.works.cache_clear()
    calls: list[int] = []
    inner = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: calls.append(1) or inner(*args))
    net = unet(channel_mult=(1, 2), **changes).train()
    net.set_fused_norm(False)
    x, t = images(), times()
    want = net(x, t)
    of_want = torch.autograd.grad(want.pow(2).sum(), list(net.parameters()), allow_unused=True)
    assert not calls
    net.set_fused_norm(True)
    got = net(x, t)
    del calls[: 2 * TRITON]  # the trial whether they work
    assert len(calls) == 2 * sum(type(module).__name__ == "ResBlock" for module in net.modules())
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    of_got = torch.autograd.grad(got.pow(2).sum(), list(net.parameters()), allow_unused=True)
    for ours, theirs in zip(of_got, of_want):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * max(1.0, float(theirs.abs().max())))
