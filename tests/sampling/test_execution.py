"""A guided step compiled as one graph: how many graphs there are, and that they compute what the plain step computes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from chains import again
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import Denoised, Denoiser, Spread, make_denoiser
from guided_diffusion.diffusion.process import make_process
from guided_diffusion.diffusion.schedules import named_betas
from guided_diffusion.models.unet import EncoderUNetModel, UNetModel
from guided_diffusion.sampling import execution
from guided_diffusion.sampling.execution import Compiled, Cond, Execution, Graphed, worth_recording

PROCESS = make_process(named_betas("linear", 50))
WEIGHT = torch.linspace(-9, 9, 4 * 192).sin().view(4, 192)
Guide = Callable[..., Denoiser]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def stirred(net: Any, dtype: torch.dtype, seed: int) -> Any:
    """Random weights everywhere (a fresh network answers zero), frozen, computing in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.requires_grad_(False).parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    net.set_compute_dtype(dtype, store=True)
    return net.eval()


def guided(guide: Guide, dtype: torch.dtype = torch.float32) -> Callable[[Cond], Denoiser]:
    """The smallest networks with residual blocks and attention, one guiding the other."""
    options: dict[str, Any] = {"channel_mult": (1,), "num_head_channels": 16, "use_scale_shift_norm": True}
    net = stirred(UNetModel(8, 3, 32, 6, 0, (), num_classes=4, **options), dtype, 0)
    critic = stirred(EncoderUNetModel(8, 3, 32, 4, 0, (), pool="attention", **options), dtype, 1)

    def make(cond: Cond) -> Denoiser:
        denoise = make_denoiser(net, PROCESS, {"y": cond["y"]})
        return guide(denoise, PROCESS, guidance.log_prob_gradient(critic, cond["y"]), 2.0)

    return make


def images(seed: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    """The difference in norm: single pixels of an untrained network magnify rounding."""
    return float((found - expected).detach().norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guide", [guidance.classifier, guidance.classifier_mean])
def test_one_graph_for_all_batches_and_steps(guide: Guide, dtype: torch.dtype) -> None:
    """In bfloat16 the two ways round at different places: the compiled one is about as near to float32 as the other."""
    counter = CompileCounterWithBackend("aot_eager")  # a graph break raises: Compiled asks for a full graph
    make, exact = guided(guide, dtype), guided(guide)
    whole = Compiled(make, backend=counter)
    for k, labels in enumerate(([0, 1, 2], [3, 3, 1], [2, 0, 0])):
        cond = {"y": torch.tensor(labels)}
        for i in (0, 20, 49):
            x, at = images(k), torch.tensor([i, i, max(0, i - 1)])
            found, eager, expected = whole(cond)(x, at), make(cond)(x, at), exact(cond)(x, at)
            bound = 1e-5 if dtype == torch.float32 else 2 * apart(eager.x0, expected.x0)
            assert apart(found.x0, expected.x0) < bound
            spread = 1e-5 if dtype == torch.float32 else 0.03
            torch.testing.assert_close(found.log_variance, eager.log_variance, rtol=spread, atol=spread)
    assert counter.frame_count == 1 and counter.op_count > 50
    others = make({"y": torch.tensor([1, 3, 2])})(x, at).x0
    assert apart(others, expected.x0) > 3 * bound  # labels matter more than the bound could hide


def playful(cond: Cond) -> Denoiser:
    """Guided by a classifier of one layer: for what does not depend on the network."""

    def critic(x: Tensor, time: Tensor) -> Tensor:
        return x.flatten(1) @ WEIGHT.T * (1 + 0.01 * time[:, None])

    def net(x: Tensor, time: Tensor) -> Tensor:
        return torch.cat([x.sin() * cond["y"].view(-1, 1, 1, 1), 0.1 * x], dim=1) + 1e-3 * time.view(-1, 1, 1, 1)

    denoise = make_denoiser(net, PROCESS)
    return guidance.classifier(denoise, PROCESS, guidance.log_prob_gradient(critic, cond["y"]), 2.0)


def test_positions_between_steps_are_one_more_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    cond, whole = {"y": torch.tensor([0, 1, 2])}, Compiled(playful, backend=counter)
    for i in (torch.tensor([3, 4, 5]), torch.tensor([2.5, 30.0, 48.9]), torch.tensor([1.0, 7.1, 20.0])):
        assert apart(whole(cond)(images(0), i).x0, playful(cond)(images(0), i).x0) < 1e-6
    assert counter.frame_count == 2


def test_layout_grad_mode_and_inference_mode_of_the_caller_make_no_graphs() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    whole, labels, i = Compiled(playful, backend=counter), torch.tensor([2, 0, 1]), torch.tensor([9]).expand(3)
    expected = playful({"y": labels})(images(0), i).x0
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            x, y = images(0).contiguous(memory_format=torch.channels_last), labels.clone()
            found = whole({"y": y})(x, i.contiguous() if mode is torch.no_grad else i).x0
            torch.testing.assert_close(playful({"y": y})(x, i).x0, expected)
        assert apart(found, expected) < 1e-6 and not found.requires_grad and not found.is_inference()
    assert counter.frame_count == 1


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.ancestral, samplers.dpm_solver, samplers.heun])
def test_whole_chains_agree(sampler: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    cond, results = {"y": torch.tensor([1, 2, 3])}, []
    for denoise in (playful(cond), Compiled(playful, backend=counter)(cond)):
        torch.manual_seed(0)
        results.append(samplers.last(sampler(denoise, images(0), PROCESS)))
    assert apart(results[1], results[0]) < 1e-5
    assert counter.frame_count <= 2  # at whole positions and between them


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of this package; torch has many messages of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("guided_diffusion")]


def test_what_cannot_be_traced_is_done_the_other_way_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def awkward(cond: Cond) -> Denoiser:
        def denoise(x: Tensor, i: Tensor) -> Denoised:
            torch._dynamo.graph_break()
            return Denoised(2 * x + cond["y"], Spread(x, x))

        return denoise

    failures: list[str] = []
    whole = Compiled(awkward, on_failure=lambda step: failures.append(str(step())), backend="eager")
    for k in range(3):
        found = whole({"y": torch.tensor(float(k))})(torch.ones(2, 3), torch.zeros(2))
        assert torch.equal(found.x0, torch.full((2, 3), 2.0 + k))
    assert len(warned(caplog)) == len(failures) == 1 and whole.failure is not None
    assert "cannot be compiled as one graph" in warned(caplog)[0]
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        Compiled(awkward, backend="eager")({})(torch.ones(2, 3), torch.zeros(2))


def test_many_compiled_steps_in_one_process() -> None:
    """More than torch's limit of graphs for one piece of code: each step has code of its own."""
    for n in range(1 + torch._dynamo.config.recompile_limit):
        weight = torch.full((3,), float(n))

        def make(cond: Cond, weight: Tensor = weight) -> Denoiser:
            return lambda x, i: Denoised(x * weight + cond["y"], Spread(x, x))

        found = Compiled(make, backend="eager")({"y": torch.ones(3)})(torch.ones(2, 3), torch.zeros(2))
        assert torch.equal(found.x0, torch.full((2, 3), 1.0 + n))


def test_a_recorded_compiled_step_reads_conditions_anew() -> None:
    """As CUDA graphs do it: everything is done again on the same memory."""
    counter = CompileCounterWithBackend("aot_eager")

    graphed = Graphed(Compiled(playful, backend=counter), record=again)
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([3, 2, 1])):
        i, apart_in_memory = torch.tensor([5, 6, 7]), torch.stack([labels, labels], dim=1)[:, 0]
        found = graphed({"y": apart_in_memory})(images(1), i).x0
        assert apart(found, playful({"y": labels})(images(1), i).x0) < 1e-6
    assert counter.frame_count == 1


def test_both_forms_of_the_gradient_agree() -> None:
    """The traced one (torch.func) and the eager one (autograd), on a classifier alone and without any compiler between them."""
    critic = stirred(
        EncoderUNetModel(8, 3, 32, 4, 1, (1,), channel_mult=(1,), num_head_channels=16, pool="attention"),
        torch.float32,
        2,
    )
    x, time, labels = images(4), torch.tensor([3.0, 500.0, 900.0]), torch.tensor([0, 3, 1])
    gradient = guidance.log_prob_gradient(critic, labels)
    counter = CompileCounterWithBackend("eager")  # runs what was traced as it is
    traced = torch.compile(gradient, backend=counter, fullgraph=True, dynamic=False)
    for frozen in (True, False):
        critic.requires_grad_(not frozen)
        assert apart(traced(x, time), gradient(x, time)) < 1e-5
        assert all(parameter.grad is None for parameter in critic.parameters())


@pytest.mark.slow
@pytest.mark.timeout(600)  # a C++ compiler at work some forty times
@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="needs a C++ compiler")
def test_inductor_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler that users get, on the smallest guided step. At step 49 rounding of eps counts 359 times in x0: hence the bound."""
    # For the capability "default" torch 2.13 writes code that does not compile.
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    make = guided(guidance.classifier_mean)
    whole = Compiled(make)
    for labels in ([0, 1, 2], [3, 0, 0]):
        cond, i = {"y": torch.tensor(labels)}, torch.tensor([4, 20, 49])
        found, expected = whole(cond)(images(2), i), make(cond)(images(2), i)
        assert apart(found.x0, expected.x0) < 1e-4
        torch.testing.assert_close(found.log_variance, expected.log_variance, rtol=1e-5, atol=1e-5)


def test_more_sizes_of_batches_than_torch_keeps_graphs_for(caplog: pytest.LogCaptureFixture) -> None:
    def make(cond: Cond) -> Denoiser:
        return lambda x, i: Denoised(x * 2 + cond["y"].view(-1, 1), Spread(x, x + 1))

    counter = CompileCounterWithBackend("eager")
    compiled = Compiled(make, backend=counter)
    for count in (*range(1, 12), 1, 11):
        x, cond = torch.randn(count, 5), {"y": torch.arange(count)}
        torch.testing.assert_close(compiled(cond)(x, torch.zeros(count)).x0, make(cond)(x, torch.zeros(count)).x0)
    assert len(warned(caplog)) == 1 and "too many sizes" in warned(caplog)[0]
    assert 1 < counter.frame_count < 11  # the first sizes keep their graphs


# ---------------------------------------------------------------------------------------------------------------------
# What is left to the program


@pytest.mark.parametrize(
    ("batch", "size", "steps", "expected"),
    [
        (4, 64, 25, True),
        (64, 64, 25, True),
        (65, 64, 25, False),
        (16, 256, 250, False),
        (4, 256, 250, True),
        (4, 64, 19, False),
    ],
)
def test_small_batches_of_long_chains_are_recorded(batch: int, size: int, steps: int, expected: bool) -> None:
    assert worth_recording(batch * size * size, steps) is expected


@pytest.fixture
def plain_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Graphs are traced and run as they are; steps are recorded without a graph. Yields what counts the compiled graphs."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(execution, "Compiled", partial(Compiled, backend=counter))
    monkeypatch.setattr(execution, "Graphed", partial(Graphed, record=again))
    return counter


@pytest.mark.parametrize(("left", "compiled"), [(0, 0), (10, 0), (11, 0), (12, 1), (500, 1)])
def test_a_long_job_is_compiled_after_its_second_batch(
    left: int, compiled: int, plain_compiler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches of 100 s: twelve are the twenty minutes that pay. The first took longer, as it warmed up."""
    made = Execution(playful, compile="auto")
    cond, i = {"y": torch.tensor([0, 1, 2])}, torch.tensor([3, 4, 5])
    with caplog.at_level("INFO"):
        for k, seconds in enumerate((900.0, 100.0, 1.0, 1.0)):
            found = made.denoiser(cond, pixels=3 * 64, steps=50)(images(k), i).x0
            assert apart(found, playful(cond)(images(k), i).x0) < 1e-6
            assert plain_compiler.frame_count == (compiled if k > 1 else 0)
            made.after_batch(seconds, left + 1 - k)
    assert sum("--compile auto" in message for message in caplog.messages) == compiled


def test_graphs_of_the_uncompiled_step_are_dropped(plain_compiler: Any) -> None:
    made = Execution(playful, compile="auto", graphs="auto")
    cond, i = {"y": torch.tensor([0, 1, 2])}, torch.tensor([3, 4, 5])
    steps: list[Graphed] = []
    for k in range(4):
        found = made.denoiser(cond, pixels=192, steps=50)(images(k), i).x0
        assert apart(found, playful(cond)(images(k), i).x0) < 1e-6
        steps.append(made._way(None)[1])
        made.after_batch(1000.0, 100)
    assert steps[0] is steps[1] is not steps[2] is steps[3] and plain_compiler.frame_count == 1
    assert [len(each._recorded) for each in steps[1:3]] == [1, 1]
    made.denoiser(cond, pixels=2**18 + 1, steps=50)(images(0), i)  # a large batch
    assert [len(each._recorded) for each in steps[1:3]] == [1, 1]


def test_short_chains_are_recorded_from_a_later_batch_on(plain_compiler: Any) -> None:
    made, cond, i = Execution(playful, graphs="auto"), {"y": torch.tensor([0, 1, 2])}, torch.tensor([3, 4, 5])
    for k in range(4):
        found = made.denoiser(cond, pixels=192, steps=8)(images(k), i).x0
        assert apart(found, playful(cond)(images(k), i).x0) < 1e-6 and len(made._way(None)[1]._recorded) == (k >= 2)


def test_what_is_asked_for_is_done_at_once(plain_compiler: Any) -> None:
    made = Execution(playful, compile=True, graphs=True)
    made.denoiser({"y": torch.tensor([0, 1, 2])}, pixels=2**20, steps=1)(images(0), torch.tensor([3, 4, 5]))
    assert plain_compiler.frame_count == 1 and len(made._way(None)[1]._recorded) == 1
    made = Execution(playful)
    made.denoiser({"y": torch.tensor([0, 1, 2])}, pixels=1, steps=100)(images(0), torch.tensor([3, 4, 5]))
    assert plain_compiler.frame_count == 1 and not made._way(None)[1]._recorded
