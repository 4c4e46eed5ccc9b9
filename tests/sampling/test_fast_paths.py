"""Every faster path against the plain one: weights laid out, bfloat16, recorded steps, compiled networks, sizes that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import again
from guided_pair import Shape, critic, generator, small
from torch import Tensor

from guided_diffusion import build
from guided_diffusion.config import RunConfig
from guided_diffusion.diffusion.denoiser import Denoised, Spread
from guided_diffusion.diffusion.process import Process, respace, space_timesteps
from guided_diffusion.diffusion.updates import fresh_noise
from guided_diffusion.runtime import compiler
from guided_diffusion.runtime.devices import float32_products
from guided_diffusion.sampling import execution, pipeline
from guided_diffusion.sampling.execution import Compiled, Graphed
from guided_diffusion.sampling.guiding import classifier
from guided_diffusion.sampling.jobs import Job, LabelPlan, Request
from guided_diffusion.sampling.pipeline import make_pipeline
from guided_diffusion.sampling.queue import generate
from guided_diffusion.weights.load import Loaded

SHAPE = small(num_channels=32, image_size=16)
SMALLEST = replace(  # one level: residual blocks and attention, and little for a compiler to read
    SHAPE,
    model=replace(SHAPE.model, channel_mult="1", attention_resolutions=""),
    classifier=replace(SHAPE.classifier, classifier_channel_mult="1", classifier_attention_resolutions=""),
)


def process(steps: int = 5, device: str = "cpu") -> Process:
    return respace(build.build_process(SHAPE.diffusion), space_timesteps(1000, str(steps))).to(device)


def loaded(device: str = "cpu", shape: Shape = SHAPE) -> tuple[Any, Any]:
    nets = generator(shape, device).requires_grad_(False), critic(shape, device).requires_grad_(False)
    configs = shape.config, RunConfig(model=shape.classifier, diffusion=shape.diffusion)
    return tuple(Loaded(net, process(device=device), config, "") for net, config in zip(nets, configs))


def noise(count: int = 3, device: str = "cpu") -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)


def labels(count: int = 3, device: str = "cpu") -> Tensor:
    return torch.arange(count, device=device)


def ddim_by_the_equations(net: Any, steps: Process, x: Tensor, y: Tensor, guide: Any = None) -> Tensor:
    """Equation 12 of Song et al. (2021) without noise, guided as algorithm 2 of Dhariwal & Nichol (2021) says, in float64 between calls."""
    shares = torch.cumprod(1 - torch.as_tensor(steps.betas, dtype=torch.float64), 0)
    x = x.double()
    for k in reversed(range(len(steps))):
        now, before = shares[k], shares[k - 1] if k else torch.ones(())
        time = steps.time[k].float().expand(len(x))
        with torch.no_grad():
            eps = net(x.float(), time, y)[:, :3]
        x0 = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        if guide is not None:
            at = x.float().requires_grad_()
            log_prob = guide(at, time).log_softmax(-1)[range(len(y)), y].sum()
            eps = eps - (1 - now).sqrt() * torch.autograd.grad(log_prob, at)[0]
            x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = before.sqrt() * x0 + (1 - before).sqrt() * eps
    return x.float()


def test_guided_sampling_is_that_of_the_equations() -> None:
    model, guide = loaded()
    steps = process()
    plain = ddim_by_the_equations(generator(SHAPE), steps, noise(), labels(), critic(SHAPE))
    sample = make_pipeline(model, process=steps, guidance=classifier(guide), sampler="ddim")
    assert model.net.middle_block[0].in_layers[2].weight.is_contiguous(memory_format=torch.channels_last)
    # In norm, not by pixel: over 25 steps an untrained network magnifies the rounding of single pixels (the largest seen: 1.2e-4).
    assert (sample(noise(), fresh_noise, {"y": labels()}) - plain).norm() < 1e-4 * plain.norm()
    last = respace(build.build_process(SHAPE.diffusion), [0])
    one = ddim_by_the_equations(generator(SHAPE), last, noise(), labels())
    ours = make_pipeline(model, process=last, sampler="ddim")(noise(), fresh_noise, {"y": labels()})
    torch.testing.assert_close(ours, one, rtol=0, atol=1e-5)


def test_networks_in_training_keep_their_layout() -> None:
    net = generator(SHAPE)
    before = net.middle_block[0].in_layers[2].weight.stride()
    make_pipeline(Loaded(net, process(), SHAPE.config, ""))
    assert net.middle_block[0].in_layers[2].weight.stride() == before


def test_bfloat16_stays_within_three_percent_for_one_call() -> None:
    net, x, t = generator(SHAPE), noise(), torch.tensor([1.0, 400.0, 999.0])
    with torch.no_grad():
        plain = net(x, t, labels())
        net.set_compute_dtype(torch.bfloat16)
        found = net(x, t, labels())
    assert (found - plain).norm() < 0.03 * plain.norm()


def test_a_recorded_step_follows_new_inputs_and_new_labels() -> None:
    recorded: list[int] = []

    def noted(run: Any) -> Any:
        recorded.append(1)
        return again(run)

    def make(cond: Any) -> Any:
        return lambda x, i: Denoised(x * i.view(-1, 1) + cond["y"].view(-1, 1), Spread(x + 1, x + 2))

    graphed, answers = Graphed(make, record=noted), []
    for k in range(3):
        cond = {"y": torch.full((2,), 10.0 * k)}
        x, i = torch.full((2, 3), float(k)), torch.tensor([k, k + 1])
        answers.append(graphed(cond)(x, i))
        torch.testing.assert_close(answers[-1].x0, make(cond)(x, i).x0)
        torch.testing.assert_close(answers[-1].log_variance, x + 2)
    assert float(answers[0].x0.sum()) == 0.0  # what was handed out earlier is not overwritten
    assert len(recorded) == 1
    more = {"y": torch.full((4,), 5.0)}
    assert graphed(more)(torch.ones(4, 3), torch.ones(4, dtype=torch.long)).x0.shape == (4, 3)
    assert len(recorded) == 2  # another shape, recorded anew


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_recorded_is_computed_plainly(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Any) -> Any:
        raise kind("operation not permitted when stream is capturing")

    graphed = Graphed(lambda cond: lambda x, i: Denoised(2 * x, Spread(x, x)), record=refuse)
    for _ in range(2):
        assert torch.equal(graphed({})(torch.ones(1, 2), torch.zeros(1)).x0, torch.full((1, 2), 2.0))
    assert len(caplog.messages) == 1 and "capturing" in caplog.text
    assert "capturing" in str(graphed.failure)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts the graphs of compiled steps, which it runs without generating code; a graph break is an error."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(execution, "Compiled", partial(Compiled, backend=counter))
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["ddim", "ancestral"])  # guided by the score, and by the mean
def test_a_compiled_job_makes_the_same_images_with_one_graph(method: str, counter: Any, tmp_path: Path) -> None:
    """Three batches, each with labels of its own, the last one filled up."""
    model, guide = loaded(shape=SMALLEST)
    made: dict[bool, list[Tensor]] = {False: [], True: []}
    for compiled, images in made.items():
        sample = make_pipeline(model, guidance=classifier(guide), sampler=method, compile=compiled)

        def kept(*args: Any, sample: Any = sample, images: list[Tensor] = images) -> Tensor:
            images.append(sample(*args))
            return images[-1]

        request = Request("", 5, labels=LabelPlan(tuple(range(10)), seed=3))
        generate(kept, Job(request, str(tmp_path / str(compiled)), (3, 16, 16), 2, grid=0), progress=False)
    assert counter.frame_count == 1 and [len(images) for images in made.values()] == [3, 3]
    for eager, found in zip(made[False], made[True]):
        assert (found - eager).norm() < 1e-4 * eager.norm()  # in norm, as above


def test_a_step_that_cannot_be_compiled_whole_has_its_networks_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("not today")

    compiled: list[Any] = []
    monkeypatch.setattr(execution, "Compiled", partial(Compiled, backend=refuse))
    monkeypatch.setattr(compiler, "compile_network", compiled.append)
    model, guide = loaded(shape=SMALLEST)
    options: dict[str, Any] = {"guidance": classifier(guide), "sampler": "ddim"}
    expected = make_pipeline(model, **options)(noise(), fresh_noise, {"y": labels()})
    sample = make_pipeline(model, compile=True, **options)
    for _ in range(2):
        assert torch.equal(sample(noise(), fresh_noise, {"y": labels()}), expected)
    (told,) = [text for text in caplog.messages if "each network is compiled by itself" in text]
    assert "not today" in told and compiled == [model.net, guide.net]


@pytest.mark.parametrize(("limit", "most", "expected"), [(0, 64, 0), (1, 64, 1), (20, 64, 16), (100, 50, 50)])
def test_the_largest_batch_that_fits(limit: int, most: int, expected: int) -> None:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert pipeline.largest_that_fits(attempt, most) == expected
    assert max(tried) <= most


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def attempt(_: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        pipeline.largest_that_fits(attempt, 4)


@pytest.fixture
def float32_convolutions() -> Iterator[None]:
    """Convolutions and products in float32 proper: in TF32, a GPU's default, two algorithms differ by a thousandth."""
    with float32_products(tf32=False):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("float32_convolutions")
@pytest.mark.parametrize("method", ["ddim", "ancestral", "heun", "dpm_solver", "unipc", "ipndm"])
def test_cuda_graphs_make_the_same_images(method: str) -> None:
    model, guide = loaded("cuda")
    steps, results = process(device="cuda"), []
    for graphs in (False, True):
        sample = make_pipeline(model, process=steps, guidance=classifier(guide), sampler=method, graphs=graphs)
        for shift in (0, 1):
            torch.manual_seed(0)
            cond = {"y": (labels(device="cuda") + shift) % 10}
            results.append(sample(noise(device="cuda"), fresh_noise, cond))
    for eager, found in zip(results[:2], results[2:]):  # cuDNN may choose another algorithm while it is recorded
        assert (found - eager).norm() < 1e-4 * eager.norm()
    assert (results[0] - results[1]).norm() > 1e-2 * results[0].norm()  # the labels of each batch are heard


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("float32_convolutions")
def test_a_cuda_graph_of_a_compiled_step_makes_the_same_images() -> None:
    model, guide = loaded("cuda")
    results = []
    for options in ({}, {"compile": True, "graphs": True}):
        sample = make_pipeline(model, guidance=classifier(guide), sampler="ddim", **options)
        for shift in (0, 1):
            cond = {"y": (labels(device="cuda") + shift) % 10}
            results.append(sample(noise(device="cuda"), fresh_noise, cond))
    for eager, found in zip(results[:2], results[2:]):
        assert (
            found - eager
        ).norm() < 1e-3 * eager.norm()  # Inductor sums in another order and fuses multiplication and addition


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_guided_sampling_does_not_wait_for_the_gpu(graphs: bool) -> None:
    model, guide = loaded("cuda")
    sample = make_pipeline(model, guidance=classifier(guide), sampler="dpm_solver", graphs=graphs)
    cond = {"y": labels(device="cuda")}
    sample(noise(device="cuda"), fresh_noise, cond)
    from guided_diffusion.diffusion import guidance, samplers
    from guided_diffusion.diffusion.denoiser import make_denoiser

    denoise = make_denoiser(model.net, process(device="cuda"), cond)
    gradient = guidance.log_prob_gradient(guide.net, cond["y"])
    steps = samplers.ddim(
        guidance.classifier(denoise, process(device="cuda"), gradient), noise(device="cuda"), process(device="cuda")
    )
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(steps)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*does not have a deterministic implementation")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_deterministic_images_are_the_same_to_the_bit_on_a_gpu(precision: torch.dtype) -> None:
    """For every batch size, from CUDA graphs and without them."""
    model, guide = loaded("cuda")
    for each in (model, guide):
        each.net.set_compute_dtype(precision)
    options: dict[str, Any] = {"guidance": classifier(guide), "sampler": "ddim", "steps": 20, "deterministic": True}
    made = [
        pipeline.sample(model, labels=list(range(10)), batch_size=size, cuda_graphs=graphs, **options)
        for size, graphs in ((1, False), (8, True), (16, True), (5, "auto"))
    ]
    assert all((images == made[0]).all() for images in made)
