"""Every entry of the table of guidances: what all have in common, and what each computes, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_data import exact_process, normal
from torch import Tensor

from guided_diffusion.diffusion import guidance, samplers
from guided_diffusion.diffusion.denoiser import ByLevel, Denoised, Denoiser, Spread, at_level, make_denoiser
from guided_diffusion.diffusion.guidance import GUIDANCES, Guide, chain
from guided_diffusion.diffusion.process import Process

PROCESS = exact_process()
STEPS = torch.tensor([0, 90, 500, 999])


def predictor(factor: float, calls: list[int] | None = None) -> Denoiser:
    """x0 = sin(factor x), with a variance and a share that tell it apart."""

    def denoise(x: Tensor, i: Tensor) -> Denoised:
        if calls is not None:
            calls.append(len(x))
        variance = torch.full_like(x, factor)
        return Denoised((factor * x).sin(), lambda: Spread(variance, variance.log()), share=variance)

    return denoise


def source_of(name: str, calls: list[int]) -> Any:
    def gradient(*args: Tensor) -> Tensor:
        calls.append(len(args[0]))
        return args[0].cos()

    def watched(x: Tensor, i: Tensor) -> tuple[Denoised, Tensor]:
        calls.append(len(x))
        return predictor(0.5)(x, i), 1 + normal(len(x), 4, seed=3)

    weak = predictor(0.3, calls)
    return {"classifier": gradient, "clean": gradient, "weak": weak, "watched": watched, "": None}[
        GUIDANCES[name].needs
    ]


MAKERS = [(name, form) for name, kind in GUIDANCES.items() for form in ("make", "mean") if getattr(kind, form)]


@pytest.mark.parametrize(("name", "form"), MAKERS)
def test_all_carry_the_variance_take_tensors_and_leave_out_what_is_neutral(name: str, form: str) -> None:
    kind, calls = GUIDANCES[name], []  # type: ignore[var-annotated]
    x, source = normal(4, 3, 8, 8), source_of(name, calls)

    def guided(scale: Any, denoise: Denoiser | None = None) -> Denoiser:
        return getattr(kind, form)(PROCESS, source, scale, **kind.options)(denoise or predictor(0.5))

    number = 0.9 if kind.neutral is None else 1.25
    out = guided(number)(x, STEPS)
    assert torch.equal(out.x0, predictor(0.5)(x, STEPS).x0) == (kind.neutral is None)  # sines need no correction
    assert out.variance.unique().item() == 0.5 and torch.equal(out.share, torch.full_like(x, 0.5))
    if kind.neutral is None:
        return
    # a number, a number on the device, a function of the noise level: the same
    assert torch.equal(guided(torch.tensor(number))(x, STEPS).x0, out.x0)
    if name == "epsilon_scaling":
        return
    varying = guided(guidance.interval(number, 1.0, 2.0))
    assert torch.equal(at_level(varying, 1.5)(x, STEPS).x0, out.x0)
    before = len(calls)
    assert torch.equal(at_level(varying, 2.5)(x, STEPS).x0, guided(kind.neutral)(x, STEPS).x0)
    assert torch.equal(guided(kind.neutral)(x, STEPS).x0, predictor(0.5)(x, STEPS).x0)
    assert len(calls) == before


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_denoiser_that_varies_stays_one_that_varies(name: str) -> None:
    varying = ByLevel(PROCESS, lambda sigma: predictor(sigma))
    kind = GUIDANCES[name]
    scale = 0.9 if name == "threshold" else kind.scale + 0.25
    made = [kind.make(PROCESS, source_of(name, []), scale)(each) for each in (varying, predictor(0.7))]
    assert isinstance(made[0], ByLevel)
    x = normal(4, 3, 8, 8)
    assert torch.equal(at_level(made[0], 0.7)(x, STEPS).x0, made[1](x, STEPS).x0)


@pytest.mark.parametrize("name", GUIDANCES)
def test_the_table_says_what_it_offers(name: str) -> None:
    kind = GUIDANCES[name]
    for defaults in kind.by_size.values():
        assert set(defaults) <= {"scale", *kind.options, *kind.source}
    assert [k.stage for k in GUIDANCES.values()] == sorted(k.stage for k in GUIDANCES.values())


def test_a_chain_is_sorted_and_refuses_what_excludes_each_other() -> None:
    order = []

    def noting(name: str) -> Guide:
        def apply(denoise: Denoiser) -> Denoiser:
            order.append(name)
            return denoise

        return Guide(name, apply)

    plain = predictor(1.0)
    assert chain([])(plain) is plain
    assert chain([noting("threshold"), noting("classifier"), noting("classifier_free"), noting("pag")])(plain) is plain
    assert order == ["pag", "classifier_free", "classifier", "threshold"]
    with pytest.raises(
        ValueError,
        match="classifier_free and random_label exclude each other: give one of classifier_free, random",
    ):
        chain([noting("classifier_free"), noting("random_label")])
    for pair in (("sag", "pag"), ("threshold", "clip"), ("apg", "autoguidance")):
        with pytest.raises(ValueError, match="exclude each other"):
            guidance.check_together(pair)
    with pytest.raises(ValueError, match="guidance 'cfg' is not one of epsilon_scaling, sag"):
        chain([noting("cfg")])


# --- the exact mixture -----------------------------------------------------------------------------------------------

MEANS, DEVIATIONS = normal(3, 4, seed=5), torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 1])


def scores(process: Process, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    """Of the even mixture of N(MEANS[k], DEVIATIONS[k]^2), and of the component of each label."""
    alpha_bar = process.at("alpha_bar", i, x)
    variance = alpha_bar * DEVIATIONS**2 + 1 - alpha_bar
    away = alpha_bar.sqrt()[..., None] * MEANS - x[:, None]
    log = -away.square().sum(-1) / (2 * variance) - x.shape[1] / 2 * variance.log()
    each = away / variance[..., None]
    return (log.softmax(-1)[..., None] * each).sum(1), each[torch.arange(len(x)), LABELS]


def mixture(process: Process, given_y: bool) -> Denoiser:
    def denoise(x: Tensor, i: Tensor) -> Denoised:
        score = scores(process, x, i)[given_y]
        alpha_bar = process.at("alpha_bar", i, x)
        return Denoised((x + (1 - alpha_bar) * score) / alpha_bar.sqrt(), Spread(x, x))

    return denoise


def test_the_exact_classifier_and_the_two_predictions_give_conditional_sampling() -> None:
    process = exact_process(keep="20")
    plain, given_y = mixture(process, False), mixture(process, True)

    def exact_gradient(x: Tensor, time: Tensor) -> Tensor:
        score, of_label = scores(PROCESS, x, time.long())
        return of_label - score

    x = normal(4, 4)
    final = samplers.last(samplers.ddim(given_y, x, process))
    for guided in (
        guidance.classifier(plain, process, exact_gradient),
        guidance.classifier_free(given_y, plain, 1.0),
        guidance.classifier_free(plain, given_y, 0.0),  # all of the weaker one
        guidance.classifier_free(given_y, given_y, 3.0),  # autoguidance by itself
    ):
        torch.testing.assert_close(samplers.last(samplers.ddim(guided, x, process)), final, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.dpm_solver, samplers.ancestral])
def test_outside_an_interval_neither_classifier_nor_second_network_is_called(sampler: Any) -> None:
    process = exact_process(keep="20")
    sigma = process.sqrt_recipm1_alpha_bar
    inside = int(((sigma > 0.3) & (sigma <= 5.0)).sum())
    assert 0 < inside < 20
    networks, classifiers = [], []  # type: ignore[var-annotated]

    def gradient(x: Tensor, time: Tensor) -> Tensor:
        classifiers.append(len(x))
        return torch.zeros_like(x)

    guided = chain(
        [
            Guide("classifier", lambda d: guidance.classifier(d, process, gradient, guidance.interval(2.0, 0.3, 5.0))),
            Guide(
                "autoguidance",
                lambda d: guidance.classifier_free(
                    d, predictor(0.5, networks), guidance.interval(2.0, 0.3, 5.0), process
                ),
            ),
            Guide("threshold", guidance.threshold),
        ]
    )(predictor(0.4))
    samplers.last(sampler(guided, normal(2, 4), process))
    assert len(networks) == len(classifiers) == inside


# --- gradients -------------------------------------------------------------------------------------------------------

WEIGHT = normal(5, 6, seed=7)


def test_entropy_scales_by_what_the_classifier_does_not_know() -> None:
    def net(x: Tensor, time: Tensor) -> Tensor:
        return (x.flatten(1) @ WEIGHT.T) * time[:, None]

    x, labels = normal(3, 6), torch.tensor([3, 0, 1])
    time = torch.tensor([0.0, 1.0, 400.0], dtype=torch.float64)  # uniform, something, certain
    plain, scaled = (guidance.log_prob_gradient(net, labels, entropy=entropy) for entropy in (False, True))
    p = net(x, time).softmax(-1)
    factor = math.log(5) / torch.special.entr(p).sum(-1)
    assert factor[0] == pytest.approx(1) and factor[2] > 20
    torch.testing.assert_close(scaled(x, time), plain(x, time) * factor.clamp(max=20)[:, None], rtol=1e-5, atol=1e-12)
    shifted = guidance.log_prob_gradient(lambda x, time: x @ WEIGHT.T - x.detach() @ WEIGHT.T, labels, entropy=True)
    expected = WEIGHT[labels] - WEIGHT.mean(0)  # logits of zero, a gradient that is none
    torch.testing.assert_close(shifted(x, time), expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(scaled, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, time), scaled(x, time))


def test_a_classifier_of_clean_images() -> None:
    labels, x = torch.tensor([3, 0, 1, 1]), normal(4, 6)
    gradient = guidance.clean_gradient(lambda x0: x0 @ WEIGHT.T, labels, tau1=0.8, tau2=0.25)
    plain = predictor(0.5)
    x0 = plain(x, STEPS).x0
    expected = 0.8 * WEIGHT[labels] - 0.25 * (0.25 * x0 @ WEIGHT.T).softmax(-1) @ WEIGHT
    torch.testing.assert_close(gradient(x0), expected, rtol=1e-5, atol=1e-6)

    alpha_bar = PROCESS.at("alpha_bar", STEPS, x)
    by_score = guidance.classifier_x0(plain, PROCESS, gradient, 1.5)(x, STEPS)
    shift = 1.5 * (1 - alpha_bar) / alpha_bar.sqrt() * expected
    torch.testing.assert_close(by_score.x0, x0 + shift, rtol=1e-5, atol=1e-4)

    by_mean = guidance.classifier_x0_mean(plain, PROCESS, gradient, 1.5)(x, STEPS)
    beta_tilde = PROCESS.posterior_variance.max()
    variance = 0.5 + 0.3 * beta_tilde * torch.sin(torch.pi * STEPS / 1000)[:, None]
    shift = PROCESS.at("posterior_mean_x0", STEPS, x) * (by_mean.x0 - x0)
    torch.testing.assert_close(shift, 1.5 * variance * expected, rtol=1e-5, atol=1e-6)


# --- corrections -----------------------------------------------------------------------------------------------------


def test_scaled_eps() -> None:
    x, net = normal(4, 3, 2, 2), lambda x, time: torch.sin(3 * x)
    plain = make_denoiser(net, PROCESS, variance="fixed_small", clip=False)
    alpha_bar = PROCESS.at("alpha_bar", STEPS, x)
    for scale, slope in ((1.006, 0.0), (1.0, 2e-5)):
        b = scale + slope * STEPS.double().view(-1, 1, 1, 1)
        expected = (x - (1 - alpha_bar).sqrt() * torch.sin(3 * x) / b) / alpha_bar.sqrt()
        torch.testing.assert_close(guidance.scale_eps(plain, PROCESS, scale, slope=slope)(x, STEPS).x0, expected)


def test_threshold_and_clip() -> None:
    x0 = normal(4, 3, 5, 5) * torch.tensor([0.2, 1.0, 2.0, 5.0], dtype=torch.float64).view(-1, 1, 1, 1)

    def fixed(x: Tensor, i: Tensor) -> Denoised:
        return Denoised(x, Spread(x, x))

    limit = np.maximum(1, np.quantile(x0.abs().flatten(1).numpy(), 0.9, axis=1)).reshape(-1, 1, 1, 1)
    assert limit[0] == 1 < limit[2]
    found = guidance.threshold(fixed, 0.9)(x0, STEPS).x0
    np.testing.assert_allclose(found.numpy(), np.clip(x0.numpy(), -limit, limit) / limit, atol=1e-12)
    half = guidance.threshold(fixed, 0.9)(x0.half(), STEPS).x0
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), found, rtol=0, atol=2e-3)
    assert torch.equal(guidance.clipped(fixed)(x0, STEPS).x0, x0.clamp(-1, 1))
    x0[0, 0, 0, :2] = torch.tensor([math.inf, math.nan])
    for correct in (guidance.clipped, guidance.threshold):
        out = correct(fixed)(x0, STEPS).x0
        assert out[0, 0, 0, :2].isnan().all() and out[1:].isfinite().all()
    with pytest.raises(ValueError, match="threshold=1.5"):
        guidance.threshold(fixed, 1.5)


# --- attention -------------------------------------------------------------------------------------------------------


def test_sag_by_hand() -> None:
    """The formulas of the paper on eps, with a blur written out; the attention of a layer of 2 x 4 for images of 4 x 8."""
    x, attention = (
        normal(4, 2, 4, 8),
        torch.linspace(0.3, 1.7, 32, dtype=torch.float64).view(4, 8)[:, torch.randperm(8)],
    )
    denoise, k, deviation = predictor(2.0), 0.4, 1.5
    guided = guidance.sag(denoise, PROCESS, lambda x, i: (denoise(x, i), attention), k, blur=deviation, kernel=5)

    alpha_bar = PROCESS.at("alpha_bar", STEPS, x)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    plain = denoise(x, STEPS).x0
    eps = (x - alpha * plain) / sigma
    clean = plain.clamp(-1, 1)
    weights = {d: math.exp(-0.5 * (d / deviation) ** 2) for d in range(-2, 3)}
    total = sum(weights.values())

    def mirrored(place: int, size: int) -> int:
        return -place if place < 0 else 2 * (size - 1) - place if place >= size else place

    soft = torch.zeros_like(clean)
    for row in range(4):
        for column in range(8):
            for a, weight_a in weights.items():
                for b, weight_b in weights.items():
                    value = clean[:, :, mirrored(row + a, 4), mirrored(column + b, 8)]
                    soft[:, :, row, column] += weight_a * weight_b / total**2 * value
    mask = (attention > 1).view(4, 1, 2, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    worse = alpha * torch.where(mask, soft, clean) + sigma * eps
    eps_worse = (worse - alpha * denoise(worse, STEPS).x0) / sigma
    eps = eps_worse + (1 + k) * (eps - eps_worse)
    torch.testing.assert_close(guided(x, STEPS).x0, (x - sigma * eps) / alpha, rtol=1e-9, atol=1e-9)


def test_a_watched_network_is_read_as_a_denoiser() -> None:
    def net(x: Tensor, time: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y.view(-1, 1), y.view(-1, 1).expand(-1, 2)

    def make(net: Any) -> Denoiser:
        return make_denoiser(net, PROCESS, {"y": LABELS}, variance="fixed_small", predicts="x0", clip=False)

    x = normal(4, 4)
    denoised, attention = guidance.watching(make, net)(x, STEPS)
    assert torch.equal(denoised.x0, x * LABELS.view(-1, 1)) and torch.equal(attention[:, 0], LABELS)
