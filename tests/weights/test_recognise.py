"""Flags read off names and shapes: the fifteen released layouts, near misses, and older members of the family."""

from __future__ import annotations

import pytest
from checkpoint_files import layouts, meta_shapes

from guided_diffusion.weights.recognise import Layout, NotThisFamily, inspect_shapes, normalise_keys
from guided_diffusion.weights.released import PRESETS

LAYOUTS = layouts()
Shapes = dict[str, tuple[int, ...]]


def shapes_of(name: str) -> Shapes:
    return {key: tuple(shape) for key, shape in LAYOUTS[name]["keys"].items()}


def open_flags(layout: Layout) -> set[str]:
    return {flag for choice in layout.open for flag, _ in choice}


@pytest.mark.parametrize("name", LAYOUTS)
def test_released_layouts_say_what_they_were_made_with(name: str) -> None:
    read, preset = inspect_shapes(shapes_of(name)), PRESETS[name]
    flags = {**preset.model.to_dict(), **preset.diffusion.to_dict()}
    assert read.kind == preset.kind and read.multipliers == preset.model.multipliers
    assert read.flags == {flag: flags[flag] for flag in read.flags} and len(read.flags) >= 7
    reached = {2**level for level in range(len(read.multipliers))}
    assert set(read.attention_ds) == set(preset.model.attention_downsamplings) & reached
    if read.kind == "classifier":
        assert not read.open
    else:
        assert {"num_heads", "noise_schedule", "use_new_attention_order"} <= open_flags(read)


@pytest.mark.parametrize("name", ["64x64_diffusion", "64_256_upsampler", "128x128_classifier"])
def test_prefixes_of_wrappers_do_not_matter(name: str) -> None:
    plain = shapes_of(name)
    wrapped = {f"module._orig_mod.{key}": shape for key, shape in plain.items()}
    assert normalise_keys(wrapped) == plain
    assert inspect_shapes(wrapped) == inspect_shapes(plain)


def without(shapes: Shapes, *stems: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.startswith(stems)}


@pytest.mark.parametrize(
    ("stems", "words"),
    [
        (("time_embed.0",), "no tensor named 'time_embed.0.weight'"),
        (("input_blocks.0.0.weight",), "no tensor named 'input_blocks.0.0.weight'"),
        (("middle_block.1",), "no tensor named 'middle_block.1.qkv.weight'"),
        (("input_blocks.4.",), "input_blocks.4 is missing"),
        (("output_blocks.15.",), "16 input blocks but 15 output blocks"),
        (("out.2.",), "no tensor named 'out.2.weight'"),
        (("input_blocks.5.0.out_layers",), "no tensor named 'input_blocks.5.0.out_layers.3.weight'"),
        (("output_blocks.3.2.", "output_blocks.7.2."), "not the regular levels"),
    ],
)
def test_several_blocks_missing_is_told_by_name(stems: tuple[str, ...], words: str) -> None:
    with pytest.raises(NotThisFamily, match=words):
        inspect_shapes(without(shapes_of("64x64_diffusion"), *stems))


def test_foreign_files_are_told_by_their_first_names() -> None:
    with pytest.raises(NotThisFamily, match="begins with conv1.weight"):
        inspect_shapes({"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,)})
    shapes = shapes_of("64x64_diffusion")
    with pytest.raises(NotThisFamily, match=r"shape \[768\]; a network of this family has 2"):
        inspect_shapes({**shapes, "time_embed.0.weight": (768,)})
    with pytest.raises(NotThisFamily, match="neither a diffusion model nor an upsampler"):
        inspect_shapes({**shapes, "out.2.weight": (5, 192, 3, 3)})
    with pytest.raises(NotThisFamily, match="gives 500 numbers for 192 channels"):
        inspect_shapes({**shapes, "input_blocks.1.0.emb_layers.1.weight": (500, 768)})
    critic = shapes_of("64x64_classifier")
    with pytest.raises(NotThisFamily, match="which is no square number"):
        inspect_shapes({**critic, "out.2.positional_embedding": (512, 64)})
    with pytest.raises(NotThisFamily, match="no output head"):
        inspect_shapes(without(critic, "out."))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_generators_of_every_shape(depth: int, updown: bool, scale_shift: bool) -> None:
    flags = {
        "num_channels": 32, "num_res_blocks": depth, "channel_mult": "0.5,1,2", "attention_resolutions": "8",
        "resblock_updown": updown, "use_scale_shift_norm": scale_shift, "learn_sigma": depth == 2, "image_size": 16,
        "class_cond": updown, "num_classes": 7 if updown else 0, "image_channels": 4 - depth,
    }  # fmt: skip
    flags["num_channels"] = 64
    found = inspect_shapes(meta_shapes("diffusion", flags))
    assert found.kind == "diffusion" and found.multipliers == (0.5, 1, 2) and found.attention_ds == (2,)
    assert found.flags == {name: flags[name] for name in found.flags}


def test_channels_that_can_be_read_in_two_ways() -> None:
    shapes = meta_shapes(
        "diffusion", {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "image_channels": 6}
    )
    read = {"likeliest": inspect_shapes(shapes), "typed": inspect_shapes(shapes, image_channels=6)}
    read["wanted"] = inspect_shapes(shapes, image_channels=6, kind="super_resolution")
    upsampler, generator = ("super_resolution", 3, True), ("diffusion", 6, False)
    found = {name: (of.kind, of.flags["image_channels"], of.flags["learn_sigma"]) for name, of in read.items()}
    assert found == {"likeliest": upsampler, "typed": generator, "wanted": upsampler}
    assert "small_size" in open_flags(read["likeliest"]) and "small_size" not in open_flags(read["typed"])


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize("updown", [False, True])
def test_classifiers_of_every_pool(pool: str, updown: bool) -> None:
    own = {"width": 32, "depth": 2, "pool": pool, "resblock_updown": updown, "attention_resolutions": "16"}
    own["num_head_channels"] = 32
    flags = {"image_size": 64, "num_classes": 5, **{f"classifier_{name}": value for name, value in own.items()}}
    found = inspect_shapes(meta_shapes("classifier", flags))
    assert found.flags["classifier_pool"] == pool and found.flags["num_classes"] == 5
    assert found.flags["image_size"] == 64 and found.flags["classifier_depth"] == 2 and found.attention_ds == (4,)


@pytest.mark.parametrize(("channels", "learned"), [(1, True), (1, False), (3, True), (3, False)])
def test_upsamplers_are_told_from_generators(channels: int, learned: bool) -> None:
    flags = {
        "large_size": 16, "small_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
        "attention_resolutions": "8", "image_channels": channels, "learn_sigma": learned,
    }  # fmt: skip
    found = inspect_shapes(meta_shapes("super_resolution", flags))
    assert found.kind == "super_resolution"
    assert found.flags["image_channels"] == channels and found.flags["learn_sigma"] == learned
    assert "small_size" in open_flags(found)


def test_head_candidates_divide_every_attention_width() -> None:
    found = inspect_shapes(shapes_of("64x64_diffusion"))  # 384, 576 and 768 channels
    assert {("num_head_channels", 64), ("num_heads", 1), ("num_heads", 4)} <= set(found.open[0])
    assert ("num_head_channels", 128) not in found.open[0]


def test_attention_kept_as_convolutions_of_two_dimensions() -> None:
    shapes = shapes_of("64x64_diffusion")
    other = {
        key: (*shape, 1) if key.endswith(("qkv.weight", "proj_out.weight")) else shape for key, shape in shapes.items()
    }
    assert inspect_shapes(other) == inspect_shapes(shapes)
