"""The resize is TensorFlow's first rule, in every bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inception_files import FOLDER, images_of, sha

from evaluations.resize import tf1_bilinear, to_inception_range
from evaluations.selftest import synthetic_images

CASES = json.loads((FOLDER / "resize.json").read_text())["cases"]


def _name(case: dict) -> str:
    return "{h}x{w}".format(**case["images"]) if "images" in case else "floats"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_equals_tensorflow(case):
    if "images" in case:
        images = images_of(case)
    else:
        images = (np.random.RandomState(3).standard_normal((1, 37, 41, 3)) * 3).astype(np.float32)
    assert sha(images) == case["sha256_images"]
    resized = tf1_bilinear(torch.from_numpy(images))
    assert resized.dtype == torch.float32
    assert resized.shape == (len(images), 3, 299, 299)
    assert sha(resized.permute(0, 2, 3, 1).numpy()) == case["sha256_resized"]


def one_by_one(image: np.ndarray, size: int) -> np.ndarray:
    """The kernel written out: one float32 operation at a time, for one channel."""
    height, width = image.shape
    out = np.zeros((size, size), np.float32)
    for row in range(size):
        y = np.float32(row) * (np.float32(height) / np.float32(size))
        top, ty = int(np.floor(y)), y - np.floor(y)
        bottom = min(top + 1, height - 1)
        for column in range(size):
            x = np.float32(column) * (np.float32(width) / np.float32(size))
            left, tx = int(np.floor(x)), x - np.floor(x)
            right = min(left + 1, width - 1)
            above = image[top, left] + (image[top, right] - image[top, left]) * tx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * tx
            out[row, column] = above + (below - above) * ty
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**31))
def test_equals_the_formula_one_pixel_at_a_time(height, width, size, seed):
    image = (np.random.RandomState(seed).standard_normal((height, width)) * 100).astype(np.float32)
    fast = tf1_bilinear(torch.from_numpy(image)[None, :, :, None], size)
    assert np.array_equal(fast[0, 0].numpy(), one_by_one(image, size))


def test_one_image_is_independent_of_the_others():
    images = torch.from_numpy(synthetic_images(5, 3, 20, 31))
    together = tf1_bilinear(images, 64)
    assert torch.equal(together, torch.cat([tf1_bilinear(image[None], 64) for image in images]))


def test_same_size_passes_unchanged_and_input_is_kept():
    images = torch.from_numpy(synthetic_images(5, 1, 299, 299)).float()
    before = images.clone()
    scaled = to_inception_range(tf1_bilinear(images))
    assert torch.equal(images, before)
    assert torch.equal(scaled.permute(0, 2, 3, 1), (images - 128) / 128)
    assert scaled.is_contiguous(memory_format=torch.channels_last)
