"""Weights stay, computation changes: float16 and bfloat16 against float32."""

from __future__ import annotations

import pytest
import torch
from small_networks import classifier, images, times, unet

from guided_diffusion.models import unet as room

BOUND = {torch.bfloat16: 0.05, torch.float16: 0.006}  # rms error over rms output; measured a third of it


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("make", [unet, classifier, lambda: classifier("spatial_v2")])
def test_low_precision_is_near(make, dtype: torch.dtype, store: bool) -> None:  # type: ignore[no-untyped-def]
    net, x, t = make(), images(), times()
    expected = net(x, t)
    net.set_compute_dtype(dtype, store=store)
    seen = []
    hook = net.middle_block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    found = net(x, t)
    hook.remove()
    assert net.dtype == dtype and seen == [dtype]
    assert found.dtype == torch.float32
    assert 0 < relative_error(found, expected) < BOUND[dtype]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
def test_the_last_layers_compute_in_the_networks_format_and_answer_in_float32(
    dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, t = unet(), images(), times()
    net.set_compute_dtype(dtype)
    found = net(x, t)
    monkeypatch.setattr(room, "takes_any_dtype", lambda layers: False)
    assert found.dtype == torch.float32 and 0 < relative_error(found, net(x, t)) < bound


@pytest.mark.parametrize(
    "out", [torch.nn.Conv2d(32, 3, 1), torch.nn.Identity(), torch.nn.Sequential(torch.nn.Conv2d(32, 3, 1))], ids=str
)
def test_layers_in_place_of_the_last_ones_get_float32(out: torch.nn.Module) -> None:
    net = unet()
    net.set_compute_dtype(torch.bfloat16)
    net.out, seen = out, []
    out.register_forward_hook(lambda module, args, result: seen.append(args[0].dtype))
    assert net(images(), times()).dtype == torch.float32 and seen == [torch.float32]


def test_weights_are_cast_at_use_and_gradients_stay_float32() -> None:
    net, x, t = unet(), images(), times()
    net(x, t).pow(2).mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    net.set_compute_dtype(torch.bfloat16)
    net(x, t).pow(2).mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        if expected[name].norm() > 1e-4:
            assert relative_error(parameter.grad, expected[name]) < 0.2


def test_casting_at_use_is_the_same_as_storing() -> None:
    x, t = images(), times()
    used, stored = unet(), unet()
    used.set_compute_dtype(torch.float16)
    stored.convert_to_fp16()
    torch.testing.assert_close(used(x, t), stored(x, t), rtol=0, atol=0)


def test_convert_to_fp16_halves_the_torso_and_back() -> None:
    net = unet(num_classes=3)
    before = dict(net.named_parameters())
    net.convert_to_fp16()
    assert net.dtype == torch.float16
    half = {name for name, parameter in net.named_parameters() if parameter.dtype == torch.float16}
    assert "input_blocks.0.0.weight" in half and "middle_block.1.qkv.weight" in half
    assert not any("norm" in name or name.startswith(("time_embed", "label_emb", "out.")) for name in half)
    assert not any("in_layers.0" in name or "emb_layers" in name for name in half)
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    net.convert_to_fp32()
    net.convert_to_fp32()
    assert net.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    net(images(), times(), torch.tensor([0, 1]))


def test_use_fp16_is_enough_by_itself() -> None:
    net = unet(use_fp16=True)
    assert net.dtype == torch.float16
    assert net(images(), times()).isfinite().all()


def test_autocast_trains() -> None:
    for use_checkpoint in (False, True):
        net = unet(use_checkpoint=use_checkpoint)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(images(), times())
        out.float().pow(2).mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_the_whole_network_may_be_moved_to_another_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        net, x = unet().to(dtype), images().to(dtype)
        assert net(x, times()).dtype == dtype


def test_unsuitable_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float64.*choose"):
        unet().set_compute_dtype(torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    net, x, t = unet(), images(), times()
    expected = net(x, t)
    net = net.cuda()
    net.set_compute_dtype(dtype)
    x = x.cuda().requires_grad_()
    found = net(x, t.cuda())
    assert relative_error(found.detach().cpu(), expected) < BOUND.get(dtype, 5e-3)  # TF32 may be on
    found.pow(2).mean().backward()
    assert x.grad.isfinite().all()
