"""guided_diffusion.unet: the names of 2021, and the places where other projects reach into it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import guided_diffusion.models.unet as room
from guided_diffusion import unet as door

NAMES = (
    "AttentionBlock AttentionPool2d Downsample EncoderUNetModel QKVAttention QKVAttentionLegacy ResBlock SuperResModel "
    "TimestepBlock TimestepEmbedSequential UNetModel Upsample count_flops_attn"
).split()
LEFTOVERS = (
    "checkpoint conv_nd linear avg_pool_nd zero_module normalization timestep_embedding convert_module_to_f16 "
    "convert_module_to_f32 th nn F np math"
).split()


def small() -> Any:
    net = door.UNetModel(8, 3, 32, 3, 1, (1,), channel_mult=(1,), num_heads=2, use_checkpoint=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


X, T = torch.randn(2, 3, 8, 8), torch.tensor([1, 500])


def test_the_door_is_the_room() -> None:
    assert door is room
    for name in NAMES + LEFTOVERS:
        assert hasattr(door, name), name
    assert not hasattr(door, "__all__")


def test_star_import_brings_the_names_and_the_leftovers() -> None:
    found: dict[str, Any] = {}
    exec("from guided_diffusion.unet import *", found)
    assert set(NAMES + LEFTOVERS) <= set(found)


def test_old_pickles_resolve() -> None:
    for name in NAMES:
        text = f"cguided_diffusion.unet\n{name}\n.".encode()
        assert pickle.loads(text) is getattr(room, name)


def test_checkpoint_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    net, flags = small(), []
    expected = net(X, T)

    def replacement(func: Callable[..., Tensor], inputs: tuple[Tensor, ...], params: Any, flag: bool) -> Tensor:
        flags.append(flag)
        return func(*inputs)

    monkeypatch.setattr(door, "checkpoint", replacement)
    torch.testing.assert_close(net(X, T), expected)
    assert flags and all(flags)


def test_block_forwards_can_be_replaced_by_their_inner_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small()
    expected = net(X, T)
    monkeypatch.setattr(door.AttentionBlock, "forward", lambda self, x: self._forward(x))
    monkeypatch.setattr(door.ResBlock, "forward", lambda self, x, emb: self._forward(x, emb))
    torch.testing.assert_close(net(X, T), expected)


def written_elsewhere(self: Any, qkv: Tensor) -> Tensor:
    """An attention as other projects put in: contiguous [N, 3 * C, T], one head after another."""
    n, width, places = qkv.shape
    channels = width // (3 * self.n_heads)
    q, k, v = qkv.reshape(n * self.n_heads, 3 * channels, places).split(channels, dim=1)
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / channels**0.5, dim=-1)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, places)


def test_attention_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    net, shapes = small(), []
    expected = net(X, T)

    def spy(self: Any, qkv: Tensor) -> Tensor:
        shapes.append(tuple(qkv.shape))
        return written_elsewhere(self, qkv)

    monkeypatch.setattr(door.QKVAttentionLegacy, "forward", spy)
    torch.testing.assert_close(net(X, T), expected, rtol=1e-4, atol=1e-5)
    assert set(shapes) == {(2, 96, 64)}


def test_projections_can_be_hooked_and_replaced() -> None:
    net = small()
    block = next(module for module in net.modules() if isinstance(module, door.AttentionBlock))
    expected = net(X, T)
    conv = torch.nn.Conv1d(32, 96, 1)
    conv.load_state_dict(block.qkv.state_dict())
    seen: list[tuple[int, ...]] = []
    conv.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    block.qkv = conv
    torch.testing.assert_close(net(X, T), expected, rtol=1e-4, atol=1e-5)
    assert seen == [(2, 96, 64)]


def test_activation_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small()
    expected = net(X, T)
    monkeypatch.setattr(torch.nn.SiLU, "forward", lambda self, x: torch.relu(x))
    assert not torch.allclose(net(X, T), expected)


def test_features_can_be_taken_by_hooks() -> None:
    net, features = small(), []
    for block in net.output_blocks:
        block.register_forward_hook(lambda module, args, out: features.append(out))
    net(X, T)
    assert [tuple(feature.shape) for feature in features] == [(2, 32, 8, 8)] * 2


def test_subclass_may_drop_parts_and_write_its_own_forward() -> None:
    class Encoder(door.UNetModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            del self.output_blocks, self.out

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            emb = self.time_embed(door.timestep_embedding(timesteps, self.model_channels))
            h = x.type(self.dtype)
            for module in self.input_blocks:
                h = module(h, emb)
            return self.middle_block(h, emb).mean(dim=(2, 3))

    assert Encoder(8, 3, 32, 3, 1, (1,), channel_mult=(1,))(X, T).shape == (2, 32)


def test_multiply_adds_of_attention() -> None:
    class Count:
        total_ops = torch.zeros(1, dtype=torch.float64)

    door.QKVAttention.count_flops(Count, None, (torch.zeros(2, 8, 3, 5),))
    assert Count.total_ops.item() == 2 * 2 * 15**2 * 8
    assert door.QKVAttentionLegacy.count_flops is not None


@pytest.mark.parametrize(
    ("module", "names"),
    {  # what a star import of 2021 left
        "unet": "AttentionBlock AttentionPool2d Downsample EncoderUNetModel F QKVAttention QKVAttentionLegacy ResBlock SuperResModel "
        "TimestepBlock TimestepEmbedSequential UNetModel Upsample abstractmethod avg_pool_nd checkpoint conv_nd "
        "convert_module_to_f16 convert_module_to_f32 count_flops_attn linear math nn normalization np th "
        "timestep_embedding zero_module",
        "nn": "CheckpointFunction GroupNorm32 SiLU avg_pool_nd checkpoint conv_nd linear math mean_flat nn normalization "
        "scale_module th timestep_embedding update_ema zero_module",
        "losses": "approx_standard_normal_cdf discretized_gaussian_log_likelihood normal_kl np th",
    }.items(),
)
def test_a_star_import_gives_the_names_of_2021(module: str, names: str) -> None:
    found: dict[str, object] = {}
    exec(f"from guided_diffusion.{module} import *", found)
    assert set(names.split()) <= set(found)
