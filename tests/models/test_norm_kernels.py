"""What the kernels of norm, scale, shift and SiLU compute: the CPU's here; Triton's in its interpreter, by test_norm_triton.py, which
runs this file in a process of its own, because the interpreter is switched on before Triton is imported."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch
from small_networks import images, times, unet
from torch import Tensor

from guided_diffusion.models.kernels import norm
from guided_diffusion.models.kernels.layout import channels_last
from guided_diffusion.models.kernels.lines import Lines
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


def inputs(
    size: tuple[int, ...], lines: str = "scaled", dtype: torch.dtype = torch.float32, offset: bool = TRITON
) -> list[Tensor]:
    """x far from zero, offset or None, weight and bias [C], and scale and shift of each image unless lines are "plain"."""
    generator = torch.Generator().manual_seed(sum(size))
    x = channels_last((3 + 2 * torch.randn(size, generator=generator)).to(dtype))
    weight, bias, offset_ = torch.randn(3, size[1], generator=generator)
    scale_shift = (
        () if lines == "plain" else torch.randn(size[0], 2 * size[1], generator=generator).to(dtype).chunk(2, dim=1)
    )
    given = [x, 10 * offset_ if offset else None, weight, bias, *scale_shift]
    return [tensor if tensor is None else tensor.detach().requires_grad_() for tensor in given]  # type: ignore[misc]


def answer(kernels: Any, given: list[Tensor], silu: bool = True) -> Tensor:
    return norm.FusedNorm.apply(given[0], kernels, 32, 1e-5, silu, *Lines(*given[1:]))


def exactly(given: list[Tensor], silu: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The same written out in float64, and what it was given."""
    exact = [tensor if tensor is None else tensor.detach().double().requires_grad_() for tensor in given]
    return norm.written_out(exact[0], 32, 1e-5, silu, *exact[1:]), exact


def slopes(y: Tensor, given: list[Tensor], g: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Gradients by all that was given."""
    return torch.autograd.grad(y, [tensor for tensor in given if tensor is not None], g, **options)


def rounding(expected: tuple[Tensor, ...], given: list[Tensor], step: float, least: float = 0.0) -> list[float]:
    """How far gradients may be off: by `step` of the largest, or of `least`."""
    bounds = [step * max(least, float(theirs.abs().max())) for theirs in expected]
    if given[1] is not None:  # the offset's is the sum of dx over all places, which may be small where dx are not
        bounds[1] = 1e-6 * float(expected[0].abs().sum((0, 2, 3)).max())
    return bounds


def like(size: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("lines", ["scaled", "plain"])
def test_kernels_compute_what_is_written_out_in_float64(size: tuple[int, ...], lines: str, kernels: Any) -> None:
    silu = lines == "scaled" or not TRITON  # attention's norms have none of all that
    given = inputs(size, lines, offset=TRITON and silu)
    y, (want, exact) = answer(kernels, given, silu), exactly(given, silu)
    again = norm.again(y)
    assert y.is_contiguous(memory_format=torch.channels_last) and again is not None
    with torch.no_grad():
        assert torch.equal(again(), y)
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-5)
    g = like(size)
    found, expected = slopes(y, given, g), slopes(want, exact, g.double())
    for ours, theirs, atol in zip(found, expected, rounding(expected, given, 2e-5, 1.0)):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_round_once_in_half_precision(dtype: str, kernels: Any) -> None:
    """The answer is the nearest half of the exact one, or its neighbour; written out in that format it is further off."""
    given = inputs((2, 64, 6, 6), "scaled", DTYPES[dtype])
    y, (want, exact) = answer(kernels, given), exactly(given)
    step = torch.finfo(DTYPES[dtype]).eps
    assert y.dtype == DTYPES[dtype]
    torch.testing.assert_close(y.double(), want, rtol=step, atol=1e-5)
    with torch.no_grad():
        x, offset, *lines = (tensor if tensor is None else tensor.to(DTYPES[dtype]) for tensor in given)
        rounded = torch.nn.functional.group_norm(norm.shifted(x, offset).contiguous(), 32, *lines[:2])
        rounded = torch.nn.functional.silu(norm.modulated(rounded, *lines[2:]))
    assert (y - want).abs().mean() < (rounded - want).abs().mean()
    g = like((2, 64, 6, 6)).to(DTYPES[dtype])
    found = slopes(y, given, g)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in given if tensor is not None]
    for ours, theirs in zip(found, slopes(want, exact, g.double())):
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * step, atol=2 * step * float(theirs.abs().max()) / 8)


def test_kernels_keep_numbers_that_lie_close_together_far_from_zero(kernels: Any) -> None:
    """A variance as the mean of squares less the square of the mean would be lost at 3000 +- 0.1."""
    given = [channels_last(3000 + 0.1 * like((1, 32, 16, 20))), None, torch.ones(32), torch.zeros(32)]
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
    ones = torch.ones(shape[1], requires_grad=True)
    lines = (
        ones.detach().clone().requires_grad_(),
        torch.zeros(shape[:2], requires_grad=True),
        like(shape[:2], 2).requires_grad_(),
    )
    given = [x, None, ones, *lines]
    (want, exact), g = exactly(given), like(shape).to(DTYPES[dtype])
    usual = [tensor if tensor is None else tensor.detach().float().requires_grad_() for tensor in given]
    theirs = norm.written_out(usual[0], 32, 1e-5, True, *usual[1:])
    answers = []
    for y, leaves in ((answer(kernels, given), given), (theirs, usual), (want, exact)):
        answers.append([y, *slopes(y, leaves, g.to(y.dtype))])
    for ours, theirs, right in zip(*answers):
        rounding = torch.finfo(ours.dtype).eps * float(right.detach().square().mean().sqrt())
        wrong, theirs_wrong = (float((part.double() - right).square().mean().sqrt()) for part in (ours, theirs))
        assert wrong <= 3 * theirs_wrong + 4 * rounding


def test_kernels_give_an_image_the_same_numbers_in_any_batch_and_again(kernels: Any) -> None:
    given, g = inputs((3, 64, 40, 30)), channels_last(like((3, 64, 40, 30)))
    whole, again = (slopes(answer(kernels, given), given, g) for _ in range(2))
    assert all(torch.equal(part, other) for part, other in zip(whole, again))
    own = [0, *range(len(given))[-2:]]  # x, scale and shift, which each image has for itself
    alone = [tensor.detach()[1:2].requires_grad_() if k in own else tensor for k, tensor in enumerate(given)]
    y = answer(kernels, alone)
    assert torch.equal(answer(kernels, given)[1:2], y)
    of_alone = torch.autograd.grad(y, [alone[k] for k in own], g[1:2])
    of_whole = torch.autograd.grad(answer(kernels, given), [given[k] for k in own], g)
    assert all(torch.equal(part[1:2], other) for part, other in zip(of_whole, of_alone, strict=True))


@pytest.mark.parametrize("asked", [(0,), (2, 3), (0, 3), (4,), (0, 5)], ids=str)
def test_kernels_give_the_gradients_that_are_asked_for(asked: tuple[int, ...], kernels: Any) -> None:
    given, g = inputs((2, 64, 3, 4)), like((2, 64, 3, 4))
    given = [tensor if tensor is None else tensor.detach().requires_grad_(k in asked) for k, tensor in enumerate(given)]
    want, exact = exactly(given)
    expected = torch.autograd.grad(want, [exact[k] for k in asked], g.double())
    for create_graph in (False, True):
        found = torch.autograd.grad(answer(kernels, given), [given[k] for k in asked], g, create_graph=create_graph)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)


def test_kernels_have_second_derivatives(kernels: Any) -> None:
    given, g = inputs((1, 64, 3, 2)), like((1, 64, 3, 2)).requires_grad_()
    want, exact = exactly(given)
    found = []
    for y, leaves, slope in ((answer(kernels, given), given, g), (want, exact, g.detach().double().requires_grad_())):
        first = slopes(y, leaves, slope, create_graph=True)
        found.append([*first, *slopes(sum(part.pow(2).sum() for part in first), [*leaves, slope], None)])
    for ours, theirs in zip(*found):
        atol = 1e-3 * max(
            1e-2, float(theirs.detach().abs().max())
        )  # with a channel per group, an offset changes nothing
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("batch", [3, 1], ids=["own scales", "one scale for all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_and_shift_weight_and_bias_get_their_gradients(batch: int, dtype: torch.dtype, kernels: Any) -> None:
    """Through one factor and one summand, against the layers one after the other in float64."""
    own = GroupNorm32(32, 64)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    x = channels_last(2 + like((3, 64, 6, 5))).to(dtype).requires_grad_()
    both, g = like((batch, 128), 3).to(dtype).requires_grad_(), like((3, 64, 6, 5), 4)
    y = _norm_silu(x, own, both, kernels)
    found = torch.autograd.grad(y, [x, both, *own.parameters()], g.to(dtype))
    leaves = [part.detach().double().requires_grad_() for part in (x, both, *own.parameters())]
    scale, shift = leaves[1][..., None, None].chunk(2, dim=1)
    want = torch.nn.functional.group_norm(leaves[0].contiguous(), 32, leaves[2], leaves[3])
    want = torch.nn.functional.silu(want * (1 + scale) + shift)
    expected = torch.autograd.grad(want, leaves, g.double())
    for ours, theirs in zip((y, *found), (want, *expected)):
        bound = 1e-5 if ours.dtype == torch.float32 and dtype == torch.float32 else 4e-3  # bfloat16 keeps 8 bits
        assert (ours.double() - theirs).norm() < bound * theirs.norm()


def test_scale_and_shift_of_different_batches_take_torchs_operators() -> None:
    own, x = GroupNorm32(32, 32), channels_last(like((3, 32, 2, 2)))
    one, three = like((1, 32), 1), like((3, 32), 2)
    assert norm.kernels_for(x, three, three) is not None
    for scale, shift in ((one, three), (three, one)):
        assert norm.kernels_for(x, scale, shift) is None
        want = torch.nn.functional.silu(own(x) * (1 + scale[..., None, None]) + shift[..., None, None])
        torch.testing.assert_close(norm.norm_silu(x, own, (scale, shift)), want)


def test_a_gpu_takes_as_many_images_as_its_grid_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "on_gpu", lambda x: True)
    monkeypatch.setattr(norm, "triton_kernels", lambda device, dtype: norm)
    for batch, taken in ((65535, True), (65536, False)):
        assert (norm.kernels_for(channels_last(torch.empty(batch, 1, 1, 1))) is not None) == taken


def _norm_silu(x: Tensor, own: GroupNorm32, both: Tensor, kernels: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "kernels_for", lambda *_: kernels)
        return norm.norm_silu(x, own, both.chunk(2, dim=1))


@pytest.mark.skipif(not TRITON, reason="of Triton's")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 96, 5, 7), (1, 32, 1, 1), (3, 64, 40, 30)], ids=str)
def test_a_residual_sum_adds_the_bias_too(size: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "on_gpu", lambda x: True)
    x, y = (channels_last(like(size, seed)).to(DTYPES[dtype]).requires_grad_() for seed in (1, 2))
    bias, g = (like(size[1:2], 3) * 100).requires_grad_(), like(size, 4).to(DTYPES[dtype])
    found = norm.residual_sum(x, y, bias)
    assert type(found.grad_fn).__name__ == "_FusedSumBackward"
    with torch.no_grad():
        assert torch.equal(norm.residual_sum(x, y, bias), found)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, y, bias)]
    want = leaves[0] + leaves[1] + leaves[2][:, None, None]
    step = torch.finfo(DTYPES[dtype]).eps  # the interpreter cuts digits off bfloat16 instead of rounding
    torch.testing.assert_close(found.double(), want, rtol=step, atol=100 * torch.finfo(torch.float32).eps)
    for ours, theirs in zip(torch.autograd.grad(found, [x, y, bias], g), torch.autograd.grad(want, leaves, g.double())):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not TRITON, reason="of Triton's")
@pytest.mark.parametrize("rows", [3, 1], ids=["each image", "one for all"])
def test_offsets_of_images(rows: int, kernels: Any) -> None:
    given, g = inputs((3, 64, 3, 2), "plain"), like((3, 64, 3, 2))
    given[1] = like((rows, 64), 5).requires_grad_()
    y, (want, exact) = answer(kernels, given), exactly(given)
    torch.testing.assert_close(y, want.float(), rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(slopes(y, given, g), slopes(want, exact, g.double())):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize(("images", "offsets", "fits"), [(3, 2, False), (2, 3, False), (3, 3, True), (3, 1, True)])
def test_offsets_of_other_images_are_refused(
    images: int, offsets: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel would read beyond them, or leave some out."""
    monkeypatch.setattr(norm, "on_gpu", lambda x: TRITON)
    own, x, offset = GroupNorm32(32, 32), channels_last(like((images, 32, 2, 2))), like((offsets, 32), 1)
    with torch.no_grad(), contextlib.nullcontext() if fits else pytest.raises(RuntimeError, match="must match"):
        found = norm.norm_silu(x, own, (), offset)
        torch.testing.assert_close(found, norm.norm_silu(norm.shifted(x, offset), own))


def test_without_gradients_the_numbers_are_the_same(kernels: Any) -> None:
    own, x, both = GroupNorm32(32, 64), channels_last(like((2, 64, 3, 2))), like((2, 128), 3)
    want = _norm_silu(x, own, both, kernels)
    with torch.no_grad():
        assert torch.equal(_norm_silu(x, own, both, kernels), want)


def test_where_no_kernel_fits_the_bias_is_added_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, bias = like((2, 32, 3, 4), 1), like((2, 32, 3, 4), 2), like((32,), 3)
    want = x + y + bias[:, None, None]
    torch.testing.assert_close(norm.residual_sum(x, y, bias), want)
    own = GroupNorm32(32, 32)
    torch.testing.assert_close(
        norm.norm_silu(channels_last(x), own, (), bias), norm.norm_silu(norm.shifted(x, bias), own)
    )
    assert norm.residual_sum(x, y, None).equal(x + y) and not norm.takes_bias(channels_last(x))


CHANGES: list[dict[str, Any]] = [
    {},
    {"use_scale_shift_norm": False},
    {"use_checkpoint": True},
    {"resblock_updown": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_kernels_within_a_network_change_nothing_but_rounding(
    changes: dict[str, Any], recompute: bool, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [(CHANGES[1], False), (CHANGES[3], True)]
    if TRITON and (kernels._WHOLE or (changes, recompute) not in few):
        pytest.skip("the interpreter takes its time for every program, of which chunks need fewer")
    monkeypatch.setattr(norm, "on_gpu", lambda x: TRITON)
    norm.triton_kernels.cache_clear()
    calls: list[int] = []
    inner = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: calls.append(1) or inner(*args))
    net = unet(channel_mult=(1, 2), **changes).train()
    for parameter in net.parameters():  # biases of convolutions begin near zero, and the last convolution at zero
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    net.set_fused_norm(False)
    net.set_recompute_norms(recompute)
    x, t = images(), times()
    want = net(x, t)
    of_want = torch.autograd.grad(want.pow(2).sum(), list(net.parameters()), allow_unused=True)
    assert not calls
    net.set_fused_norm(True)
    got = net(x, t)
    del calls[: 2 * TRITON]  # the trial whether they work
    names = [type(module).__name__ for module in net.modules()]
    assert len(calls) == 2 * names.count("ResBlock") + 1 + TRITON * names.count("AttentionBlock")
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))
    of_got = torch.autograd.grad(got.pow(2).sum(), list(net.parameters()), allow_unused=True)
    for ours, theirs in zip(of_got, of_want):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * max(1.0, float(theirs.abs().max())))
