"""Attention against its definition, in every way it is differentiated; no copies on the way in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from guided_diffusion.models import attention as room
from guided_diffusion.models.attention import QKVAttention, QKVAttentionLegacy, attention, plain_attention
from guided_diffusion.models.pools import AttentionPool2d
from guided_diffusion.models.unet import AttentionBlock

N, HEADS, D, T = 2, 3, 8, 5
KINDS = [QKVAttentionLegacy, QKVAttention]


def by_definition(qkv: np.ndarray, kind: type) -> np.ndarray:
    """Equation 1 of "Attention Is All You Need", head by head and place by place, in float64."""
    out = np.zeros((N, HEADS, D, T))
    for n in range(N):
        for h in range(HEADS):
            if kind is QKVAttention:
                q, k, v = (qkv[n, (i * HEADS + h) * D : (i * HEADS + h + 1) * D] for i in range(3))
            else:
                q, k, v = (qkv[n, (h * 3 + i) * D : (h * 3 + i + 1) * D] for i in range(3))
            for t in range(T):
                weights = np.exp([q[:, t] @ k[:, s] / math.sqrt(D) for s in range(T)])
                out[n, h, :, t] = v @ (weights / weights.sum())
    return out.reshape(N, HEADS * D, T)


@pytest.mark.parametrize("channels_innermost", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_its_definition(kind: type, channels_innermost: bool) -> None:
    qkv = torch.randn(N, 3 * HEADS * D, T, dtype=torch.float64)
    given = qkv.transpose(1, 2).contiguous().transpose(1, 2) if channels_innermost else qkv
    found = kind(HEADS)(given)
    assert found.shape == (N, HEADS * D, T)
    np.testing.assert_allclose(found.numpy(), by_definition(qkv.numpy(), kind), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_keys_and_values_reach_the_kernel_as_views(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend((q, k, v))
        return attention(q, k, v)

    monkeypatch.setattr(room, "attention", spy)
    tokens = torch.randn(N, T, 3 * HEADS * D)
    kind(HEADS)(tokens.transpose(1, 2))
    for tensor in seen:
        assert tensor.shape == (N, HEADS, T, D)
        assert tensor.stride(-1) == 1  # what every fused kernel asks for
        assert tensor.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()


def test_first_second_and_forward_derivatives() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(attention, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attention, (q, k, v))


def test_torch_func_sees_the_same_function() -> None:
    q, k, v = (torch.randn(2, 2, 3, 4) for _ in range(3))
    torch.testing.assert_close(torch.func.vmap(attention)(*(x[:, None] for x in (q, k, v)))[:, 0], attention(q, k, v))
    torch.testing.assert_close(plain_attention(q, k, v), attention(q, k, v))


def test_block_equals_convolutions_and_works_in_any_number_of_dimensions() -> None:
    block = AttentionBlock(32, num_heads=2)
    nn.init.normal_(block.proj_out.weight)
    flat = torch.randn(2, 32, 12)
    expected = block(flat)
    by_conv = nn.Conv1d.forward(block.qkv, block.norm(flat))
    torch.testing.assert_close(block.qkv(block.norm(flat)), by_conv)
    for shape in ((3, 4), (2, 3, 2)):
        torch.testing.assert_close(block(flat.reshape(2, 32, *shape)).flatten(2), expected)


def test_pool_attends_from_the_mean_only_and_refuses_other_sizes() -> None:
    pool = AttentionPool2d(4, 32, 16, 7)
    assert pool(torch.randn(3, 32, 4, 4)).shape == (3, 7)
    with pytest.raises(ValueError, match="4 x 4 features and got 2 x 8"):
        pool(torch.randn(3, 32, 2, 8))


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="num_head_channels = 48"):
        AttentionBlock(64, num_head_channels=48)
    with pytest.raises(ValueError, match="num_heads = 5"):
        AttentionBlock(64, num_heads=5)
    with pytest.raises(ValueError, match="4 heads"):
        QKVAttention(4)(torch.randn(1, 30, 2))
