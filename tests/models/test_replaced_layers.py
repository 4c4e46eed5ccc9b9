"""Layers that a user puts into a block, or a `forward` in place of a layer's own, compute as they do alone: no fast path passes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_networks import images, times, unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guided_diffusion.models.kernels import norm
from guided_diffusion.models.layers import Conv2d
from guided_diffusion.training.memory import kept_bytes, set_recompute

X, T = images(4), times(4)


def gradients(net: Any, forward: Any = None) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(0)
    (forward or net)(X, T).float().square().mean().backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("index", [0, 1, -1], ids=["norm", "SiLU", "convolution"])
@pytest.mark.parametrize("half", ["in_layers", "out_layers"])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_forward_of_the_users_own_is_called(
    half: str, index: int, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some LoRA packages set it. A block alone, as a network with such layers takes another memory layout."""
    block: Any = unet().input_blocks[1][0]
    layer, called = getattr(block, half)[index], []
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: called.append(1) or own(x))
    if gpu:  # then a convolution's bias is added later, and `Conv2d.forward` is not called
        as_on_gpu = SimpleNamespace(**{**vars(norm), "takes_bias": lambda x: True})
        monkeypatch.setattr("guided_diffusion.models.layers.norm_kernels", as_on_gpu)
    block(images(2, 32).contiguous(memory_format=torch.channels_last), torch.zeros(2, 128))
    assert called


class _Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


@pytest.mark.parametrize("layer", [nn.Dropout2d(0.5), nn.Dropout(0.5), nn.FeatureAlphaDropout(0.5), _Noisy()], ids=str)
def test_random_layers_repeat_when_norms_are_recomputed(layer: nn.Module) -> None:
    net = unet().train()
    for block in net.modules():
        if hasattr(block, "out_layers"):
            block.out_layers[2] = layer
    kept = gradients(net)
    net.set_recompute_norms()
    assert all(torch.equal(a, b) for a, b in zip(gradients(net), kept))


@pytest.mark.parametrize("kind", ["fits", "hooked", "3-d"])
def test_recomputed_norms_keep_little_whether_kernels_take_them_or_not(kind: str) -> None:
    net = unet(dims=3, attention_resolutions=()) if kind == "3-d" else unet()
    if kind == "hooked":  # then images are contiguous
        net.input_blocks[0].register_forward_hook(lambda module, inputs, output: None)
    x, kept = images(3, size=(2, 8, 8) if kind == "3-d" else (8, 8)), []
    for way in ("none", "norms"):
        set_recompute(net, way)
        kept.append(kept_bytes(lambda n: net(x[:n], times(n)), net.parameters())[1])
    assert kept[1] < 0.62 * kept[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_norms_within_a_checkpoint_of_the_user(reentrant: bool) -> None:
    net = unet()
    want = gradients(net)
    net.set_recompute_norms()
    found = gradients(net, lambda x, t: checkpoint(net, x.clone().requires_grad_(), t, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, want))


class _Adapted(Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.conv2d(x, torch.zeros(6, 32, 1, 1))


@pytest.mark.parametrize("way", ["class", "forward", "hook"])
def test_code_of_the_user_in_the_last_layers_sees_the_dtype_of_the_images(way: str) -> None:
    net, seen = unet(), [torch.float32]
    net.set_compute_dtype(torch.bfloat16)
    last: Any = net.out[2]
    own = last.forward
    if way == "class":
        net.out[2] = _Adapted(32, 6, 3, padding=1)
    elif way == "forward":
        last.forward = lambda x: seen.append(x.dtype) or own(x)
    else:
        last.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert net(X, T).dtype == torch.float32 and set(seen) == {torch.float32}
    assert len(seen) == (1 if way == "class" else 2)
