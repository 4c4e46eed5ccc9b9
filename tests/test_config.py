"""Configurations: round trips, refusals that name the flag, differences in words."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion import config as c
from guided_diffusion.runtime import storage

KINDS = tuple(c.NETWORKS)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_possible_and_survive_json(kind: str) -> None:
    run = c.RunConfig.from_flags(kind, {})
    assert run.kind == kind
    assert c.RunConfig.from_dict(kind, json.loads(storage.to_json(run.to_dict()))) == run
    assert c.RunConfig.from_flags(kind, c.flatten(run.to_dict())) == run
    assert c.flatten({"format": 1, "config": run.to_dict()}) == c.flatten(run.to_dict())


@given(
    size=st.sampled_from([16, 32, 64]),
    channels=st.integers(1, 512),
    lr=st.floats(0, 1, allow_nan=False),
    dropout=st.floats(0, 1),
    flag=st.booleans(),
    respacing=st.sampled_from(["", "250", "ddim25", "90,60,60,20,20"]),
)
def test_any_possible_values_survive_json(
    size: int, channels: int, lr: float, dropout: float, flag: bool, respacing: str
) -> None:
    flags = {"image_size": size, "num_channels": channels, "lr": lr, "dropout": dropout, "learn_sigma": flag}
    run = c.RunConfig.from_flags("diffusion", {**flags, "timestep_respacing": respacing})
    assert c.RunConfig.from_dict("diffusion", json.loads(storage.to_json(run.to_dict()))) == run


def test_no_flag_has_two_meanings() -> None:
    """Sections are flattened into one set of flags, so a name may occur in one section of a run only."""
    for kind in KINDS:
        names = [name for section in c.RunConfig.sections(kind).values() for name in section.names()]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "config", [*c.NETWORKS.values(), c.DiffusionConfig, c.DataConfig, c.TrainConfig, c.SampleConfig]
)
def test_every_field_explains_itself(config: Any) -> None:
    assert all(f.metadata.get("help") for f in dataclasses.fields(config))


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        (c.ModelConfig, {"image_size": 0}, "--image_size is 0; it must be at least 1"),
        (c.ModelConfig, {"image_size": 66}, "cannot be halved 3 times"),
        (c.ModelConfig, {"image_size": 4}, "--channel_mult: give one"),
        (c.ModelConfig, {"channel_mult": "1,x"}, "--channel_mult is '1,x'"),
        (c.ModelConfig, {"channel_mult": "1,0"}, "larger than 0"),
        (c.ModelConfig, {"attention_resolutions": "16,0"}, "--attention_resolutions is '16,0'"),
        (c.ModelConfig, {"dropout": 1.5}, "--dropout is 1.5; it must be at least 0 and at most 1"),
        (c.ModelConfig, {"class_cond": "yes"}, "--class_cond is 'yes'; it must be True or False"),
        (c.ModelConfig, {"num_channels": 1.5}, "--num_channels is 1.5; it must be a whole number"),
        (c.SuperResConfig, {"small_size": 300}, "--small_size is 300"),
        (c.ClassifierConfig, {"classifier_pool": "max"}, "--classifier_pool is 'max'; it must be one of 'attention'"),
        (c.DiffusionConfig, {"predict": "score"}, "--predict is 'score'"),
        (c.DiffusionConfig, {"predict": "v", "predict_xstart": True}, "give one of the two"),
        (c.TrainConfig, {"ema_rate": "0.9,1.0"}, "--ema_rate is '0.9,1.0'"),
        (c.TrainConfig, {"precision": "fp8"}, "--precision is 'fp8'"),
        (c.TrainConfig, {"lr": float("nan")}, "--lr is nan"),
    ],
)
def test_impossible_values_are_refused_by_name(config: Any, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as told:
        config.from_flags(flags)
    assert words in str(told.value)


def test_unknown_keys_and_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="ModelConfig has no field widht"):
        c.ModelConfig.from_dict({"widht": 3})
    with pytest.raises(ValueError, match="--kind is 'gan'"):
        c.RunConfig.from_flags("gan", {})


def test_default_multipliers_are_the_papers() -> None:
    """Table 11 of the paper; the upsampler to 512 has six levels."""
    assert c.ModelConfig(image_size=512).multipliers == (0.5, 1, 1, 2, 2, 4, 4)
    assert c.ModelConfig(image_size=128).multipliers == (1, 1, 2, 3, 4)
    assert c.SuperResConfig(large_size=512).multipliers == (1, 1, 2, 2, 4, 4)
    assert c.ModelConfig(image_size=64, attention_resolutions="32, 16, 8").attention_downsamplings == (2, 4, 8)
    assert c.numbers((1, 0.5), "channel_mult") == c.numbers("1, 0.5", "channel_mult") == (1, 0.5)


def test_reading_and_loss_follow_the_flags() -> None:
    assert c.DiffusionConfig().reading == {"predicts": "eps", "variance": "fixed_large"}
    learned = c.DiffusionConfig(learn_sigma=True, predict_xstart=True)
    assert learned.reading == {"predicts": "x0", "variance": "learned_range"}
    assert c.DiffusionConfig(sigma_small=True, predict="v").reading == {"predicts": "v", "variance": "fixed_small"}
    assert c.DiffusionConfig(use_kl=True, rescale_learned_sigmas=True).loss == "rescaled_kl"
    assert c.DiffusionConfig(rescale_learned_sigmas=True).loss == "rescaled_mse"


def test_the_end_of_training() -> None:
    assert c.TrainConfig().last_step == 0
    assert c.TrainConfig(lr_anneal_steps=5).last_step == 5
    assert c.ClassifierTrainConfig().last_step == 150000
    assert c.ClassifierTrainConfig(max_steps=3).last_step == 3


def test_role_and_architecture_are_apart() -> None:
    words = "depth=6, rate=1e-3,norm=layer,bias=False"
    own = c.ModelConfig(architecture="dit", arch_options=words, image_size=30).validate()
    assert own.options == {"depth": 6, "rate": 1e-3, "norm": "layer", "bias": False}
    assert c.ModelConfig.from_dict(own.to_dict()) == own
    critic = c.ClassifierConfig(classifier_architecture="vit", classifier_arch_options="depth=2").validate()
    assert critic.architecture == "vit" and critic.options == {"depth": 2}
    # Files of U-Nets have no word for it, as before there was a choice.
    assert not {"architecture", "arch_options"} & set(c.ModelConfig().to_dict())
    assert not [name for name in c.ClassifierConfig().to_dict() if "arch" in name]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (c.ModelConfig(architecture="dit", num_channels=64), "--architecture is 'dit', but --num_channels 64 is for the U-Net"),
        (c.ModelConfig(arch_options="depth=6"), "--arch_options is 'depth=6', but the U-Net has flags of its own"),
        (c.ModelConfig(architecture="dit", arch_options="depth"), "--arch_options is 'depth'; it must be names with values"),
        (c.ClassifierConfig(classifier_architecture="vit", classifier_depth=3), "--classifier_depth 3 is for the U-Net"),
    ],
)  # fmt: skip
def test_flags_of_another_architecture_are_refused(config: c.Section, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.validate()


def test_the_weight_of_the_loss_is_said_once() -> None:
    for flags, words in (
        ({"use_kl": True, "min_snr_gamma": 5.0}, "--min_snr_gamma 5 .* --use_kl True"),
        ({"use_kl": True, "loss_weight": "min_snr"}, "--loss_weight min_snr weighs the mean squared error"),
        ({"min_snr_gamma": 5.0, "loss_weight": "p2"}, "--min_snr_gamma 5 is for --loss_weight min_snr, not p2"),
    ):
        with pytest.raises(ValueError, match=words):
            c.RunConfig.from_flags("diffusion", flags)
