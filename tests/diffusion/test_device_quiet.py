"""Between its steps a sampler neither waits for the device nor sends it tables; a denoiser is one graph.

Without a GPU this is shown on the meta device: every operation of the loop is watched, and one that reads a value, copies between
devices, or touches a CPU tensor fails.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import Denoiser, make_denoiser
from guided_diffusion.diffusion.likelihood import bits_per_dim
from guided_diffusion.diffusion.objectives import training_losses
from guided_diffusion.diffusion.process import Process, make_process, respace, space_timesteps
from guided_diffusion.diffusion.schedules import named_betas
from guided_diffusion.diffusion.timesteps import LossSecondMoment, UniformTimesteps


class Quiet(TorchDispatchMode):
    """Fails on whatever would make the host wait for the device, or carry a tensor to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"{func} reads a value"
        out = func(*args, **kwargs)
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        assert devices <= {"meta"}, f"{func} touches {devices}"
        return out


def short_process(device: str = "meta") -> Process:
    return respace(make_process(named_betas("linear", 1000)), space_timesteps(1000, "6")).to(device)


def guided(process: Process, labels: Tensor) -> Denoiser:
    denoise = make_denoiser(lambda x, time, y: torch.cat([x * time.view(-1, 1, 1, 1), x], 1), process, {"y": labels})
    gradient = guidance.log_prob_gradient(lambda x, time: x.flatten(1)[:, :5] * time[:, None], labels)
    free = guidance.classifier_free(denoise, denoise, 2.0)
    return guidance.classifier_mean(free, process, gradient)


SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "ddim_eta": lambda *a: samplers.ddim(*a, eta=1.0),
    "ddim_invert": samplers.ddim_invert,
    "plms": samplers.plms,
    "dpm_solver": lambda *a: samplers.dpm_solver(*a, num_steps=5),
    "unipc": samplers.unipc,
    "sa": samplers.sa,
    "dpm2": samplers.dpm2,
    "dpm_solver_s": samplers.dpm_solver_s,
    "dpm_sde": samplers.dpm_sde,
    "heun": lambda *a: samplers.heun(*a, num_steps=5, churn=4),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_device(name: str) -> None:
    process, x = short_process(), torch.empty(2, 3, 4, 4, device="meta")
    steps = SAMPLERS[name](guided(process, torch.empty(2, dtype=torch.long, device="meta")), x, process)
    next(steps)  # the positions were made here, once
    with Quiet():
        assert len(list(steps)) >= 4


@pytest.mark.parametrize("name", guidance.GUIDANCES)
def test_no_guidance_waits_for_the_device(name: str) -> None:
    process, x = short_process(), torch.empty(2, 3, 8, 8, device="meta")
    kind, i, scale = (
        guidance.GUIDANCES[name],
        torch.empty(2, device="meta", dtype=torch.long),
        torch.empty((), device="meta"),
    )
    denoise = make_denoiser(lambda x, time: x, process, variance="fixed_small", clip=False)
    sources = {
        "classifier": lambda x, time: x,
        "clean": lambda x0: x0,
        "weak": denoise,
        "watched": lambda x, i: (denoise(x, i), torch.empty(2, 16, device="meta")),
    }
    for make in filter(None, (kind.make, kind.mean)):
        strength = kind.scale if kind.neutral is None else scale
        guided = make(process, sources.get(kind.needs), strength, **kind.options)(denoise)
        with Quiet():
            assert guided(x, i).x0.shape == x.shape


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_small_copy_before_the_first_step(name: str) -> None:
    process, x = short_process(), torch.empty(2, 3, 4, 4, device="meta")
    denoise = guided(process, torch.empty(2, dtype=torch.long, device="meta"))
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            leaves = [
                leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"
            ]
            copied.extend(leaf.numel() for leaf in leaves if leaf.ndim)
            return func(*args, **(kwargs or {}))

    with Copies():
        list(SAMPLERS[name](denoise, x, process))
    assert len(copied) <= 4 and all(count <= len(process) for count in copied), copied


def test_the_bound_and_training_do_not_wait_either() -> None:
    process, x0 = short_process(), torch.empty(2, 3, 4, 4, device="meta")
    labels = torch.empty(2, dtype=torch.long, device="meta")
    with Quiet():
        assert bits_per_dim(guided(process, labels), process, x0).vb.shape == (2, 6)
        u = torch.empty(2, dtype=torch.float64, device="meta")
        i, _ = UniformTimesteps(6).draw(u)
        for loss in ("mse", "kl"):
            training_losses(
                lambda x, time, y: torch.cat([x, x], 1), process, x0, i, torch.empty_like(x0), {"y": labels}, loss=loss
            )
    chooser = LossSecondMoment(6)
    chooser.draw(u)  # here its memory moves to the device
    with Quiet():
        i, weight = chooser.draw(u)
        chooser.update(i, weight)


@pytest.mark.parametrize("i", [torch.tensor([3, 0]), torch.tensor([2.5, 0.0])], ids=["whole", "between"])
@pytest.mark.parametrize("kind", ["learned_range", "fixed_small", "free"])
def test_a_denoiser_is_one_graph(i: Tensor, kind: str) -> None:
    process, x = short_process("cpu"), torch.randn(2, 3, 4, 4)
    learned = kind != "fixed_small"
    net = torch.nn.Conv2d(3, 6 if learned else 3, 1)
    denoise = make_denoiser(
        lambda x, time: net(x) * time.view(-1, 1, 1, 1).cos(), process, variance="learned_range" if learned else kind
    )
    if kind == "free":
        denoise = guidance.classifier_free(denoise, denoise, 1.5)
    torch._dynamo.reset()
    compiled = torch.compile(denoise, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, i).x0, denoise(x, i).x0)
        torch.testing.assert_close(compiled(x, i).log_variance, denoise(x, i).log_variance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_a_gpu(name: str) -> None:
    process, x = short_process("cuda"), torch.randn(2, 3, 4, 4, device="cuda")
    steps = SAMPLERS[name](guided(process, torch.tensor([1, 2], device="cuda")), x, process)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(steps)) >= 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
