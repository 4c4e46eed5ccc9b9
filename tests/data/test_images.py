"""Crops against a plain derivation with PIL, conversions as round trips."""

from __future__ import annotations

import io
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.data import images
from guided_diffusion.data.sources import Source, open_source


def read_image(path, channels=3):
    return open_source("files", "").read(str(path), channels)


def halve_then_bicubic(picture: Image.Image, side: int) -> Image.Image:
    """What the paper's code does, written from its description: shorter side to `side`."""
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.size[0] // 2, picture.size[1] // 2), Image.Resampling.BOX)
    factor = side / min(picture.size)
    return picture.resize(tuple(round(length * factor) for length in picture.size), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [8, 64, 100, 427, 500])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("portrait", [False, True])
def test_center_crop_is_the_2021_crop_on_real_photographs(photographs, size, which, portrait):
    photograph = photographs[which].transpose(1, 0, 2) if portrait else photographs[which]
    scaled = halve_then_bicubic(Image.fromarray(photograph), size)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    expected = np.asarray(scaled.crop((left, top, left + size, top + size)))
    np.testing.assert_array_equal(images.center_crop(photograph, size), expected)


def test_a_picture_twice_the_size_is_averaged_by_fours(photographs):
    photograph = photographs[0][:400, :400]
    averages = photograph.reshape(200, 2, 200, 2, 3).mean(axis=(1, 3))
    # PIL filters rows, rounds, then filters columns: half a unit each time.
    assert np.abs(images.center_crop(photograph, 200) - averages).max() <= 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [8, 33, 64])
def test_random_crop_is_the_2021_crop_with_its_draws(photographs, seed, size):
    draws = random.Random(seed)
    side = draws.randrange(math.ceil(size / 1.0), math.ceil(size / 0.8) + 1)
    scaled = halve_then_bicubic(Image.fromarray(photographs[0]), side)
    top = draws.randrange(scaled.height - size + 1)
    left = draws.randrange(scaled.width - size + 1)
    expected = np.asarray(scaled.crop((left, top, left + size, top + size)))
    np.testing.assert_array_equal(images.random_crop(photographs[0], size, random.Random(seed)), expected)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    channels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_crop_of_every_picture_has_the_size_asked_for(height, width, size, channels, seed):
    picture = np.full((height, width, channels), 200, dtype=np.uint8)
    expected = size if isinstance(size, tuple) else (size, size)
    for cropped in (images.center_crop(picture, size), images.random_crop(picture, size, random.Random(seed))):
        assert cropped.shape == (*expected, channels)
        if channels in (1, 3):  # with alpha, PIL works on premultiplied colour and may round
            assert (cropped == 200).all()  # every filter's weights sum to one


def test_a_picture_of_the_right_size_is_left_alone(photographs):
    picture = photographs[1][:64, :64]
    np.testing.assert_array_equal(images.center_crop(picture, 64), picture)


def test_rectangles_keep_the_aspect_ratio(photographs):
    # 427 x 640 to half its height and width: nothing is cut, as a square crop of that height would.
    wide = images.center_crop(photographs[0], (213, 319))
    assert wide.shape == (213, 319, 3)
    square = images.center_crop(photographs[0], 213)
    assert np.abs(wide[:, 53:-53].astype(int) - square.astype(int)).mean() < 6  # same scale but for half a pixel


def test_all_256_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    as_float = images.to_float(values)
    assert as_float.dtype == torch.float32
    assert as_float.shape == (1, 1, 16, 16)
    np.testing.assert_array_equal(
        as_float.numpy().ravel(), np.arange(256, dtype=np.uint8).astype(np.float32) / 127.5 - 1
    )
    assert torch.equal(images.to_uint8(as_float), values)


@settings(deadline=None)
@given(st.floats(-1.5, 1.5, width=32))
def test_uint8_is_the_truncation_of_2021(x):
    exact = (x + 1) * 127.5
    if abs(exact - round(exact)) < 1e-4:
        return  # at an integer float32 decides by its rounding error; there the round trip rules
    assert images.to_uint8(torch.full((1, 1, 1, 1), x)).item() == min(255, max(0, math.floor(exact)))


def test_batches_stay_in_channels_last_memory(photographs):
    batch = torch.from_numpy(np.stack([photographs[0][:16, :24], photographs[1][:16, :24]]))
    as_float = images.to_float(batch)
    assert as_float.shape == (2, 3, 16, 24)
    assert as_float.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.to_uint8(as_float), batch)


@pytest.mark.gpu
def test_the_round_trip_is_exact_and_the_same_on_a_gpu():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    on_gpu = images.to_float(values.cuda())
    assert torch.equal(on_gpu.cpu(), images.to_float(values))
    assert torch.equal(images.to_uint8(on_gpu).cpu(), values)


def test_low_res_averages_areas():
    picture = torch.arange(32.0).reshape(1, 2, 4, 4)
    expected = picture.reshape(1, 2, 2, 2, 2, 2).mean(dim=(3, 5))
    assert torch.equal(images.low_res(picture, 2), expected)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("stored", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_any_mode_reads_with_any_number_of_channels(tmp_path, photographs, channels, mode, stored):
    picture = Image.fromarray(photographs[0][:20, :30])
    if stored == "I;16":
        sixteen = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        sixteen.save(tmp_path / "a.png")
        reference = picture.convert("L")
    else:
        picture.convert(stored).save(tmp_path / "a.png")
        reference = Image.open(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", channels)
    assert read.shape == (20, 30, channels)
    np.testing.assert_array_equal(read, np.asarray(reference.convert(mode)).reshape(20, 30, channels))


def test_jpeg_in_cmyk_reads(tmp_path, photographs):
    Image.fromarray(photographs[0][:20, :30]).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert read_image(tmp_path / "a.jpg").shape == (20, 30, 3)


def test_errors_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read image '.*missing\.png': No such file"):
        read_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png': not an image that PIL knows"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"channels=5: must be one of \[1, 2, 3, 4\]"):
        images.as_array(Image.new("L", (2, 2)), 5)
    with pytest.raises(ValueError, match="image size .* must be positive"):
        images.center_crop(np.zeros((4, 4, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="min_frac=0.9, max_frac=0.8"):
        images.random_crop(np.zeros((4, 4, 3), np.uint8), 2, random.Random(0), 0.9, 0.8)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]))
def test_broken_bytes_are_a_value_error_or_a_picture(data, kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)).save(buffer, kind)
    broken = bytearray(buffer.getvalue())
    for at in data.draw(st.lists(st.integers(0, len(broken) - 1), max_size=4)):
        broken[at] ^= data.draw(st.integers(0, 255))
    broken = broken[: data.draw(st.integers(0, len(broken)))]
    source = Source("")
    source.open = lambda: lambda path: bytes(broken)
    try:
        picture = source.read("broken")
    except ValueError as error:
        assert "broken" in str(error)
    else:
        assert picture.dtype == np.uint8 and picture.ndim == 3


def test_preprocessing_has_a_name_that_tells_settings_apart():
    each = [{"size": 64}, {"size": 32}, {"size": (64, 32)}, {"size": 64, "channels": 1}, {"size": 64, "crop": "random"}]
    assert len({images.preprocessing_id(**one) for one in each}) == 5
    assert images.preprocessing_id(64) == images.preprocessing_id((64, 64))


def test_mirroring_on_the_way_is_mirroring_before() -> None:
    pictures = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8)
    flips = torch.tensor([True, False, True, False])
    found = images.to_float(pictures, flips)
    expected = images.to_float(torch.stack([p.flip(1) if f else p for p, f in zip(pictures, flips)]))
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
