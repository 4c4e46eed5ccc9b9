"""The 2021 `image_datasets`: names, items and the order of batches."""

from __future__ import annotations

import random
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_forked
from torch.utils.data import DataLoader

from guided_diffusion import image_datasets
from guided_diffusion.image_datasets import (
    ImageDataset,
    _list_image_files_recursively,
    center_crop_arr,
    load_data,
    random_crop_arr,
)

NAMES = ("b_1.png", "a_1.png", "sub/c_1.png", "a_2.jpg", "c_2.png", "ignored.webp")


@pytest.fixture
def folder(tmp_path) -> str:
    for k, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((9 + k, 12, 3), 30 * k, dtype=np.uint8)).save(tmp_path / name)
    return str(tmp_path)


def listed(folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in ("a_1.png", "a_2.jpg", "b_1.png", "c_2.png", "sub/c_1.png")]


def test_the_listing(folder):
    assert _list_image_files_recursively(folder) == listed(folder)


def test_items(folder):
    paths = listed(folder)
    data = ImageDataset(8, paths, classes=[0, 0, 1, 2, 2], shard=1, num_shards=2, random_flip=False)
    assert len(data) == 2
    assert data.local_images == paths[1::2]
    array, extra = data[1]
    assert (array.shape, array.dtype) == ((3, 8, 8), np.float32)
    assert (extra["y"].dtype, int(extra["y"])) == (np.int64, 2)
    expected = center_crop_arr(Image.open(paths[3]), 8).astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(array, expected.transpose(2, 0, 1))
    assert ImageDataset(8, paths)[0][1] == {}


def test_items_follow_the_global_generator_draw_by_draw(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = ImageDataset(16, [str(tmp_path / "a.png")], random_crop=True)
    for seed in range(6):
        random.seed(seed)
        array, _ = data[0]
        random.seed(seed)
        expected = random_crop_arr(Image.fromarray(pixels), 16)
        if random.random() < 0.5:
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(array, expected.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)


def test_items_collate(folder):
    batch, extra = next(iter(DataLoader(ImageDataset(8, listed(folder), classes=[0, 0, 1, 2, 2]), batch_size=5)))
    assert batch.shape == (5, 3, 8, 8)
    assert extra["y"].tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "F"])
def test_crops_take_any_pil_picture(mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 37, 3), dtype=np.uint8)).convert(mode)
    halved = picture.resize((18, 10), Image.Resampling.BOX)
    scaled = halved.resize((round(18 * 0.9), 9), Image.Resampling.BICUBIC)
    expected = np.array(scaled)[:, 3:12]
    np.testing.assert_array_equal(center_crop_arr(picture, 9), expected)
    assert random_crop_arr(picture, 9, min_crop_frac=0.5).shape == expected.shape


def test_deterministic_batches_in_the_order_of_the_names(folder):
    batches = load_data(
        data_dir=folder, batch_size=2, image_size=8, class_cond=True, deterministic=True, random_flip=False
    )
    got = list(islice(batches, 5))
    # Five pictures make two batches; the fifth is left out, and the epoch begins again.
    assert [extra["y"].tolist() for _, extra in got] == [[0, 0], [1, 2], [0, 0], [1, 2], [0, 0]]
    batch, extra = got[0]
    assert batch.shape == (2, 3, 8, 8) and batch.dtype == torch.float32 and batch.is_contiguous()
    assert extra["y"].dtype == torch.int64
    expected = center_crop_arr(Image.open(listed(folder)[0]), 8).astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(batch[0].numpy(), expected.transpose(2, 0, 1))


def test_shuffled_batches_follow_torchs_seed(folder):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([batch for batch, _ in islice(load_data(data_dir=folder, batch_size=5, image_size=8), 6)])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_without_classes_there_is_no_y(folder):
    assert next(load_data(data_dir=folder, batch_size=1, image_size=8))[1] == {}


def test_mistakes(folder):
    with pytest.raises(ValueError, match="unspecified data directory"):
        load_data(data_dir="", batch_size=1, image_size=8)
    with pytest.raises(ValueError, match="batch_size=6 .* is larger than the 5 images"):
        load_data(data_dir=folder, batch_size=6, image_size=8)
    with pytest.raises(ValueError, match="batch_size=6 .* is larger than the 5 images"):
        load_data(data_dir=folder, batch_size=6, image_size=8, deterministic=True)
    with pytest.raises(TypeError):
        load_data(folder, 1, 8)


def test_a_replaced_mpi_says_the_share(folder, monkeypatch):
    world = SimpleNamespace(Get_rank=lambda: 1, Get_size=lambda: 2)
    monkeypatch.setattr(image_datasets, "MPI", SimpleNamespace(COMM_WORLD=world))
    batches = load_data(data_dir=folder, batch_size=1, image_size=8, class_cond=True, deterministic=True)
    assert [extra["y"].item() for _, extra in islice(batches, 3)] == [0, 2, 0]


def test_a_replaced_dataset_and_a_share_below_one_batch(folder, monkeypatch):
    """Without a word, 2021 looked for a batch for ever."""
    monkeypatch.setattr(image_datasets, "ImageDataset", type("Mine", (ImageDataset,), {}))
    with pytest.raises(ValueError, match="batch_size=6 is larger than .* the 5 images"):
        next(load_data(data_dir=folder, batch_size=6, image_size=8))


def test_ranks_share_the_pictures(folder):
    printed = run_forked(f"""
import os
from itertools import islice
os.environ |= {{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}}
from guided_diffusion.image_datasets import load_data
data = load_data(data_dir={folder!r}, batch_size=1, image_size=8, deterministic=True, class_cond=True, random_flip=False)
print([extra["y"].item() for _, extra in islice(data, 4)])
""")
    assert printed == "[0, 2, 0, 2]\n"
