"""Habits of code written against the 2021 package: what it imports, replaces, subclasses, reads and counts on."""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import ROOT, run_forked
from torch import Tensor

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import respace, script_util
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

DOORS = (
    "dist_util fp16_util gaussian_diffusion image_datasets logger losses nn resample respace script_util train_util unet"
).split()
SHAPE = (2, 3, 8, 8)


def spaced(kind: Any = SpacedDiffusion, **changes: Any) -> Any:
    """A diffusion put together by hand: 5 of 50 steps."""
    options: dict[str, Any] = {
        "use_timesteps": space_timesteps(50, [5]),
        "betas": gd.get_named_beta_schedule("linear", 50),
        "model_mean_type": gd.ModelMeanType.EPSILON,
        "model_var_type": gd.ModelVarType.FIXED_LARGE,
        "loss_type": gd.LossType.MSE,
    }
    return kind(**(options | changes))


THREE: dict[str, Any] = {"use_timesteps": [3, 50, 99], "betas": np.linspace(1e-3, 0.02, 100)}


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
    run_forked(f"""
import importlib, sys
for name in ("mpi4py", "mpi4py.MPI", "blobfile", "tqdm"):
    sys.modules[name] = None
for door in {DOORS!r}:
    importlib.import_module("guided_diffusion." + door)
from guided_diffusion import dist_util, image_datasets
assert (dist_util.MPI.COMM_WORLD.Get_rank(), image_datasets.MPI.COMM_WORLD.Get_size()) == (0, 1)
assert dist_util.MPI.COMM_WORLD.bcast([1], root=0) == [1]
""")


# --- flags and factories ---


def test_programs_with_their_own_list_of_flags() -> None:
    """A parser of their own holds exactly the keys of 2021, and the dictionary of keywords is made from ours."""
    defaults = script_util.model_and_diffusion_defaults()
    assert len(defaults) == 23
    small = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
    for holder in (argparse.Namespace, SimpleNamespace):
        args = holder(**(defaults | small | {"model_path": "x.pt"}))
        script_util.create_model_and_diffusion(**script_util.args_to_dict(args, defaults.keys()))


# --- replacing pieces of a network ---


# --- reading and calling a network ---


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
    assert isinstance(diffusion, gd.GaussianDiffusion) and isinstance(diffusion.timestep_map, list)
    assert set(diffusion.timestep_map) == diffusion.use_timesteps


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
def test_draws_of_loops(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One normal draw for the start and one for each step, none for guidance: published seeds stay what they are."""
    drawn: list[str] = []

    def watch(name: str, original: Callable[..., Tensor]) -> None:
        def draw(*args: Any, **kwargs: Any) -> Tensor:
            drawn.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, draw)

    watch("randn", torch.randn)
    watch("randn_like", torch.randn_like)
    for guide in (None, lambda x, t: -x):
        spaced().ddim_sample_loop(half, SHAPE, eta=eta, cond_fn=guide, device="cpu")
        spaced().p_sample_loop(half, SHAPE, cond_fn=guide, device="cpu")
    assert drawn == ["randn", *["randn_like"] * 5] * 4


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


def test_a_chain_left_early_leaves_gradients_on() -> None:
    chain = spaced().p_sample_loop_progressive(half, SHAPE, device="cpu")
    next(chain)
    assert torch.is_grad_enabled()
    chain.close()
    assert torch.is_grad_enabled()


# --- the kept steps ---


def test_space_timesteps_gives_a_set():
    assert space_timesteps(100, "ddim4") == {0, 25, 50, 75}
    assert space_timesteps(100, [2, 2]) == {0, 49, 50, 99}
    assert space_timesteps(100, 5) == space_timesteps(100, "5")
    with pytest.raises(ValueError, match="ddim60"):
        space_timesteps(1000, "ddim60")


@pytest.mark.parametrize("rescale", [False, True])
def test_model_and_guidance_hear_original_steps(rescale):
    heard = {"model": [], "guide": []}

    def model(x, t, y=None):
        heard["model"].append(t)
        return x

    def guide(x, t, y=None):
        heard["guide"].append(t)
        return x

    diffusion = spaced(**THREE, rescale_timesteps=rescale)
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([2, 1])
    expected = torch.tensor([990.0, 500.0]) if rescale else torch.tensor([99, 50])
    diffusion.p_sample(model, x, t, cond_fn=guide)
    diffusion.ddim_sample(model, x, t, cond_fn=guide)
    diffusion.training_losses(model, x, t)
    diffusion.calc_bpd_loop(model, x)
    for t_heard in [*heard["model"][:3], *heard["guide"]]:
        assert torch.equal(t_heard, expected)
    assert torch.equal(diffusion._scale_timesteps(t), t)


def test_with_grad_guidance_hears_own_steps():
    heard = []
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([2, 1])
    spaced(**THREE).p_sample_with_grad(lambda x, t: x, x, t, cond_fn=lambda x, t, out: heard.append(t) or x)
    assert torch.equal(heard[0], t)


def test_wrapping_once_is_enough():
    diffusion = spaced(**THREE)
    wrapped = diffusion._wrap_model(torch.nn.Identity())
    assert isinstance(wrapped, respace._WrappedModel) and diffusion._wrap_model(wrapped) is wrapped
    told = respace._WrappedModel(lambda x, t: t, [3, 50, 99], True, 100)(None, torch.tensor([1]))
    assert torch.equal(told, torch.tensor([500.0]))


def test_keeping_everything_changes_nothing():
    x, t = torch.randn(3, 1, 2, 2), torch.tensor([0, 40, 99])
    kept = spaced(**(THREE | {"use_timesteps": range(100)}))
    types = {name: getattr(kept, name) for name in ("model_mean_type", "model_var_type", "loss_type")}
    whole = gd.GaussianDiffusion(betas=THREE["betas"], **types)
    np.testing.assert_allclose(kept.betas, whole.betas, rtol=1e-12)
    first, second = (d.p_mean_variance(lambda x, t: 0.5 * x, x, t) for d in (kept, whole))
    for key in first:
        torch.testing.assert_close(first[key], second[key])


# --- what a well-known fork added to the loops ---


LOOPS = [f"{kind}_sample_loop{end}" for kind in ("p", "ddim", "plms") for end in ("", "_progressive")]


@pytest.mark.parametrize("name", LOOPS)
def test_loops_take_the_keywords_of_the_fork(name: str) -> None:
    """Its start from an image, its random classes, and its guidance through the prediction, whose t counts own steps."""
    heard: list[int] = []
    image, noise, first, y = torch.rand(SHAPE), torch.randn(SHAPE), [], torch.tensor([3, 3])

    class Net(torch.nn.Module):
        num_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            first.append(x.detach().clone())
            self.seen += y.tolist()
            return 0.5 * x

    def guide(x: Tensor, t: Tensor, out: dict[str, Tensor], y: Any = None) -> Tensor:
        heard.append(int(t[0]))
        return -torch.autograd.grad(out["pred_xstart"].pow(2).sum(), x)[0]

    net, diffusion = Net(), spaced()
    made = getattr(diffusion, name)(
        net, SHAPE, noise=noise, skip_timesteps=2, init_image=image, randomize_class=True, cond_fn=guide,
        cond_fn_with_grad=True, model_kwargs={"y": y}, device="cpu",
    )  # fmt: skip
    sample = made if isinstance(made, Tensor) else list(made)[-1]["sample"]
    assert sample.shape == SHAPE and not sample.requires_grad and sample.isfinite().all()
    assert sorted(set(heard)) == [0, 1, 2] and set(net.seen) != {3} and y.tolist() == [3, 3]
    torch.testing.assert_close(first[0], diffusion.q_sample(image, torch.tensor([2, 2]), noise))


def test_multistep_loop_carries_on_from_step_to_step() -> None:
    """By default of order two, so no DDIM."""
    noise = torch.randn(SHAPE)

    def curved(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * 0.8

    named: dict[str, Any] = {"noise": noise, "device": "cpu", "clip_denoised": False}
    second = spaced().plms_sample_loop(curved, SHAPE, **named)
    assert not torch.allclose(second, spaced().ddim_sample_loop(curved, SHAPE, **named))
