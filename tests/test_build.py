"""Configs to objects, and files back to objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import guided_diffusion as gd
from guided_diffusion import build
from guided_diffusion.config import DiffusionConfig, ModelConfig, RunConfig, SuperResConfig
from guided_diffusion.data.listing import Records, split_records
from guided_diffusion.data.loader import Batch
from guided_diffusion.runtime.devices import choose_precision
from guided_diffusion.runtime.streams import Streams
from guided_diffusion.sampling.guiding import classifier
from guided_diffusion.sampling.pipeline import make_pipeline
from guided_diffusion.training.losses import classifier_loss, diffusion_loss
from guided_diffusion.weights.load import Loaded, check_pair

SMALL = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}
CLASSIFIER = {"classifier_width": 32, "classifier_depth": 1, "classifier_num_head_channels": 32, "num_classes": 4}


def loaded(kind: str = "diffusion", **flags: Any) -> Loaded:
    config = RunConfig.from_flags(kind, {"image_size": 8, **(CLASSIFIER if kind == "classifier" else SMALL), **flags})
    net = build.build_network(config.model, config.diffusion, seed=0).eval().requires_grad_(False)
    with torch.no_grad():  # the last layers start at zero; give them something to say
        for number, p in enumerate(net.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    return Loaded(net, build.build_process(config.diffusion), config, "here.pt", tuple("abcd"), step=3)


def test_first_weights_are_a_function_of_the_seed_and_leave_the_generator_alone() -> None:
    model = ModelConfig(**SMALL)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = build.build_network(model, seed=5)
    assert torch.rand(1) == expected
    two, other = build.build_network(model, seed=5), build.build_network(model, seed=6)
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(("kind", "flags"), [("diffusion", SMALL), ("classifier", {"image_size": 8, **CLASSIFIER}),
                                             ("super_resolution", {**SMALL, "large_size": 8, "small_size": 4})])  # fmt: skip
def test_networks_are_made_where_they_are_used(kind: str, flags: dict[str, Any]) -> None:
    """Also those to be filled, whose tensors a file can all replace."""
    config = RunConfig.from_flags(kind, flags)
    drawn = build.build_network(config.model, seed=5).state_dict()
    again = build.build_network(config.model, seed=5, device="cpu").state_dict()
    assert all(torch.equal(value, drawn[name]) for name, value in again.items())
    for net in (build.build_network(config.model, device="meta"), build.build_empty(config.model)):
        assert all(value.is_meta for value in net.state_dict().values())
    state = torch.random.get_rng_state()
    empty = build.build_empty(config.model, device="cpu")
    assert torch.equal(state, torch.random.get_rng_state())
    assert {name for name, _ in (*empty.named_parameters(), *empty.named_buffers())} == set(drawn)
    empty.load_state_dict(drawn)
    assert all(torch.equal(value, drawn[name]) for name, value in empty.state_dict().items())


def test_another_architecture_is_built_on_the_cpu_and_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(torch.nn.Module):
        def __init__(self, **shape: Any) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.from_numpy(np.ones(2)) * torch.ones(2))

    monkeypatch.setitem(gd.ARCHITECTURES, "plain", Net)
    model = ModelConfig(architecture="plain")
    assert build.build_network(model, device="meta").weight.is_meta
    assert not build.build_empty(model).weight.is_meta  # its buffers may be in no file


@pytest.mark.gpu
def test_a_gpu_draws_the_first_weights_itself() -> None:
    model = ModelConfig(**SMALL)
    states = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    nets = [build.build_network(model, seed=seed, device="cuda") for seed in (5, 5, 6)]
    assert torch.equal(states[0], torch.random.get_rng_state()) and torch.equal(states[1], torch.cuda.get_rng_state())
    one, two, other = (list(net.parameters()) for net in nets)
    assert all(p.is_cuda for p in one) and all(torch.equal(a, b) for a, b in zip(one, two))
    assert not all(torch.equal(a, b) for a, b in zip(one, other))
    on_cpu = build.build_network(model, seed=5).parameters()
    for a, b in zip(one, on_cpu):  # the same distribution
        assert a.numel() < 1000 or a.std().item() == pytest.approx(b.std().item(), rel=0.2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_channels_reach_both_ends(channels: int) -> None:
    net = build.build_model(ModelConfig(**SMALL, image_channels=channels), DiffusionConfig(learn_sigma=True))
    assert net(torch.zeros(1, channels, 8, 8), torch.zeros(1)).shape == (1, 2 * channels, 8, 8)
    small = {**SMALL, "large_size": 8, "small_size": 4, "image_channels": channels}
    up = build.build_model(SuperResConfig.from_flags(small))
    x = torch.zeros(1, channels, 8, 8)
    assert up(x, torch.zeros(1), low_res=torch.zeros(1, channels, 4, 4)).shape == x.shape


def test_process_follows_the_flags() -> None:
    process = build.build_process(DiffusionConfig(diffusion_steps=100, timestep_respacing="10", rescale_timesteps=True))
    assert len(process) == 10
    assert process.time[0] == 0 and process.time[-1] == pytest.approx(990)
    assert len(build.build_process(DiffusionConfig(timestep_respacing="10"), respacing="")) == 1000
    for alone in ("1", "0,1", "1,0"):
        with pytest.raises(ValueError, match=f"--timestep_respacing is '{alone}', which keeps step .* alone"):
            build.build_process(DiffusionConfig(timestep_respacing=alone))
    with pytest.raises(ValueError, match="--noise_schedule is 'sigmoid'; it must be one of linear, cosine"):
        build.build_process(DiffusionConfig(noise_schedule="sigmoid"))


CPU = torch.device("cpu")


def batch(count: int = 6, channels: int = 3) -> Batch:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (count, 8, 8, channels), dtype=np.uint8))
    return Batch(images, torch.arange(count) % 4, torch.arange(count), 0)


@pytest.mark.parametrize(
    "flags",
    [{}, {"learn_sigma": True}, {"predict_xstart": True}, {"predict": "v", "min_snr_gamma": 5.0}, {"use_kl": True}],
)
def test_generator_loss_is_per_example_and_independent_of_the_microbatch(flags: dict[str, Any]) -> None:
    model = loaded(class_cond=True, num_classes=4, **flags)
    loss = diffusion_loss(model.process, build.build_timesteps("uniform", 1000), **build.loss_options(model.config))
    whole = loss(model.net, batch().to_device(CPU), Streams(0, ids=range(6)))
    half = loss(model.net, Batch(*(t[3:] for t in batch()[:3]), 0).to_device(CPU), Streams(0, ids=range(3, 6)))
    assert whole.loss.shape == (6,) and whole.num_steps == 1000
    torch.testing.assert_close(whole.loss[3:], half.loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(whole.i[3:], half.i)
    assert set(whole.terms) >= ({"loss"} if flags.get("use_kl") else {"loss", "mse"})


def test_super_resolution_loss_sees_the_small_image() -> None:
    config = RunConfig.from_flags("super_resolution", {**SMALL, "large_size": 8, "small_size": 4})
    seen = {}

    def net(x: torch.Tensor, time: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
        seen["low_res"] = low_res
        return x

    process = build.build_process(config.diffusion)
    diffusion_loss(process, build.build_timesteps("uniform", 1000), **build.loss_options(config))(
        net, batch()._replace(low_res_size=4).to_device(CPU), Streams(0, ids=range(6))
    )
    expected = batch().images.float().reshape(6, 4, 2, 4, 2, 3).mean(dim=(2, 4)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(seen["low_res"], expected, rtol=0, atol=1e-5)


def test_classifier_loss_has_the_columns_of_2021_and_right_accuracies() -> None:
    process = build.build_process(DiffusionConfig())
    ranks = torch.tensor([0, 1, 4, 5, 0, 9])  # the place of the true class in the answer

    def net(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        others, own = -torch.arange(9.0), 0.5 - ranks  # the true class comes after so many others
        places = (torch.arange(6) % 4).tolist()
        rows = [torch.cat([others[:k], own[n, None], others[k:]]) for n, k in enumerate(places)]
        return torch.stack(rows)

    found = classifier_loss(process, build.build_timesteps("uniform", 1000), prefix="val")(
        net, batch().to_device(CPU), Streams(0, ids=range(6))
    )
    assert set(found.terms) == {"val_loss", "val_acc@1", "val_acc@5"}
    assert found.terms["val_acc@1"].tolist() == [1, 0, 0, 0, 1, 0]
    assert found.terms["val_acc@5"].tolist() == [1, 1, 1, 0, 1, 0]


def test_classifier_without_noise_sees_the_image_at_time_zero() -> None:
    def net(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        assert torch.equal(time, torch.zeros(6))
        torch.testing.assert_close(x, batch().images.permute(0, 3, 1, 2) / 127.5 - 1)
        return torch.zeros(6, 4)

    classifier_loss(build.build_process(DiffusionConfig()), build.build_timesteps("uniform", 1000), noised=False)(
        net, batch().to_device(CPU), Streams(0, ids=range(6))
    )


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        gd.load(str(tmp_path / "nothing.pt"))
    with pytest.raises(ValueError, match="holds no save"):
        gd.load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 16}, r"image size \(8, 8\) and \(16, 16\)"),
        ({"num_classes": 5}, "number of classes 4 and 5"),
        ({"noise_schedule": "cosine"}, "noise_schedule linear and cosine"),
    ],
)
def test_a_classifier_of_another_world_is_refused(changes: dict[str, Any], words: str) -> None:
    model = loaded(class_cond=True, num_classes=4)
    check_pair(model, loaded("classifier"))
    with pytest.raises(ValueError, match=words):
        check_pair(model, loaded("classifier", **changes))


@pytest.mark.parametrize("method", ["ancestral", "ddim", "heun", "dpm_solver"])
def test_every_sampler_runs_guided_and_the_guide_pulls(method: str) -> None:
    """The ideal network of standard normal data; a classifier that takes bright images for class 1, dark ones for class 0."""
    config = RunConfig.from_flags("diffusion", {**SMALL, "timestep_respacing": "50", "sigma_small": True})
    process, every = build.build_process(config.diffusion), build.build_process(config.diffusion, respacing="")

    class Ideal(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return every.at("sqrt_one_minus_alpha_bar", time, x) * x

    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return torch.stack([-x.sum(dim=(1, 2, 3)), x.sum(dim=(1, 2, 3))], dim=1) / 8

    model = Loaded(Ideal(), process, config, "")
    critic = Loaded(Bright(), process, loaded("classifier").config, "")
    noise, cond = Streams(1, ids=[0, 0]).normal((3, 8, 8)), {"y": torch.tensor([0, 1])}

    def means(scale: float) -> list[float]:
        source = Streams(2, ids=[0, 0])
        guidance = classifier(critic, scale=scale)
        sample = make_pipeline(model, guidance=guidance, sampler=method, clip=False)
        return sample(noise, source.noise, cond).mean(dim=(1, 2, 3)).tolist()

    (dark, bright), (same, also_same) = means(3.0), means(0.0)
    assert same == pytest.approx(also_same, abs=1e-5)
    assert dark < same < bright and bright - dark > 0.05


def test_held_out_records_are_a_fixed_part() -> None:
    records = Records(tuple(f"{k}.png" for k in range(50)), np.arange(50) % 2, ("a", "b"))
    train, held = split_records(records, 0.2, seed=0)
    assert len(held) == 10 and sorted(train.paths + held.paths) == sorted(records.paths)
    assert split_records(records, 0.2, seed=0)[1].paths == held.paths != split_records(records, 0.2, seed=1)[1].paths


def test_precision_follows_flags_and_device(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "guided_diffusion")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_precision("", False, gpu) == "fp32"
    assert choose_precision("", True, gpu) == "fp16"
    assert choose_precision("bf16", True, gpu) == "bf16"
    assert choose_precision("", True, cpu) == "fp32" and "30 times slower" in caplog.text
