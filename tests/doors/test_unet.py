"""guided_diffusion.unet and the networks of script_util: what programs replace, read and count on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from guided_diffusion import script_util
from guided_diffusion import unet as door

SHAPE = (2, 3, 8, 8)
X, T = torch.randn(SHAPE), torch.tensor([3, 7])
SMALL: dict[str, Any] = {
    "image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
    "attention_resolutions": (1,), "channel_mult": (1,), "num_heads": 2,
}  # fmt: skip


def stirred(net: Any) -> Any:
    """Away from the zeros of a fresh network, which hide every difference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def unet(**changes: Any) -> Any:
    return stirred(door.UNetModel(**(SMALL | changes)))


def encoder(**changes: Any) -> Any:
    return stirred(door.EncoderUNetModel(**(SMALL | {"pool": "adaptive"} | changes)))


def super_res(**changes: Any) -> Any:
    return stirred(door.SuperResModel(**(SMALL | changes)))


def test_block_forwards_can_be_replaced_by_their_inner_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    net = unet(use_checkpoint=True)
    expected = net(X, T)
    monkeypatch.setattr(door.AttentionBlock, "forward", lambda self, x: self._forward(x))
    monkeypatch.setattr(door.ResBlock, "forward", lambda self, x, emb: self._forward(x, emb))
    torch.testing.assert_close(net(X, T), expected)


def test_projections_can_be_hooked_and_replaced() -> None:
    net = unet(use_checkpoint=True)
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
    net = unet(use_checkpoint=True)
    expected = net(X, T)
    monkeypatch.setattr(torch.nn.SiLU, "forward", lambda self, x: torch.relu(x))
    assert not torch.allclose(net(X, T), expected)


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


@pytest.mark.parametrize("text", ["8, 4", " 8,4 ", "8,4"])
def test_resolutions_may_be_written_with_spaces(text: str) -> None:
    net = script_util.create_model(16, 32, 1, channel_mult="1,1,1", attention_resolutions=text)
    widths = [any(isinstance(m, door.AttentionBlock) for m in block.modules()) for block in net.input_blocks]
    assert widths == [False, False, False, True, False, True]


@pytest.mark.parametrize("kind", [set, list, tuple, frozenset])
def test_resolutions_may_be_any_container(kind: type) -> None:
    net = unet(attention_resolutions=kind([1]))
    for part in (net.input_blocks, net.output_blocks):
        assert any(isinstance(module, door.AttentionBlock) for module in part.modules())


@pytest.mark.parametrize("make", [unet, encoder, super_res])
def test_checkpoint_is_called_by_position_through_the_module(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def without(*args: Any) -> Tensor:
        calls.append(args)
        return args[0](*args[1])

    more = {"low_res": torch.randn(2, 3, 4, 4)} if make is super_res else {}
    for use_checkpoint in (True, False):
        net = make(use_checkpoint=use_checkpoint)
        with monkeypatch.context() as patch:
            expected = net(X, T, **more)
            patch.setattr(door, "checkpoint", without)
            torch.testing.assert_close(net(X, T, **more), expected)
        if use_checkpoint:
            assert calls and all(len(args) == 4 and isinstance(args[1], tuple) for args in calls)


@pytest.mark.parametrize("new_order", [False, True])
def test_both_attentions_can_be_replaced(new_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement is handed `[N, 3 C, T]`; heads lie outside of q, k, v in the legacy order and inside in the new one."""
    net = unet(use_new_attention_order=new_order)
    expected, seen = net(X, T), []

    def attend(self: Any, qkv: Tensor) -> Tensor:
        seen.append(qkv.shape)
        n, width, places = qkv.shape
        parts = (n, 3, self.n_heads, -1, places) if new_order else (n, self.n_heads, 3, -1, places)
        q, k, v = qkv.reshape(parts).unbind(1 if new_order else 2)
        weights = torch.softmax(q.transpose(-1, -2) @ k / q.shape[-2] ** 0.5, dim=-1)
        return (v @ weights.transpose(-1, -2)).reshape(n, width // 3, places)

    kind = door.QKVAttention if new_order else door.QKVAttentionLegacy
    monkeypatch.setattr(kind, "forward", attend)
    torch.testing.assert_close(net(X, T), expected, rtol=1e-4, atol=1e-5)
    assert seen and set(seen) == {(2, 96, 64)}


def test_attention_blocks_hold_the_names_that_fine_tuning_looks_for() -> None:
    for net in (unet(), encoder(), super_res()):
        blocks = [module for module in net.modules() if isinstance(module, door.AttentionBlock)]
        assert blocks
        for block in blocks:
            names = {name.split(".")[0] for name, _ in block.named_parameters()}
            assert names == {"norm", "qkv", "proj_out"} and block.qkv.weight.shape == (96, 32, 1)


def test_attributes_of_a_network() -> None:
    net = unet(num_classes=4)
    wanted = {"model_channels": 32, "num_classes": 4, "image_size": 8, "in_channels": 3, "out_channels": 3}
    assert {name: getattr(net, name) for name in wanted} == wanted and net.dtype == torch.float32
    assert net.label_emb.weight.shape == (4, 128) and [type(m).__name__ for m in net.time_embed][::2] == ["Linear"] * 2
    for name in ("input_blocks", "middle_block", "output_blocks", "out", "convert_to_fp16", "convert_to_fp32"):
        assert hasattr(net, name)


def test_every_network_takes_time_and_class_by_position_or_name() -> None:
    y = torch.tensor([0, 2])
    net = unet(num_classes=4)
    torch.testing.assert_close(net(X, T, y), net(X, timesteps=T, y=y))
    assert not torch.allclose(net(X, T, y), net(X, T, y + 1))
    net = encoder()
    torch.testing.assert_close(net(X, T), net(X, timesteps=T))
    net, low = super_res(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(net(X, T, low), net(X, timesteps=T, low_res=low))


def test_weights_come_first_and_conversion_after() -> None:
    source, net = unet(), unet(use_fp16=True)
    assert net.load_state_dict(source.state_dict()) is not None
    net.convert_to_fp16()
    torch.testing.assert_close(net(X, T), source(X, T), rtol=0.05, atol=0.05)
    assert net(X, T).dtype == torch.float32
    expected, before = source(X, T), {name: value.clone() for name, value in source.state_dict().items()}
    source.convert_to_fp32()  # some call it on a network that never was anything else
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert torch.equal(source(X, T), expected)


def test_features_by_hooks_on_every_part() -> None:
    net, seen = unet(), []
    for block in [*net.input_blocks, net.middle_block, *net.output_blocks]:
        block.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    net(X, T)
    assert len(seen) == len(net.input_blocks) + 1 + len(net.output_blocks)
    assert all(shape[0] == 2 and len(shape) == 4 for shape in seen)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradients_of_a_frozen_network_through_guidance(use_checkpoint: bool) -> None:
    """In 2021: no gradient when every parameter is frozen, and no second backward through the same graph."""
    net = encoder(use_checkpoint=use_checkpoint).requires_grad_(False)
    diffusion = script_util.create_gaussian_diffusion(steps=50, timestep_respacing="5")

    def guide(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = net(x, t).log_softmax(dim=-1)[:, 1].sum()
            (first,) = torch.autograd.grad(score, x, retain_graph=True)
            (again,) = torch.autograd.grad(score, x)
        assert first.abs().sum() > 0 and torch.equal(first, again)
        return first

    for loop in ("p_sample_loop", "ddim_sample_loop"):
        assert getattr(diffusion, loop)(lambda x, t: 0.5 * x, SHAPE, cond_fn=guide, device="cpu").isfinite().all()
