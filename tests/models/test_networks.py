"""The networks' options, what they refuse, and what must not depend on what."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from small_networks import classifier, images, stir, super_res, times, unet
from torch import Tensor, nn

from guided_diffusion.models.kernels import layout, norm
from guided_diffusion.models.unet import EncoderUNetModel, SuperResModel, UNetModel

POOLS = ["adaptive", "attention", "spatial", "spatial_v2"]


def test_constructor_arguments_are_those_of_2021() -> None:
    unet_names = (
        "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult "
        "conv_resample dims num_classes use_checkpoint use_fp16 num_heads num_head_channels num_heads_upsample "
        "use_scale_shift_norm resblock_updown use_new_attention_order"
    ).split()
    assert inspect.getfullargspec(UNetModel)[0][1:] == unet_names
    encoder_names = [name for name in unet_names if name != "num_classes"] + ["pool"]
    assert inspect.getfullargspec(EncoderUNetModel)[0][1:] == encoder_names
    defaults = {name: p.default for name, p in inspect.signature(UNetModel).parameters.items()}
    assert (defaults["channel_mult"], defaults["num_heads"], defaults["num_head_channels"]) == ((1, 2, 4, 8), 1, -1)
    assert list(inspect.signature(SuperResModel).parameters)[:2] == ["image_size", "in_channels"]


@pytest.mark.parametrize(
    "options",
    [
        {"use_scale_shift_norm": False},
        {"resblock_updown": False},
        {"resblock_updown": False, "conv_resample": False},
        {"num_head_channels": -1, "num_heads": 4},
        {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 8},
        {"use_new_attention_order": True},
        {"attention_resolutions": {1, 2}},
        {"attention_resolutions": [1]},
        {"attention_resolutions": ()},
        {"num_res_blocks": 2, "channel_mult": (0.5, 1), "model_channels": 64},
        {"in_channels": 1, "out_channels": 1},
        {"in_channels": 7, "out_channels": 5},
        {"channel_mult": (1,)},
    ],
    ids=str,
)
def test_options_and_gradients_reach_every_parameter(options: dict[str, Any]) -> None:
    net = unet(**options)
    x = images(channels=options.get("in_channels", 3))
    out = net(x, times())
    assert out.shape == (2, options.get("out_channels", 6), 8, 8)
    out.pow(2).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensions(dims: int) -> None:
    for updown in (False, True):
        net = unet(dims=dims, resblock_updown=updown)
        x = images(size=(8,) if dims == 1 else (3, 8, 4))
        assert net(x, times()).shape == (2, 6, *x.shape[2:])


def test_only_height_and_width_are_asked_to_be_even_in_three_dimensions() -> None:
    with pytest.raises(ValueError, match="5 x 4 cannot be halved 1 times"):
        unet(dims=3)(images(size=(2, 5, 4)), times())


@pytest.mark.parametrize("num_classes", [1, 2, 1000])
def test_any_number_of_classes(num_classes: int) -> None:
    net = unet(num_classes=num_classes)
    y = torch.tensor([0, num_classes - 1])
    x = images(1).expand(2, -1, -1, -1)
    t = torch.tensor([5, 5])
    out = net(x, t, y)
    assert torch.equal(out[0], out[1]) == (num_classes == 1)
    torch.testing.assert_close(net(x, timesteps=t, y=y), out, rtol=0, atol=0)


def test_time_may_be_integer_or_fractional() -> None:
    net, x = unet(), images()
    torch.testing.assert_close(net(x, torch.tensor([4, 7])), net(x, torch.tensor([4.0, 7.0])), rtol=0, atol=0)
    between = net(x, torch.tensor([4.5, 7.5]))
    assert not torch.allclose(between, net(x, torch.tensor([4, 7])))


@pytest.mark.parametrize("size", [(8, 16), (16, 6), (2, 8), (2, 2)])
def test_height_and_width_need_not_agree(size: tuple[int, int]) -> None:
    for n in (1, 2):  # one image down to one place is as good as two
        x = images(n, size=size).requires_grad_()
        out = unet()(x, times(n))
        assert out.shape == (n, 6, *size)
        out.pow(2).sum().backward()
        assert x.grad.isfinite().all()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="9 x 8 cannot be halved 1 times.*multiples of 2"):
        unet()(images(size=(9, 8)), times())
    with pytest.raises(ValueError, match="7 x 8"):
        classifier("adaptive")(images(size=(7, 8)), times())
    with pytest.raises(ValueError, match="48 channels cannot be normalised in 32 groups"):
        unet(model_channels=48, channel_mult=(1, 2))
    with pytest.raises(ValueError, match="channel_mult is empty"):
        unet(channel_mult=())
    with pytest.raises(ValueError, match="not class-conditional"):
        unet()(images(), times(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="conditioned on 10 classes"):
        unet(num_classes=10)(images(), times())
    with pytest.raises(ValueError, match="one per image"):
        unet(num_classes=10)(images(), times(), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="give low_res"):
        super_res()(images(), times())
    with pytest.raises(ValueError, match="unknown pool 'max'.*spatial_v2"):
        classifier("max")
    with pytest.raises(ValueError, match="needs num_head_channels"):
        classifier("attention", num_head_channels=-1)
    with pytest.raises(ValueError, match="unsupported dimensions: 4"):
        unet(dims=4)


def examples() -> list[tuple[str, nn.Module, dict[str, Tensor]]]:
    low = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return [
        ("unet", unet(num_classes=4), {"y": torch.tensor([0, 3, 1])}),
        ("super_res", super_res(), {"low_res": low}),
        *((pool, classifier(pool), {}) for pool in POOLS),
    ]


@pytest.mark.parametrize(("name", "net", "cond"), examples(), ids=lambda value: value if isinstance(value, str) else "")
class TestEveryNetwork:
    def test_each_image_is_computed_alone(self, name: str, net: nn.Module, cond: dict[str, Tensor]) -> None:
        x, t = images(3), times(3)
        together = net(x, t, **cond)
        for n in range(3):
            alone = net(x[n : n + 1], t[n : n + 1], **{key: value[n : n + 1] for key, value in cond.items()})
            torch.testing.assert_close(alone[0], together[n], rtol=1e-4, atol=2e-5)

    def test_memory_layout_of_the_input_does_not_matter(
        self, name: str, net: nn.Module, cond: dict[str, Tensor]
    ) -> None:
        x, t = images(3), times(3)
        expected = net(x, t, **cond)
        for given in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            torch.testing.assert_close(net(given, t, **cond), expected, rtol=1e-5, atol=1e-5)

    def test_activations_are_channels_last_where_nobody_looks(
        self, name: str, net: nn.Module, cond: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[bool] = []
        for name in ("group_norm", "norm_silu"):
            inner = getattr(norm, name)

            def noting(x: Tensor, *more: Any, inner: Any = inner, **options: Any) -> Tensor:
                seen.append(layout.is_channels_last(x) or x.dim() < 3)
                return inner(x, *more, **options)

            monkeypatch.setattr(norm, name, noting)
        net(images(3), times(3), **cond)
        assert len(seen) >= sum(isinstance(module, nn.GroupNorm) for module in net.input_blocks.modules()) and all(seen)

    def test_whatever_leaves_is_contiguous(self, name: str, net: nn.Module, cond: dict[str, Tensor]) -> None:
        for given in (
            images(3),
            images(3).contiguous(memory_format=torch.channels_last),
            images(1),
            images(3, size=(8, 16)),
        ):
            if name == "attention" and given.shape[2] != given.shape[3]:
                continue
            x = given.clone().requires_grad_()
            out = net(x, times(len(x)), **{key: value[: len(x)] for key, value in cond.items()})
            found = torch.autograd.grad(out.square().sum(), [x, *net.parameters()], create_graph=True)
            twice = torch.autograd.grad(found[0].square().sum(), x)
            assert all(tensor.is_contiguous() for tensor in (out, *found, *twice))
            out.detach().view(len(x), -1), found[0].detach().view(len(x), -1)

    def test_whoever_looks_within_sees_contiguous_tensors(
        self, name: str, net: nn.Module, cond: dict[str, Tensor]
    ) -> None:
        expected, strayed = net(images(3), times(3), **cond), []

        def look(module: nn.Module, given: Any, out: Tensor) -> None:
            looked_at = [part for part in (*given, out) if isinstance(part, Tensor)]
            strayed.extend(module for part in looked_at if not part.is_contiguous())

        hooks = [module.register_forward_hook(look) for module in net.modules()]
        with torch.no_grad():
            found = net(images(3), times(3), **cond)
        for hook in hooks:
            hook.remove()
        assert not strayed
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_code_of_others_within_is_given_contiguous_tensors(
        self, name: str, net: nn.Module, cond: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[bool] = []
        first = type(net.middle_block[0])
        ours = first._forward
        monkeypatch.setattr(first, "forward", lambda self, x, emb: seen.append(x.is_contiguous()) or ours(self, x, emb))
        net(images(3), times(3), **cond)
        assert seen and all(seen)

    def test_one_time_serves_a_batch(self, name: str, net: nn.Module, cond: dict[str, Tensor]) -> None:
        torch.testing.assert_close(
            net(images(3), torch.tensor([7]), **cond), net(images(3), torch.full((3,), 7), **cond), rtol=1e-5, atol=1e-5
        )

    def test_can_be_copied_and_pickled(self, name: str, net: nn.Module, cond: dict[str, Tensor]) -> None:
        x, t = images(3), times(3)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(twin(x, t, **cond), net(x, t, **cond), rtol=0, atol=0)


def test_a_fresh_network_answers_zero() -> None:
    net = UNetModel(8, 3, 32, 3, 1, (2,), channel_mult=(1, 2))
    assert not net(images(), times()).any()


def test_dropout_acts_in_training_only() -> None:
    net, x, t = unet(dropout=0.5), images(), times()
    torch.testing.assert_close(net(x, t), net(x, t), rtol=0, atol=0)
    net.train()
    assert not torch.allclose(net(x, t), net(x, t))


def test_super_resolution_sees_the_small_image_at_any_size() -> None:
    net, x, t = super_res(), images(), times()
    low = images(size=(4, 4), seed=9)
    assert not torch.allclose(net(x, t, low_res=low), net(x, t, low_res=-low))
    constant = torch.full((2, 3, 1, 1), 0.3)
    torch.testing.assert_close(net(x, t, constant), net(x, t, constant.expand(2, 3, 8, 8)))


def test_blocks_serve_a_forward_written_by_hand() -> None:
    net, x, t = unet(num_classes=4), images(), times()
    y = torch.tensor([1, 2])
    from guided_diffusion.models.layers import timestep_embedding

    emb = net.time_embed(timestep_embedding(t, net.model_channels)) + net.label_emb(y)
    h, skips = x, []
    for block in net.input_blocks:
        h = block(h, emb)
        skips.append(h)
    h = net.middle_block(h, emb)
    for block in net.output_blocks:
        h = block(torch.cat([h, skips.pop()], dim=1), emb)
    torch.testing.assert_close(net.out(h), net(x, t, y), rtol=1e-5, atol=1e-5)


def test_gradient_agrees_with_finite_differences() -> None:
    for net in (unet().double(), stir(classifier("spatial_v2")).double(), classifier("attention").double()):
        x, t = images(1).double(), times(1)
        direction = torch.randn_like(x)
        x.requires_grad_()
        assert net(x, t).dtype == torch.float64
        (gradient,) = torch.autograd.grad(net(x, t).pow(2).sum(), x)
        step = 1e-6
        with torch.no_grad():
            rise = net(x + step * direction, t).pow(2).sum() - net(x - step * direction, t).pow(2).sum()
        torch.testing.assert_close((gradient * direction).sum(), rise / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "asked", "said"),
    [
        (unet, (3, 6), r"2 \(3\), 1 \(6\).*8 \(1\), 4 \(2\)"),
        (unet, (2, 8), r"1 \(8\).*8 \(1\), 4 \(2\)"),
        (unet, (0,), r"above the image size \(0\).*8 \(1\), 4 \(2\)"),
        (super_res, (16,), r"0 \(16\).*8 \(1\), 4 \(2\)"),
        (lambda **changes: classifier("spatial", **changes), [4], r"2 \(4\).*8 \(1\), 4 \(2\)"),
    ],
)
def test_attention_that_no_level_has_is_told(make: Any, asked: Any, said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        make(attention_resolutions=asked)


@pytest.mark.parametrize("asked", [(), (1, 2), {2}, (2, 0), [1]], ids=str)
def test_attention_that_there_is_needs_no_word(asked: Any, recwarn: pytest.WarningsRecorder) -> None:
    unet(attention_resolutions=asked)
    assert not recwarn.list


def test_labels_are_counted_by_images_not_by_times() -> None:
    with pytest.raises(ValueError, match=r"\(1,\); one per image is needed: \(2,\)"):
        unet(num_classes=4)(images(), torch.tensor([7]), torch.tensor([1]))
