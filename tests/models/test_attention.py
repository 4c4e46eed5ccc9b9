"""Attention against its definition, in every way it is differentiated; no copies on the way in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_networks import images, times, unet
from torch import Tensor, nn

from guided_diffusion.models import attention as room
from guided_diffusion.models.attention import (
    QKVAttention,
    QKVAttentionLegacy,
    attention,
    attention_layers,
    perturbed,
    plain_attention,
    watched,
)
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


LAYERS = ["input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"]


@pytest.mark.parametrize("new_order", [False, True])
def test_perturbed_attention_gives_the_values_and_watched_attention_its_map(new_order: bool) -> None:
    """Against attention written out: softmax(q k' / sqrt(D)) where it is kept, the identity where it is perturbed."""
    net = unet(use_new_attention_order=new_order).double()
    layers, x, t = LAYERS[1:3], images().double(), times().double()
    maps: dict[str, Tensor] = {}

    def written_out(name: str):
        def forward(qkv: Tensor) -> Tensor:
            heads = net.get_submodule(name).num_heads
            shape = (len(qkv), 3, heads, -1, qkv.shape[-1]) if new_order else (len(qkv), heads, 3, -1, qkv.shape[-1])
            q, k, v = qkv.reshape(shape).unbind(1 if new_order else 2)
            weights = torch.softmax(torch.einsum("nhdq,nhdk->nhqk", q, k) / math.sqrt(q.shape[2]), -1)
            maps[name] = weights.mean(1).sum(1)
            if name in layers:
                weights = torch.eye(qkv.shape[-1], dtype=qkv.dtype).expand_as(weights)
            return torch.einsum("nhqk,nhdk->nhdq", weights, v).flatten(1, 2)

        return forward

    plain = net(x, t)
    changed, seeing = perturbed(net, layers), watched(net, "middle_block.1")
    found, (output, received) = changed(x, t), seeing(x, t)
    assert torch.equal(net(x, t), plain) and torch.equal(output, plain)  # the network itself is as it was
    for name in LAYERS:
        net.get_submodule(name).attention.forward = written_out(name)
    torch.testing.assert_close(found, net(x, t))
    assert not torch.allclose(found, plain, atol=1e-3)
    layers = []
    net(x, t)
    torch.testing.assert_close(received, maps["middle_block.1"].float())
    torch.testing.assert_close(received.mean(1), torch.ones(2))
    with torch.no_grad():
        net.out[2].weight.zero_()
    assert torch.equal(changed(x, t)[0, 0], net.out[2].bias[0].expand(8, 8))  # the weights are shared
    assert list(changed.state_dict()) == list(net.state_dict())


def test_layers_without_attention_are_refused_with_those_that_have_it() -> None:
    assert attention_layers(unet()) == LAYERS
    with pytest.raises(
        ValueError, match=r"no attention in the layer input_blocks.1.1; .*middle_block.1, output_blocks.0.1"
    ):
        perturbed(unet(), ["middle_block.1", "input_blocks.1.1"])
    with pytest.raises(ValueError, match="none named"):
        perturbed(unet(), [])
    with pytest.raises(ValueError, match="no layer of it has any"):
        watched(nn.Linear(2, 2), "middle_block.1")


def test_the_copies_follow_a_network_that_computes_in_less_precision() -> None:
    net = unet()
    net.set_compute_dtype(torch.bfloat16, store=True)
    x, t = images(), times()
    output, received = watched(net, "middle_block.1")(x, t)
    assert torch.equal(output, net(x, t)) and received.dtype == torch.float32
    assert perturbed(net, ["middle_block.1"])(x, t).isfinite().all()


def test_watched_attention_is_part_of_one_graph() -> None:
    seeing = watched(unet(channel_mult=(1,), attention_resolutions=()), "middle_block.1")
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(seeing, backend="eager", fullgraph=True)(images(), times())
        torch.testing.assert_close(found, seeing(images(), times()))
