"""The CPU's detours against torch's own way: same numbers, same gradients, and again differentiable."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import images, times, unet
from torch import Tensor

from guided_diffusion.models import cpu, fused_norm, layers, triton_norm
from guided_diffusion.models.attention import attention, plain_attention
from guided_diffusion.models.layers import GroupNorm32, mix_channels


def apart(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def channels_last(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16, memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 64, 24), (1, 16, 8, 24), (32, 24)])
def test_mixing_channels_is_a_linear_layer(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(40, 24), torch.randn(40)
    assert cpu.mixes_as_convolution(x, weight)
    both: list[list[Tensor]] = []
    for mix in (cpu.mix_channels, F.linear):
        given = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = mix(*given)
        y.square().sum().backward()
        both.append([y.detach(), *(t.grad for t in given if t.grad is not None)])
    for found, expected in zip(*both, strict=True):
        assert found.shape == expected.shape
        assert apart(found, expected) < 1e-6
    assert mix_channels(x, weight, None).is_contiguous()
    torch.testing.assert_close(mix_channels(x, weight, None), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x", [torch.randn(3, 5, 8), torch.randn(2, 8), torch.randn(2, 8, 16).transpose(1, 2), torch.randn(32, 8).double()]
)
def test_what_cannot_be_cut_into_images_is_left_to_torch(x: Tensor) -> None:
    weight = torch.randn(4, 8, dtype=x.dtype)
    assert not cpu.mixes_as_convolution(x, weight)
    torch.testing.assert_close(mix_channels(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("shape", [(3, 64, 8, 8), (2, 96, 32, 32), (5, 64, 4, 6), (1, 32, 40, 40)])
def test_bfloat16_group_norm_and_its_gradients(shape: tuple[int, ...]) -> None:
    norm = GroupNorm32(32, shape[1])
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    exact = copy.deepcopy(norm).double()
    x, grad = channels_last(*shape).requires_grad_(), channels_last(*shape)
    y = norm(x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    y.backward(grad)
    wide = x.detach().double().requires_grad_()
    expected = F.group_norm(wide, 32, exact.weight, exact.bias, norm.eps)
    expected.backward(grad.double())
    assert apart(y, expected) < 4e-3  # bfloat16 keeps 8 bits: 2 ** -8
    assert x.grad is not None and wide.grad is not None and x.grad.dtype == torch.bfloat16
    assert apart(x.grad, wide.grad) < 4e-3
    for found, wanted in ((norm.weight.grad, exact.weight.grad), (norm.bias.grad, exact.bias.grad)):
        assert found.dtype == torch.float32 and apart(found, wanted) < 1e-4


PICTURES = {
    "noise": (0.0, 1.0), "smooth": (1.0, 0.1), "nearly flat": (1.0, 1e-3), "far from zero": (100.0, 1.0), "flat": (0.3, 0.0)
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("shape", [(2, 64, 24, 16), (1, 32, 5, 6, 4), (3, 96, 1, 2)], ids=str)
def test_group_norm_keeps_digits_where_the_mean_is_large(
    picture: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """No further from float64, with its gradients, than three times torch's contiguous kernel in float32."""
    mean, deviation = PICTURES[picture]
    generator = torch.Generator().manual_seed(0)
    x = (mean + deviation * torch.randn(shape, generator=generator)).to(dtype)
    g = torch.randn(shape, generator=generator).to(dtype)
    norm = GroupNorm32(32, shape[1])
    torch.nn.init.normal_(norm.bias, generator=generator)

    def answers(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        x = x.detach().to(dtype, memory_format=torch.preserve_format).requires_grad_()
        own = copy.deepcopy(norm).to(torch.promote_types(dtype, torch.float32))
        y = own(x)
        return [y.detach(), *torch.autograd.grad(y, [x, own.weight, own.bias], g.to(dtype))]

    exact, usual = answers(x, torch.float64), answers(x, torch.float32)
    found = answers(layers.channels_last(x), dtype)
    for ours, theirs, want in zip(found, usual, exact):
        size = float(want.square().mean().sqrt())
        rounding = torch.finfo(ours.dtype).eps * size
        wrong, theirs_wrong = (float((part.double() - want).square().mean().sqrt()) for part in (ours, theirs))
        assert wrong <= 3 * theirs_wrong + 4 * rounding


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_norm_scale_shift_and_silu_in_one(scaled: bool, silu: bool) -> None:
    x, g = layers.channels_last(2 + torch.randn(3, 64, 6, 5)), torch.randn(3, 64, 6, 5)
    given = [x, torch.randn(64), torch.randn(64), *(torch.randn(2, 3, 64, 1, 1) if scaled else ())]

    def answers(function: object, dtype: torch.dtype) -> list[Tensor]:
        parts = [part.to(dtype).requires_grad_() for part in (p.detach().clone() for p in given)]
        scale, shift = parts[3:] or (None, None)
        y = function(*parts[:3], scale, shift, 32, 1e-5, silu)  # type: ignore[operator]
        ordinary = torch.autograd.grad(y, parts, g.to(dtype), retain_graph=True)
        first = torch.autograd.grad(y, parts, g.to(dtype), create_graph=True)
        squares = sum(part.square().sum() for part in first)
        second = torch.autograd.grad(squares, parts, allow_unused=True, materialize_grads=True)
        return [y, *ordinary, *first, *second]

    for found, expected in zip(answers(cpu.GroupNorm.apply, torch.float32), answers(triton_norm.plain, torch.float64)):
        assert found.shape == expected.shape and apart(found, expected) < 1e-5 or not expected.any()


def test_bfloat16_group_norm_is_differentiable_twice() -> None:
    norm, x = GroupNorm32(32, 32), channels_last(2, 32, 4, 4).requires_grad_()
    (first,) = torch.autograd.grad(norm(x).float().pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.float().pow(2).sum(), x)
    wide = x.detach().double().requires_grad_()
    norm = norm.double()
    (expected,) = torch.autograd.grad(norm(wide).pow(3).sum(), wide, create_graph=True)
    (twice,) = torch.autograd.grad(expected.pow(2).sum(), wide)
    assert apart(first, expected) < 0.02
    assert apart(second, twice) < 0.05


@pytest.mark.parametrize("frozen", ["weights", "input"])
def test_bfloat16_group_norm_where_only_a_part_learns(frozen: str) -> None:
    norm, x = GroupNorm32(32, 64), channels_last(2, 64, 8, 8)
    if frozen == "weights":
        norm.requires_grad_(False)
        x.requires_grad_()
    norm(x).float().square().sum().backward()
    assert (norm.weight.grad is None) == (frozen == "weights")
    assert (x.grad is None) == (frozen == "input")


@pytest.mark.parametrize(("heads", "places"), [(3, 40), (4, 256), (2, 1024)])
def test_bfloat16_attention_and_its_gradients(heads: int, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SCORES", 2 * 256 * 256)  # so that heads are taken one, two and all at a time
    qkv = torch.randn(2, places, heads, 3, 16).bfloat16().requires_grad_()
    grad = torch.randn(2, heads, places, 16).bfloat16()
    out = attention(*(part.transpose(1, 2) for part in qkv.unbind(3)))
    assert isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction)  # it did go by heads
    out.backward(grad)
    wide = qkv.detach().double().requires_grad_()
    expected = plain_attention(*(part.transpose(1, 2) for part in wide.unbind(3)))
    expected.backward(grad.double())
    assert apart(out, expected) < 8e-3  # twice 2 ** -8: scores and weights are rounded
    assert qkv.grad is not None and wide.grad is not None
    for found, wanted in zip(qkv.grad.unbind(3), wide.grad.unbind(3)):
        assert apart(found, wanted) < 1.2e-2


def test_bfloat16_attention_is_differentiable_twice() -> None:
    q, k, v = (torch.randn(1, 2, 6, 8).bfloat16().requires_grad_() for _ in range(3))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]

    def twice(function: object, given: list[Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(function(*given).sum(), given[:1], create_graph=True)  # type: ignore[operator]
        return torch.autograd.grad(first.pow(2).sum(), given[1])[0]

    assert apart(twice(attention, [q, k, v]), twice(plain_attention, wide)) < 0.1


def test_a_bfloat16_network_trains_as_by_torchs_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, t = unet(), images(), times()
    exact = copy.deepcopy(net)
    exact(x, t).square().mean().backward()
    net.set_compute_dtype(torch.bfloat16)
    own = copy.deepcopy(net)
    net(x, t).square().mean().backward()
    monkeypatch.setattr(layers, "fits_cpu_norm", lambda *_: False)
    monkeypatch.setattr(fused_norm, "fits_cpu_norm", lambda *_: False)
    monkeypatch.setattr(cpu.AttentionByHeads, "apply", F.scaled_dot_product_attention)
    own(x, t).square().mean().backward()
    far, usual = (
        sum(float((p.grad - e.grad).square().sum()) for p, e in zip(n.parameters(), exact.parameters())) ** 0.5
        for n in (net, own)
    )
    assert far < 1.5 * usual  # no further from float32 than the kernels it stands for


def test_edges_that_torchs_own_kernels_take_too() -> None:
    assert GroupNorm32(32, 32)(channels_last(0, 32, 4, 4)).shape == (0, 32, 4, 4)
    q, k, v = torch.randn(1, 2, 5, 8).bfloat16(), torch.randn(1, 2, 7, 8).bfloat16(), torch.randn(1, 2, 7, 8).bfloat16()
    assert apart(attention(q, k, v), plain_attention(q.double(), k.double(), v.double())) < 1e-2
