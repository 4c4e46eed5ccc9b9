"""Habits of code written against the 2021 package: what it imports, replaces, subclasses, reads and counts on."""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import script_util
from guided_diffusion import unet as unet_door
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

ROOT = Path(__file__).resolve().parents[2]
DOORS = (
    "dist_util fp16_util gaussian_diffusion image_datasets logger losses nn resample respace script_util train_util unet"
).split()
SHAPE = (2, 3, 8, 8)


def stirred(net: Any) -> Any:
    """Away from the zeros of a fresh network, which hide every difference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


SMALL: dict[str, Any] = {
    "image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
    "attention_resolutions": (1,), "channel_mult": (1,), "num_heads": 2,
}  # fmt: skip


def unet(**changes: Any) -> Any:
    return stirred(unet_door.UNetModel(**(SMALL | changes)))


def encoder(**changes: Any) -> Any:
    return stirred(unet_door.EncoderUNetModel(**(SMALL | {"pool": "adaptive"} | changes)))


def super_res(**changes: Any) -> Any:
    return stirred(unet_door.SuperResModel(**(SMALL | changes)))


def spaced(kind: Any = SpacedDiffusion, **changes: Any) -> Any:
    """A diffusion put together by hand: 5 of 50 steps."""
    options: dict[str, Any] = {
        "betas": gd.get_named_beta_schedule("linear", 50),
        "model_mean_type": gd.ModelMeanType.EPSILON,
        "model_var_type": gd.ModelVarType.FIXED_LARGE,
        "loss_type": gd.LossType.MSE,
    }
    return kind(use_timesteps=space_timesteps(50, [5]), **(options | changes))


def half(x: Tensor, t: Tensor, y: Any = None) -> Tensor:
    return 0.5 * x


# --- where the files lie ---


def test_the_repository_can_be_a_folder_of_another_package() -> None:
    """Mounted as `guided_diffusion/`, its package is `guided_diffusion.guided_diffusion`: the root must be no package itself."""
    assert not (ROOT / "__init__.py").exists()
    assert (ROOT / "guided_diffusion" / "__init__.py").exists()


def test_an_installation_ships_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "guided_diffusion").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} <= set(told["packages"])


def test_nothing_needs_mpi_or_remote_storage_at_import() -> None:
    code = f"""
import sys
for name in ("mpi4py", "mpi4py.MPI", "blobfile", "tqdm"):
    sys.modules[name] = None
import importlib
for door in {DOORS!r}:
    importlib.import_module("guided_diffusion." + door)
from guided_diffusion import dist_util, image_datasets
assert (dist_util.MPI.COMM_WORLD.Get_rank(), image_datasets.MPI.COMM_WORLD.Get_size()) == (0, 1)
assert dist_util.MPI.COMM_WORLD.bcast([1], root=0) == [1]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# --- flags and factories ---


def test_programs_with_their_own_list_of_flags() -> None:
    """A parser of their own holds exactly the keys of 2021, and the dictionary of keywords is made from ours."""
    defaults = script_util.model_and_diffusion_defaults()
    assert len(defaults) == 23
    small = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
    for holder in (argparse.Namespace, SimpleNamespace):
        args = holder(**(defaults | small | {"model_path": "x.pt"}))
        script_util.create_model_and_diffusion(**script_util.args_to_dict(args, defaults.keys()))


@pytest.mark.parametrize("text", ["8, 4", " 8,4 ", "8,4"])
def test_resolutions_may_be_written_with_spaces(text: str) -> None:
    net = script_util.create_model(16, 32, 1, channel_mult="1,1,1", attention_resolutions=text)
    widths = [any(isinstance(m, unet_door.AttentionBlock) for m in block.modules()) for block in net.input_blocks]
    assert widths == [False, False, False, True, False, True]


@pytest.mark.parametrize("kind", [set, list, tuple, frozenset])
def test_resolutions_may_be_any_container(kind: type) -> None:
    net = unet(attention_resolutions=kind([1]))
    for part in (net.input_blocks, net.output_blocks):
        assert any(isinstance(module, unet_door.AttentionBlock) for module in part.modules())


# --- replacing pieces of a network ---


@pytest.mark.parametrize("make", [unet, encoder, super_res])
def test_checkpoint_is_called_by_position_through_the_module(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def without(*args: Any) -> Tensor:
        calls.append(args)
        return args[0](*args[1])

    more = {"low_res": torch.randn(2, 3, 4, 4)} if make is super_res else {}
    x, t = torch.randn(SHAPE), torch.tensor([3, 7])
    for use_checkpoint in (True, False):
        net = make(use_checkpoint=use_checkpoint)
        with monkeypatch.context() as patch:
            expected = net(x, t, **more)
            patch.setattr(unet_door, "checkpoint", without)
            torch.testing.assert_close(net(x, t, **more), expected)
        if use_checkpoint:
            assert calls and all(len(args) == 4 and isinstance(args[1], tuple) for args in calls)


@pytest.mark.parametrize("new_order", [False, True])
def test_both_attentions_can_be_replaced(new_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement is handed `[N, 3 C, T]`; heads lie outside of q, k, v in the legacy order and inside in the new one."""
    net, x, t = unet(use_new_attention_order=new_order), torch.randn(SHAPE), torch.tensor([3, 7])
    expected, seen = net(x, t), []

    def attend(self: Any, qkv: Tensor) -> Tensor:
        seen.append(qkv.shape)
        n, width, places = qkv.shape
        parts = (n, 3, self.n_heads, -1, places) if new_order else (n, self.n_heads, 3, -1, places)
        q, k, v = qkv.reshape(parts).unbind(1 if new_order else 2)
        weights = torch.softmax(q.transpose(-1, -2) @ k / q.shape[-2] ** 0.5, dim=-1)
        return (v @ weights.transpose(-1, -2)).reshape(n, width // 3, places)

    kind = unet_door.QKVAttention if new_order else unet_door.QKVAttentionLegacy
    monkeypatch.setattr(kind, "forward", attend)
    torch.testing.assert_close(net(x, t), expected, rtol=1e-4, atol=1e-5)
    assert seen and set(seen) == {(2, 96, 64)}


def test_attention_blocks_hold_the_names_that_fine_tuning_looks_for() -> None:
    for net in (unet(), encoder(), super_res()):
        blocks = [module for module in net.modules() if isinstance(module, unet_door.AttentionBlock)]
        assert blocks
        for block in blocks:
            names = {name.split(".")[0] for name, _ in block.named_parameters()}
            assert names == {"norm", "qkv", "proj_out"} and block.qkv.weight.shape == (96, 32, 1)


# --- reading and calling a network ---


def test_attributes_of_a_network() -> None:
    net = unet(num_classes=4)
    wanted = {"model_channels": 32, "num_classes": 4, "image_size": 8, "in_channels": 3, "out_channels": 3}
    assert {name: getattr(net, name) for name in wanted} == wanted and net.dtype == torch.float32
    assert net.label_emb.weight.shape == (4, 128) and [type(m).__name__ for m in net.time_embed][::2] == ["Linear"] * 2
    for name in ("input_blocks", "middle_block", "output_blocks", "out", "convert_to_fp16", "convert_to_fp32"):
        assert hasattr(net, name)


def test_every_network_takes_time_and_class_by_position_or_name() -> None:
    x, t, y = torch.randn(SHAPE), torch.tensor([3, 7]), torch.tensor([0, 2])
    net = unet(num_classes=4)
    torch.testing.assert_close(net(x, t, y), net(x, timesteps=t, y=y))
    assert not torch.allclose(net(x, t, y), net(x, t, y + 1))
    net = encoder()
    torch.testing.assert_close(net(x, t), net(x, timesteps=t))
    net, low = super_res(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(net(x, t, low), net(x, timesteps=t, low_res=low))


def test_weights_come_first_and_conversion_after() -> None:
    source, net = unet(), unet(use_fp16=True)
    assert net.load_state_dict(source.state_dict()) is not None
    net.convert_to_fp16()
    x, t = torch.randn(SHAPE), torch.tensor([3, 7])
    torch.testing.assert_close(net(x, t), source(x, t), rtol=0.05, atol=0.05)
    assert net(x, t).dtype == torch.float32
    expected, before = source(x, t), {name: value.clone() for name, value in source.state_dict().items()}
    source.convert_to_fp32()  # some call it on a network that never was anything else
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert torch.equal(source(x, t), expected)


def test_features_by_hooks_on_every_part() -> None:
    net, seen = unet(), []
    for block in [*net.input_blocks, net.middle_block, *net.output_blocks]:
        block.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    net(torch.randn(SHAPE), torch.tensor([3, 7]))
    assert len(seen) == len(net.input_blocks) + 1 + len(net.output_blocks)
    assert all(shape[0] == 2 and len(shape) == 4 for shape in seen)


# --- a diffusion's attributes and methods ---


def test_tables_convert_the_usual_ways() -> None:
    diffusion = spaced()
    names = [name for name, value in vars(diffusion).items() if isinstance(value, np.ndarray)]
    wanted = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2""".split()
    assert set(wanted) <= set(names)
    for name in wanted:
        table = getattr(diffusion, name)
        assert type(table) is np.ndarray and table.dtype == np.float64 and table.shape == (5,)
        assert torch.from_numpy(table).dtype == torch.float64 and isinstance(table.tolist()[0], float)
        assert (table[3] * torch.ones(2)).dtype == torch.float32
    assert np.isfinite(np.log(diffusion.betas)).all()
    assert torch.tensor(diffusion.alphas_cumprod, dtype=torch.float32).shape == (5,)


def test_other_attributes_of_a_diffusion() -> None:
    diffusion = spaced(rescale_timesteps=True)
    assert diffusion.num_timesteps == 5 and diffusion.original_num_steps == 50 and diffusion.rescale_timesteps is True
    assert diffusion.model_mean_type is gd.ModelMeanType.EPSILON
    assert diffusion.model_var_type is gd.ModelVarType.FIXED_LARGE
    assert diffusion.loss_type is gd.LossType.MSE and not diffusion.loss_type.is_vb()
    assert isinstance(diffusion.timestep_map, list) and set(diffusion.timestep_map) == diffusion.use_timesteps


def test_answers_have_the_keys_of_2021() -> None:
    x, t = torch.randn(SHAPE), torch.tensor([4, 0])
    learned = spaced(model_var_type=gd.ModelVarType.LEARNED_RANGE)

    def double(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)

    for diffusion, net in ((spaced(), half), (learned, double)):
        out = diffusion.p_mean_variance(net, x, t)
        assert list(map(tuple, (v.shape for v in out.values()))) == [SHAPE] * 4
        assert set(out) == {"mean", "variance", "log_variance", "pred_xstart"}
        for step in (diffusion.p_sample, diffusion.ddim_sample, diffusion.ddim_reverse_sample):
            assert {"sample", "pred_xstart"} <= set(step(net, x, t))
        losses = diffusion.training_losses(net, x, t)
        assert set(losses) == ({"loss", "mse"} if net is half else {"loss", "mse", "vb"})
        assert all(value.shape == (2,) for value in losses.values())
        bound = diffusion.calc_bpd_loop(net, x)
        assert {name: tuple(value.shape) for name, value in bound.items()} == {
            "total_bpd": (2,), "prior_bpd": (2,), "vb": (2, 5), "xstart_mse": (2, 5), "mse": (2, 5)
        }  # fmt: skip


def test_a_model_is_anything_that_can_be_called() -> None:
    x, t = torch.randn(SHAPE), torch.tensor([4, 0])
    fixed = torch.randn(SHAPE)
    first = spaced().p_mean_variance(lambda *args, **kwargs: fixed, x, t)["pred_xstart"]
    torch.testing.assert_close(first, spaced()._predict_xstart_from_eps(x, t, fixed).clamp(-1, 1))
    sample = spaced().ddim_sample_loop(half, SHAPE, device="cpu", model_kwargs={"y": torch.tensor([1, 2])})
    assert sample.shape == SHAPE


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_draws_of_guided_loops_over_fewer_steps(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One normal draw for the start and one for each step, none for guidance: published seeds stay what they are."""
    drawn: list[str] = []

    def watch(name: str, original: Callable[..., Tensor]) -> None:
        def draw(*args: Any, **kwargs: Any) -> Tensor:
            drawn.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, draw)

    watch("randn", torch.randn)
    watch("randn_like", torch.randn_like)
    guided: dict[str, Any] = {"cond_fn": lambda x, t: -x, "device": "cpu"}
    spaced().ddim_sample_loop(half, SHAPE, eta=eta, **guided)
    spaced().p_sample_loop(half, SHAPE, **guided)
    assert drawn == ["randn", *["randn_like"] * 5] * 2


def test_own_steps_can_be_worked_out_from_what_guidance_hears() -> None:
    diffusion, heard = script_util.create_gaussian_diffusion(rescale_timesteps=True, timestep_respacing="25"), []

    def guide(x: Tensor, t: Tensor) -> Tensor:
        heard.append(int((t * (diffusion.num_timesteps / 1000)).long()[0]))
        return torch.zeros_like(x)

    diffusion.p_sample_loop(half, (1, 1, 2, 2), cond_fn=guide, device="cpu")
    assert heard == list(range(25))[::-1]


def test_a_subclass_that_wraps_models_itself() -> None:
    heard: list[int] = []

    class Own(SpacedDiffusion):
        def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
            super().__init__(use_timesteps, **kwargs)
            self.calls = 0

        def ddim_sample(self, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self._wrap_model(model)(x, t)
            return super().ddim_sample(model, x, t, *args, **kwargs)

    diffusion = spaced(Own)

    def listening(x: Tensor, t: Tensor) -> Tensor:
        heard.append(int(t[0]))
        return x

    diffusion.ddim_sample_loop(listening, SHAPE, device="cpu")
    assert diffusion.calls == 5
    assert heard == [step for step in diffusion.timestep_map[::-1] for _ in range(2)]


# --- what 2021 got wrong and programs work around ---


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradients_of_a_frozen_network_through_guidance(use_checkpoint: bool) -> None:
    """In 2021: no gradient when every parameter is frozen, and no second backward through the same graph."""
    net = encoder(use_checkpoint=use_checkpoint).requires_grad_(False)

    def guide(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = net(x, t).log_softmax(dim=-1)[:, 1].sum()
            (first,) = torch.autograd.grad(score, x, retain_graph=True)
            (again,) = torch.autograd.grad(score, x)
        assert first.abs().sum() > 0 and torch.equal(first, again)
        return first

    for loop in ("p_sample_loop", "ddim_sample_loop"):
        assert getattr(spaced(), loop)(half, SHAPE, cond_fn=guide, device="cpu").isfinite().all()


def test_a_chain_left_early_leaves_gradients_on() -> None:
    chain = spaced().p_sample_loop_progressive(half, SHAPE, device="cpu")
    next(chain)
    assert torch.is_grad_enabled()
    chain.close()
    assert torch.is_grad_enabled()
