"""Losses: gradients against finite differences, equivalence of predictions, which part trains what."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from gaussian_data import exact_process, normal

from guided_diffusion.diffusion import process as p
from guided_diffusion.diffusion.denoiser import PREDICTS, VARIANCES, make_denoiser
from guided_diffusion.diffusion.objectives import LOSSES, training_losses
from guided_diffusion.diffusion.weighting import WEIGHTS

PROCESS = exact_process(keep="10")
I = torch.tensor([0, 4, 9])  # noqa: E741
X0 = (normal(3, 2, 2, 2).tanh() * 127.5).round() / 127.5
NOISE = normal(3, 2, 2, 2, seed=1)


def net_of(weight: torch.Tensor, variance: str):
    """A network of a few weights: channel mixing, twice as wide where the variance is learned."""

    def net(x: torch.Tensor, time: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
        wide = weight if variance.startswith("learned") else weight[:2]
        return torch.einsum("oc,bchw->bohw", wide, x).tanh() + 1e-3 * time.view(-1, 1, 1, 1) + bias

    return net


@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_finite_differences(predicts: str, variance: str, loss: str) -> None:
    """Of "mse", and of the whole bound; the hybrid's own gradient is cut on purpose, see below."""
    key = "mse" if "mse" in loss else "loss"

    def value(weight: torch.Tensor) -> torch.Tensor:
        net = net_of(weight, variance)
        return training_losses(net, PROCESS, X0, I, NOISE, predicts=predicts, variance=variance, loss=loss)[key]

    weight = 0.3 * normal(4, 2, seed=5)
    assert torch.autograd.gradcheck(value, weight.requires_grad_(), eps=1e-7, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["mse", "rescaled_mse"])
def test_the_bound_trains_the_variance_alone(loss: str) -> None:
    weight = 0.3 * normal(4, 2, seed=5)
    weight.requires_grad_()
    net = net_of(weight, "learned_range")
    terms = training_losses(net, PROCESS, X0, I, NOISE, loss=loss)
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), weight, retain_graph=True)
    assert torch.equal(gradient[:2], torch.zeros(2, 2, dtype=torch.float64)) and gradient[2:].abs().min() > 0
    (gradient,) = torch.autograd.grad(terms["mse"].sum(), weight, retain_graph=True)
    assert torch.equal(gradient[2:], torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


def test_rescaling() -> None:
    net = net_of(0.3 * normal(4, 2, seed=5), "learned_range")
    terms = {loss: training_losses(net, PROCESS, X0, I, NOISE, loss=loss) for loss in LOSSES}
    torch.testing.assert_close(terms["rescaled_kl"]["loss"], 10 * terms["kl"]["loss"])
    torch.testing.assert_close(terms["rescaled_mse"]["vb"], terms["mse"]["vb"] / 100)
    torch.testing.assert_close(terms["mse"]["vb"], terms["kl"]["loss"])


def reader_of(predicts: str):
    """The same belief about x0, spoken in different ways."""

    def net(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x0 = 0.4 * x.tanh()
        eps = p.eps_from_x0(PROCESS, x, I, x0)
        return {
            "x0": x0,
            "eps": eps,
            "v": p.v_from_x0(PROCESS, x0, I, eps),
            "previous_x": p.posterior_mean(PROCESS, x0, x, I),
        }[predicts]

    return net


def test_one_belief_in_any_words_denoises_alike() -> None:
    x = p.add_noise(PROCESS, X0, I, NOISE)
    for predicts in PREDICTS:
        denoised = make_denoiser(reader_of(predicts), PROCESS, predicts=predicts, variance="fixed_small", clip=False)(
            x, I
        )
        torch.testing.assert_close(denoised.x0, 0.4 * x.tanh())
        kl = training_losses(
            reader_of(predicts), PROCESS, X0, I, NOISE, predicts=predicts, variance="fixed_small", loss="kl"
        )
        reference = training_losses(
            reader_of("x0"), PROCESS, X0, I, NOISE, predicts="x0", variance="fixed_small", loss="kl"
        )
        torch.testing.assert_close(kl["loss"], reference["loss"])


@pytest.mark.parametrize("gamma", [0.01, 5.0])
def test_min_snr_weighs_every_prediction_alike(gamma: float) -> None:
    """It is defined on the error of x0; whatever the network predicts, the weighted loss is min(SNR, gamma) |x0 error|^2."""
    x = p.add_noise(PROCESS, X0, I, NOISE)
    snr = PROCESS.alpha_bar[I] / (1 - PROCESS.alpha_bar[I])
    expected = snr.clamp(max=gamma) * ((0.4 * x.tanh() - X0) ** 2).mean(dim=(1, 2, 3))
    for predicts in ("eps", "x0", "v"):
        options = {"predicts": predicts, "variance": "fixed_small", "weight": partial(WEIGHTS["min_snr"], gamma=gamma)}
        terms = training_losses(reader_of(predicts), PROCESS, X0, I, NOISE, **options)
        torch.testing.assert_close(terms["loss"], expected)
        plain = training_losses(reader_of(predicts), PROCESS, X0, I, NOISE, predicts=predicts, variance="fixed_small")
        assert torch.equal(terms["mse"], plain["loss"])


def test_p2_weighs_every_prediction_alike() -> None:
    """It is defined on the error of eps: 1 / (1 + SNR) = 1 - alpha_bar; with other k and gamma, (k + SNR)^-gamma."""
    x = p.add_noise(PROCESS, X0, I, NOISE)
    alpha_bar = PROCESS.alpha_bar[I]
    snr = alpha_bar / (1 - alpha_bar)
    error = snr * ((0.4 * x.tanh() - X0) ** 2).mean(dim=(1, 2, 3))
    for predicts in ("eps", "x0", "v"):
        for weight, expected in (
            (WEIGHTS["p2"], (1 - alpha_bar) * error),
            (partial(WEIGHTS["p2"], k=0.5, gamma=2.0), error / (0.5 + snr) ** 2),
            (partial(WEIGHTS["p2"], gamma=0.0), error),  # the simple loss
        ):
            options = {"predicts": predicts, "variance": "fixed_small", "weight": weight}
            terms = training_losses(reader_of(predicts), PROCESS, X0, I, NOISE, **options)
            torch.testing.assert_close(terms["loss"], expected)


def test_conditions_reach_the_network() -> None:
    weight = 0.3 * normal(4, 2, seed=5)
    one, other = (
        training_losses(net_of(weight, "fixed_small"), PROCESS, X0, I, NOISE, {"bias": bias}, variance="fixed_small")[
            "loss"
        ]
        for bias in (0.0, 1.0)
    )
    assert (one != other).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": "l1"}, "loss='l1' is not one of mse"),
        ({"predicts": "noise"}, "predicts='noise' is not one of eps"),
        ({"variance": "none"}, "variance='none' is not one of"),
        ({"weight": WEIGHTS["min_snr"], "loss": "kl"}, "loss='kl'"),
        ({"weight": WEIGHTS["min_snr"], "predicts": "previous_x"}, "previous_x"),
        ({"variance": "fixed_small"}, "4 channels for an input of 2.*should return 2.*learn_sigma"),
    ],
)
def test_errors_name_value_and_remedy(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        training_losses(net_of(normal(4, 2), "learned"), PROCESS, X0, I, NOISE, **options)


def test_learned_range_lies_between_the_fixed_ones() -> None:
    x = normal(3, 2, 2, 2)
    logs = {}
    for name, raw in (("low", -1.0), ("high", 1.0), ("middle", 0.0)):
        denoise = make_denoiser(lambda x, time, raw=raw: torch.cat([x, torch.full_like(x, raw)], 1), PROCESS)
        logs[name] = denoise(x, I).log_variance
    torch.testing.assert_close(logs["low"], PROCESS.at("posterior_log_variance", I, x).expand_as(x))
    torch.testing.assert_close(logs["high"], PROCESS.at("log_beta", I, x).expand_as(x))
    torch.testing.assert_close(logs["middle"], (logs["low"] + logs["high"]) / 2)
    learned = make_denoiser(
        lambda x, time: torch.cat([x, torch.full_like(x, math.log(0.3))], 1), PROCESS, variance="learned"
    )
    torch.testing.assert_close(learned(x, I).variance, torch.full_like(x, 0.3))
