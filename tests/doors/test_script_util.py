"""The factories of 2021."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import numpy as np
import pytest
import torch

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import script_util as su

SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "8", "channel_mult": "1,2"}


def flags(**changes: Any) -> dict[str, Any]:
    return {**su.model_and_diffusion_defaults(), **SMALL, **changes}


def test_the_usual_call_builds_a_pair() -> None:
    model, diffusion = su.create_model_and_diffusion(
        **flags(learn_sigma=True, class_cond=True, timestep_respacing="10")
    )
    assert isinstance(model, su.UNetModel) and isinstance(diffusion, su.SpacedDiffusion)
    assert diffusion.num_timesteps == 10 and diffusion.original_num_steps == 1000
    assert model.label_emb.weight.shape[0] == 1000
    y = torch.zeros(2, dtype=torch.long)
    assert model(torch.zeros(2, 3, 16, 16), torch.zeros(2), y).shape == (2, 6, 16, 16)


def test_the_call_through_inspection_and_flags() -> None:
    parser = argparse.ArgumentParser()
    su.add_dict_to_argparser(parser, su.model_and_diffusion_defaults())
    args = parser.parse_args(
        ["--image_size", "16", "--num_channels", "32", "--channel_mult", "1,2", "--num_res_blocks", "1"]
    )
    names = inspect.getfullargspec(su.create_model_and_diffusion)[0]
    assert set(names) == set(su.model_and_diffusion_defaults())
    su.create_model_and_diffusion(**su.args_to_dict(args, names))


def test_types_of_flags_are_those_of_their_defaults() -> None:
    parser = argparse.ArgumentParser()
    su.add_dict_to_argparser(parser, {"a": 1, "b": False, "c": None, "d": "x", "e": 0.5})
    args = parser.parse_args(["--a", "2", "--b", "y", "--c", "3"])
    assert su.args_to_dict(args, "abcde") == {"a": 2, "b": True, "c": "3", "d": "x", "e": 0.5}
    with pytest.raises(argparse.ArgumentTypeError):
        su.str2bool("perhaps")


def test_num_classes_of_the_module_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(su, "NUM_CLASSES", 7)
    assert su.create_model(16, 32, 1, channel_mult="1,2", class_cond=True).num_classes == 7
    assert su.create_model(16, 32, 1, channel_mult="1,2", class_cond=True, num_classes=3).num_classes == 3


def test_the_schedule_is_looked_up_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gd, "get_named_beta_schedule", lambda name, steps: np.full(steps, 0.01))
    assert su.create_gaussian_diffusion(steps=5).betas.tolist() == pytest.approx([0.01] * 5)


@pytest.mark.parametrize("respacing", ["10", 10, [10]])
def test_respacing_as_text_number_or_list(respacing: Any) -> None:
    assert su.create_gaussian_diffusion(timestep_respacing=respacing).num_timesteps == 10


def test_choices_of_the_diffusion() -> None:
    made = su.create_gaussian_diffusion
    assert made().model_var_type == gd.ModelVarType.FIXED_LARGE
    assert made(sigma_small=True).model_var_type == gd.ModelVarType.FIXED_SMALL
    assert made(learn_sigma=True).model_var_type == gd.ModelVarType.LEARNED_RANGE
    assert made(predict_xstart=True).model_mean_type == gd.ModelMeanType.START_X
    assert made(use_kl=True).loss_type == gd.LossType.RESCALED_KL
    assert made(rescale_learned_sigmas=True).loss_type == gd.LossType.RESCALED_MSE
    assert made().num_timesteps == 1000


def test_classifier_has_1000_outputs_unless_told() -> None:
    small = {**su.classifier_and_diffusion_defaults(), "image_size": 16, "classifier_width": 64, "classifier_depth": 1}
    classifier, _ = su.create_classifier_and_diffusion(**small)
    assert isinstance(classifier, su.EncoderUNetModel)
    x = torch.zeros(2, 3, 16, 16)
    assert classifier(x, torch.zeros(2)).shape == (2, 1000)
    only = {name: small[name] for name in su.classifier_defaults()}
    assert su.create_classifier(**only, num_classes=4)(x, torch.zeros(2)).shape == (2, 4)


def test_super_resolution() -> None:
    flags = {
        **su.sr_model_and_diffusion_defaults(),
        "large_size": 16,
        "small_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
    }
    model, _ = su.sr_create_model_and_diffusion(**flags)
    assert isinstance(model, su.SuperResModel)
    assert model(torch.zeros(1, 3, 16, 16), torch.zeros(1), low_res=torch.zeros(1, 3, 8, 8)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", ["UNetModel", "SuperResModel", "EncoderUNetModel"])
def test_a_network_put_in_place_of_ours_is_made(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(su, name, lambda **options: made.append(options) or name)
    if name == "EncoderUNetModel":
        got, _ = su.create_classifier_and_diffusion(**su.classifier_and_diffusion_defaults())
    elif name == "SuperResModel":
        got, _ = su.sr_create_model_and_diffusion(**su.sr_model_and_diffusion_defaults())
    else:
        got, _ = su.create_model_and_diffusion(**su.model_and_diffusion_defaults())
    assert got == name and len(made) == 1 and made[0]["image_size"] in (64, 256)


@pytest.mark.parametrize(
    ("name", "kind", "first"), [("create_model", "", 3), ("create_classifier", "", 8), ("sr_create_model", "sr_", 4)]
)
def test_a_function_put_in_place_of_ours_gets_what_2021_gave_it(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, first: int
) -> None:
    """By position and by name; options that 2021 did not have come only where they were given."""
    parameters = inspect.signature(getattr(su, name)).parameters.values()
    old = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    seen: list[Any] = []
    monkeypatch.setattr(su, name, lambda *args, **options: seen.append((args, options)))
    thing = "classifier" if name == "create_classifier" else "model"
    options = getattr(su, f"{kind}{thing}_and_diffusion_defaults")()
    create = getattr(su, f"{kind}create_{thing}_and_diffusion")
    create(**options)
    create(**options, num_classes=10, image_channels=1)
    for (args, named), new in zip(seen, (set(), {"num_classes", "image_channels"})):
        assert len(args) == first and [options[n] for n in old[:first]] == list(args)
        assert set(named) == set(old[first:]) | new
