"""Files without a configuration: released ones by name and layout, typed flags, and never a silent guess."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoint_files import layouts, meta_shapes, shapes_of

from guided_diffusion import build
from guided_diffusion.weights.identify import SIGNATURES, identify, released_as, signature
from guided_diffusion.weights.recognise import NotThisFamily
from guided_diffusion.weights.released import PRESETS

LAYOUTS = layouts()
OLD = {  # a network of the predecessor: improved-diffusion
    "image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2,3,4", "attention_resolutions": "16,8",
    "learn_sigma": True, "num_heads": 4, "noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True,
}  # fmt: skip


def test_every_released_layout_has_its_signature() -> None:
    for name, layout in LAYOUTS.items():
        assert name in SIGNATURES[signature(shapes_of(layout))]
    assert sorted(sum(SIGNATURES.values(), ())) == sorted(PRESETS) == sorted(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_released_file_under_its_own_name_needs_no_flag(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = identify(f"/somewhere/{name}.pt", shapes_of(LAYOUTS[name]))
    assert config.kind == LAYOUTS[name]["kind"] and not caplog.messages
    assert (config.model, config.diffusion) == (PRESETS[name].model, PRESETS[name].diffusion)
    # What is recognised and what the flags of 2021 say are the same network.
    tensors = build.build_empty(config.model, config.diffusion).state_dict()
    assert [(key, tuple(value.shape)) for key, value in tensors.items()] == list(shapes_of(LAYOUTS[name]).items())


@pytest.mark.parametrize("name", ["128x128_diffusion", "64_256_upsampler", "lsun_cat", "256x256_classifier"])
def test_a_renamed_copy_is_taken_for_the_release_and_this_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = identify("copy.pt", shapes_of(LAYOUTS[name]))
    assert config.model.multipliers == PRESETS[name].model.multipliers
    assert "is taken for it" in caplog.text and "released" in caplog.text


def test_a_renamed_copy_with_other_heads_is_another_training(caplog: pytest.LogCaptureFixture) -> None:
    shapes = shapes_of(LAYOUTS["128x128_diffusion"])
    with pytest.raises(ValueError, match="Choose one of each line") as caught:
        identify("copy.pt", shapes, flags={"num_heads": 8})
    assert "--noise_schedule linear | --noise_schedule cosine" in str(caught.value)
    assert "--num_heads 1" not in str(caught.value)  # given
    every = {"num_heads": 8, "noise_schedule": "cosine", "use_new_attention_order": True}
    every |= {"rescale_timesteps": False, "diffusion_steps": 4000}
    config = identify("copy.pt", shapes, flags=every)
    assert config.model.num_heads == 8 and config.diffusion.diffusion_steps == 4000 and not caplog.messages  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("128x128_diffusion", {"num_heads": 2}, "the file has num_heads 4; you asked for 2"),
        ("256x256_diffusion", {"num_head_channels": 32}, "the file has num_head_channels 64; you asked for 32"),
        ("64x64_diffusion", {"noise_schedule": "linear"}, "the file has noise_schedule cosine; you asked for linear"),
        ("64x64_diffusion", {"use_new_attention_order": False}, "use_new_attention_order True; you asked for False"),
        ("256x256_diffusion", {"image_size": 128}, "the file has image_size 256; you asked for 128"),
        ("256x256_diffusion", {"predict_xstart": True}, "the file has predict_xstart False; you asked for True"),
        ("256x256_diffusion", {"attention_resolutions": "16,8"}, "attention at 32, 16, 8; you asked for 16, 8"),
        ("256x256_diffusion", {"class_cond": False}, "1000 classes; you asked for --class_cond False"),
        ("lsun_cat", {"class_cond": True}, "no classes; you asked for --class_cond True"),
        ("256x256_diffusion", {"num_res_blocks": 3}, "num_res_blocks 2; you asked for 3"),
        ("256x256_diffusion", {"channel_mult": "1,2,3,4"}, "multipliers 1, 1, 2, 2, 4, 4; you asked for 1, 2, 3, 4"),
        ("128_512_upsampler", {"small_size": 64}, "the file has small_size 128; you asked for 64"),
        ("128x128_classifier", {"classifier_depth": 4}, "classifier_depth 2; you asked for 4"),
    ],
)
def test_contradictions_are_told_in_words_with_the_line_that_works(name: str, flags: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        identify(f"{name}.pt", shapes_of(LAYOUTS[name]), flags=flags)
    message = str(caught.value)
    assert len(message) < 800 and "Its own flags are: --" in message
    # The line that is printed works.
    line = message.split("Its own flags are: ")[1].split()
    own = {**PRESETS[name].model.to_dict(), **PRESETS[name].diffusion.to_dict()}
    typed = {flag[2:]: type(own[flag[2:]])(value) if value not in ("True", "False") else value == "True"
             for flag, value in zip(line[::2], line[1::2])}  # fmt: skip
    again = identify(f"{name}.pt", shapes_of(LAYOUTS[name]), flags=typed)
    assert again.model == PRESETS[name].model


def test_the_line_of_the_readme_of_2021_is_no_contradiction() -> None:
    flags = {
        "attention_resolutions": "32,16,8", "class_cond": True, "diffusion_steps": 1000, "image_size": 256,
        "learn_sigma": True, "noise_schedule": "linear", "num_channels": 256, "num_head_channels": 64,
        "num_res_blocks": 2, "resblock_updown": True, "use_fp16": True, "use_scale_shift_norm": True,
        "num_heads": 4, "num_heads_upsample": -1, "timestep_respacing": "250",
    }  # fmt: skip
    config = identify("256x256_diffusion.pt", shapes_of(LAYOUTS["256x256_diffusion"]), flags=flags)
    assert config.diffusion.timestep_respacing == "250"
    # Six levels of a 512 network never reach 8 pixels: both spellings are the same network.
    upsampler = shapes_of(LAYOUTS["128_512_upsampler"])
    identify("128_512_upsampler.pt", upsampler, flags={"attention_resolutions": "32,16,8"})


@pytest.mark.parametrize(
    "change", [lambda k: k.replace("out.2", "out.3"), lambda k: k.replace("input_blocks.3.0.in", "input_blocks.3.0.x")]
)
def test_one_renamed_tensor_is_no_released_file(change: Any) -> None:
    shapes = {change(key): shape for key, shape in shapes_of(LAYOUTS["64x64_diffusion"]).items()}
    assert released_as("64x64_diffusion.pt", shapes) is None
    with pytest.raises(ValueError):
        identify("64x64_diffusion.pt", shapes)


def test_one_changed_shape_is_no_released_file() -> None:
    shapes = shapes_of(LAYOUTS["64x64_diffusion"])
    fewer = {**shapes, "label_emb.weight": (10, 768)}
    assert released_as("64x64_diffusion.pt", fewer) is None
    with pytest.raises(ValueError, match="Choose one of each line"):
        identify("64x64_diffusion.pt", fewer)
    with pytest.raises(NotThisFamily):
        identify("64x64_diffusion.pt", {**shapes, "time_embed.0.weight": (768,)})


def test_improved_diffusion_without_flags_lists_candidates() -> None:
    with pytest.raises(ValueError) as caught:
        identify("old.pt", meta_shapes("diffusion", OLD))
    message = str(caught.value)
    for words in (
        "carries no configuration",
        "--num_channels 32 --num_res_blocks 1",
        "--attention_resolutions 16,8",
        "--num_heads 4",
        "--noise_schedule linear | --noise_schedule cosine",
        "--rescale_timesteps False | --rescale_timesteps True",
        "--diffusion_steps 1000 | --diffusion_steps 4000",
        "guided-diffusion inspect old.pt --probe",
    ):
        assert words in message, words


def test_improved_diffusion_with_its_flags(caplog: pytest.LogCaptureFixture) -> None:
    names = ("num_heads", "noise_schedule", "diffusion_steps", "rescale_timesteps")
    typed = {**{name: OLD[name] for name in names}, "use_new_attention_order": False}
    config = identify("old.pt", meta_shapes("diffusion", OLD), flags=typed)
    assert config.diffusion.rescale_timesteps and config.diffusion.diffusion_steps == 4000 and not caplog.messages
    assert config.model.attention_downsamplings == (4, 8) and config.model.multipliers == (1, 2, 3, 4)


def test_a_typed_line_of_2021_has_the_defaults_of_2021_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    line = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "learn_sigma": True}
    config = identify("old.pt", meta_shapes("diffusion", OLD), flags=line)
    assert (config.model.num_heads, config.diffusion.noise_schedule) == (4, "linear")  # type: ignore[union-attr]
    assert (
        "--num_heads 4" in caplog.text and "--noise_schedule linear" in caplog.text and "default in 2021" in caplog.text
    )


def test_heads_alone_settle_nothing_else() -> None:
    with pytest.raises(ValueError, match="--noise_schedule linear"):
        identify("old.pt", meta_shapes("diffusion", OLD), flags={"num_heads": 4})


def test_unusual_multipliers_leave_the_image_size_open() -> None:
    shapes = meta_shapes("diffusion", {**OLD, "image_size": 32, "channel_mult": "1,2,2,2"})
    with pytest.raises(ValueError, match=r"--image_size 32 \| --image_size 64"):
        identify("old.pt", shapes)
    with pytest.raises(ValueError, match="the file has num_res_blocks 1; you asked for 5"):
        identify("old.pt", shapes, flags={"num_res_blocks": 5})


def test_another_kind_is_refused_before_anything_else() -> None:
    for name, wanted, words in (
        ("64_256_upsampler", "diffusion", "is an upsampler; a diffusion model is needed here"),
        ("256x256_diffusion", "super_resolution", "is a diffusion model; an upsampler is needed here"),
        ("256x256_classifier", "diffusion", "is a classifier; a diffusion model is needed here"),
    ):
        with pytest.raises(ValueError, match=words):
            identify(f"{name}.pt", shapes_of(LAYOUTS[name]), flags={"image_size": 4}, kind=wanted)
