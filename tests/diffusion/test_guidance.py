"""Guidance against posteriors that are known, and what it may and may not do to gradients."""

from __future__ import annotations

import pytest
import torch
from gaussian_data import exact_process, ideal, normal

from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import Denoised, Spread, at_level, make_denoiser
from guided_diffusion.diffusion.process import make_process, posterior_mean
from guided_diffusion.diffusion.schedules import named_betas

FULL = exact_process()
UNIT = (torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))


Y, R = 1.5, 0.5  # data N(0, 1), observed as y = x0 + noise of variance r: the posterior is N(y / (1 + r), r / (1 + r))


def gradient_of_observation(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    alpha_bar = FULL.at("alpha_bar", time.long(), x)
    return alpha_bar.sqrt() * (Y - alpha_bar.sqrt() * x) / (R + 1 - alpha_bar)


def test_guided_score_samples_the_posterior() -> None:
    process = exact_process(keep="250")
    guided = guidance.classifier(ideal(process, *UNIT), process, gradient_of_observation)
    x = samplers.last(samplers.dpm_solver(guided, normal(4000, 1), process, num_steps=40))
    assert abs(x.mean().item() - Y / (1 + R)) < 0.03
    assert abs(x.var().item() - R / (1 + R)) < 0.03


def no_noise(like: torch.Tensor, step: int, draw: int = 0) -> torch.Tensor:
    return torch.zeros_like(like)


def test_guided_mean_reaches_the_posterior_as_steps_grow_smaller() -> None:
    """The chain is affine, so noise-free from 0 it is the mean of the samples; the shift is right to first order in the step."""
    errors = []
    for keep in ("250", "1000"):
        process = exact_process(keep=keep)
        guided = guidance.classifier_mean(ideal(process, *UNIT), process, gradient_of_observation)
        steps = samplers.ancestral(
            guided, torch.zeros(1, 1, dtype=torch.float64), process, noise=lambda x, step, draw=0: torch.zeros_like(x)
        )
        errors.append(abs(samplers.last(steps).item() - Y / (1 + R)))
    assert errors[1] < 0.015 and 3 < errors[0] / errors[1] < 5


def test_both_forms_agree_for_small_steps() -> None:
    """They shift the mean of a step by beta / sqrt(1 - beta) and by the variance: the same to first order in beta."""
    x, gradient = normal(3, 4), normal(3, 4, seed=1)
    for beta in (1e-2, 1e-4):
        process = make_process([beta] * 5).to(dtype=torch.float64)
        i = torch.tensor([1, 2, 4])

        def plain(x: torch.Tensor, i: torch.Tensor, process=process, beta=beta) -> Denoised:
            log_variance = process.at("fixed_large_log_variance", i, x)
            return Denoised(0.3 * x, Spread(log_variance.exp(), log_variance))

        before = posterior_mean(process, 0.3 * x, x, i)
        shifts = [
            posterior_mean(process, guide(plain, process, lambda x, time: gradient, 2.0)(x, i).x0, x, i) - before
            for guide in (guidance.classifier_mean, guidance.classifier)
        ]
        torch.testing.assert_close(shifts[0], 2 * beta * gradient)
        torch.testing.assert_close(shifts[1], 2 * beta / (1 - beta) ** 0.5 * gradient)


class Linear(torch.nn.Module):
    """A classifier whose gradient is known: logits W x + time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.T + time[:, None] * torch.arange(5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_of_a_classifier(frozen: bool, mode) -> None:
    net, labels = Linear().requires_grad_(not frozen), torch.tensor([3, 0])
    x, time = torch.randn(2, 3, 2, 2), torch.tensor([0.1, 0.2])
    expected = net.weight[labels] - net(x, time).softmax(-1) @ net.weight
    with mode():
        gradient = guidance.log_prob_gradient(net, labels)(x.clone(), time)
    torch.testing.assert_close(gradient, expected.view_as(x).detach())
    assert not gradient.requires_grad and net.weight.grad is None


def test_a_classifier_is_told_the_time_and_weights_stay_clean() -> None:
    process = make_process(named_betas("linear", 100), time=torch.arange(100) * 10)
    heard = []
    net = Linear()

    def listening(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        heard.append(time)
        return net(x, time)

    denoise = make_denoiser(lambda x, time: x, process, variance="fixed_large")
    guided = guidance.classifier(denoise, process, guidance.log_prob_gradient(listening, torch.tensor([1, 2])))
    samplers.last(samplers.ddim(guided, torch.randn(2, 3, 2, 2), process))
    assert torch.equal(heard[0], torch.tensor([990.0, 990.0])) and net.weight.grad is None
    guided(torch.randn(2, 3, 2, 2), torch.tensor([1.5, 3.0]))
    assert torch.equal(heard[-1], torch.tensor([15.0, 30.0]))


def test_classifier_free() -> None:
    process = exact_process(keep="50")
    one, two = (ideal(process, torch.full((1,), m, dtype=torch.float64), UNIT[1]) for m in (0.0, 1.0))
    x, i = normal(4, 1), torch.tensor([0, 10, 30, 49])
    for scale, expected in ((0.0, one), (1.0, two)):
        out = guidance.classifier_free(two, one, scale)(x, i)
        torch.testing.assert_close(out.x0, expected(x, i).x0)
        assert torch.equal(out.log_variance, two(x, i).log_variance)
    assert (
        abs(
            samplers.last(samplers.dpm_solver(guidance.classifier_free(two, one, 3.0), normal(4000, 1), process)).mean()
            - 3
        )
        < 0.05
    )


def test_interval() -> None:
    process = exact_process()
    one, two = (ideal(process, torch.full((1,), m, dtype=torch.float64), UNIT[1]) for m in (0.0, 1.0))
    sigma = process.sqrt_recipm1_alpha_bar
    called = []

    def counted(x: torch.Tensor, i: torch.Tensor) -> Denoised:
        called.append(int(i[0]))
        return one(x, i)

    scale = guidance.interval(3.0, sigma[300].item(), sigma[600].item())
    limited = guidance.classifier_free(two, counted, scale, process)
    full = guidance.classifier_free(two, one, 3.0)
    for step in (300, 301, 600, 601):
        i = torch.full((4,), step)
        x, inside = normal(4, 1), step in (301, 600)
        out = at_level(limited, sigma[step].item())(x, i)
        assert torch.equal(out.x0, (full if inside else two)(x, i).x0) and out.log_variance.shape == (4, 1)
        assert torch.equal(limited(x, i).x0, out.x0)  # called as it is, it reads the level itself
    assert called == [301, 301, 600, 600]
    assert repr(guidance.interval(2.0, 0.5, 5.0)) == "Interval(value=2.0, low=0.5, high=5.0)"
    with pytest.raises(ValueError, match="low < high"):
        guidance.interval(2.0, 2.0, 1.0)
    with pytest.raises(ValueError, match="give process="):
        guidance.classifier_free(two, one, scale)
