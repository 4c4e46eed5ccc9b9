"""The order of pictures as a function of seed and step: for any number of processes, workers and interruptions."""

from __future__ import annotations

import os
import pickle
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.data import images
from guided_diffusion.data.listing import Records, list_records
from guided_diffusion.data.loader import Batch, make_batches, order

COUNT = 11


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Records:
    """Eleven pictures of different sizes in two classes; picture k is grey k * 20, so that it can be told from its pixels."""
    root = tmp_path_factory.mktemp("numbered")
    for k in range(COUNT):
        path = root / ("even" if k % 2 == 0 else "odd") / f"{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8 + k, 20 - k, 3), k * 20, dtype=np.uint8)).save(path)
    return list_records(root)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Records:
    """Pictures on which crop and flip show."""
    root = tmp_path_factory.mktemp("noisy")
    for k in range(COUNT):
        pixels = np.random.default_rng(k).integers(0, 256, (14 + k, 23, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{k:02d}.png")
    return list_records(root)


def first(records: Records, count: int, **options) -> list[Batch]:
    return list(islice(make_batches(records, **{"image_size": 8, "batch_size": 4, **options}), count))


def numbers(batches: list[Batch]) -> list[int]:
    """Which pictures of `records` came, in order."""
    return [int(value) // 20 for batch in batches for value in batch.images[:, 0, 0, 0]]


def same(left: list[Batch], right: list[Batch]) -> bool:
    def alike(a: object, b: object) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return all(alike(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair))


@settings(deadline=None)
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6), count=st.integers(1, 50))
def test_order_is_a_permutation_and_a_function(seed, epoch, count):
    assert sorted(order(seed, epoch, count)) == list(range(count))
    np.testing.assert_array_equal(order(seed, epoch, count), order(seed, epoch, count))


def test_epochs_and_seeds_are_shuffled_differently_and_evenly():
    orders = np.array([order(seed, epoch, 20) for seed in range(30) for epoch in range(30)])
    assert len({tuple(row) for row in orders}) == len(orders)
    # Each record's mean place: 9.5 with standard error 5.77 / sqrt(900) = 0.19.
    assert np.abs(np.argsort(orders, axis=1).mean(axis=0) - 9.5).max() < 5 * 0.19


def test_the_order_never_changes():
    # A run that resumes under another version of anything must continue the same epoch.
    assert order(0, 0, 10).tolist() == [9, 4, 2, 5, 3, 0, 8, 1, 7, 6]
    assert order(2**40, 3, 10).tolist() == [3, 2, 1, 4, 5, 0, 8, 6, 7, 9]


def test_batches_are_uint8_with_labels_positions_and_step(records):
    batches = first(records, 3, seed=5)
    for step, batch in enumerate(batches):
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 8, 8, 3))
        assert batch.images.is_contiguous() and batch.labels.dtype == torch.int64
        assert (batch.positions.tolist(), batch.step) == ([0, 1, 2, 3], step)
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    # Sorted: even/00, even/02, ... odd/01, ...; class 0 is even.
    assert labels == [number % 2 for number in numbers(batches)]


def test_without_shuffling_the_order_is_that_of_the_listing(records):
    listed = [int(Path(path).stem) for path in records.paths]
    assert numbers(first(records, 6, shuffle=False)) == (listed * 3)[:24]


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(noisy, size):
    options = {"seed": 3, "crop": "random", "start_step": 1}
    alone = first(noisy, 6, **options)
    ranks = [first(noisy, 6, rank=rank, size=size, **options) for rank in range(size)]
    for step, whole in enumerate(alone):
        for rank in range(size):
            assert ranks[rank][step].positions.tolist() == list(range(rank, 4, size))
            assert torch.equal(ranks[rank][step].images, whole.images[rank::size])


@pytest.mark.parametrize("start", [1, 7])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_resuming_continues_bit_for_bit(noisy, start, crop):
    continued = first(noisy, start + 4, crop=crop, seed=9)[start:]
    assert same(first(noisy, 4, crop=crop, seed=9, start_step=start), continued)
    assert [batch.step for batch in continued] == list(range(start, start + 4))


def test_another_batch_size_goes_on_at_the_next_image(records):
    whole = numbers(first(records, 24, batch_size=1))
    before = numbers(first(records, 3, batch_size=2))
    after = numbers(first(records, 6, batch_size=3, start_step=3, start_image=6))
    assert before + after == whole and sorted(whole[:COUNT]) == list(range(COUNT))
    # The same as two processes, each with its part of each batch.
    parts = [numbers(first(records, 2, rank=r, size=2, start_step=3, start_image=6)) for r in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole[6:14])


@settings(max_examples=15, deadline=None)
@given(batch_size=st.integers(1, COUNT), start=st.integers(0, 40), seed=st.integers(0, 5), rank=st.integers(0, 1))
def test_resuming_anywhere_is_arithmetic(records, batch_size, start, seed, rank):
    per_step = 2 * -(-batch_size // 2) if batch_size < COUNT else 10
    options = {"batch_size": per_step, "seed": seed, "rank": rank, "size": 2}
    walk = [int(k) for epoch in range(60) for k in order(seed, epoch, COUNT)]
    batch = first(records, 1, start_step=start, **options)[0]
    listed = [int(Path(path).stem) for path in records.paths]
    assert numbers([batch]) == [listed[k] for k in walk[start * per_step : (start + 1) * per_step][rank::2]]


def test_workers_change_nothing(noisy):
    options = {"crop": "random", "seed": 2, "start_step": 2}
    batches = make_batches(noisy, image_size=8, batch_size=4, workers=2, **options)
    assert same(list(islice(batches, 5)), first(noisy, 5, **options))
    batches.close()


def test_flips_are_fair_and_belong_to_the_example(noisy):
    plain = first(noisy, 44, flip=False, seed=1)
    flipped = first(noisy, 44, flip=True, seed=1)
    mirrored = []
    for a, b in zip(plain, flipped):
        assert a.flips is None
        for left, right in zip(images.to_float(a.images), images.to_float(b.images, b.flips)):
            mirrored.append(torch.equal(left.flip(2), right))
            assert mirrored[-1] or torch.equal(left, right)
    assert abs(sum(mirrored) - 88) < 4 * np.sqrt(176 / 4)
    # Neither the epoch nor the picture alone decides.
    per_epoch = np.array(mirrored).reshape(16, COUNT).mean(axis=1)
    assert ((per_epoch > 0) & (per_epoch < 1)).all()


def test_random_crops_differ_between_epochs(noisy):
    seen: dict[int, set[bytes]] = {}
    batches = first(noisy, 11, crop="random", flip=False)
    places = [int(k) for epoch in range(4) for k in order(0, epoch, COUNT)]
    for place, picture in zip(places, torch.cat([batch.images for batch in batches])):
        seen.setdefault(place, set()).add(picture.numpy().tobytes())
    assert all(len(crops) >= 2 for crops in seen.values())


def test_pixels_are_those_of_the_rooms_crop(noisy):
    batch = first(noisy, 1, shuffle=False, flip=False)[0]
    for k in range(4):
        np.testing.assert_array_equal(batch.images[k].numpy(), images.center_crop(Image.open(noisy.paths[k]), 8))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_and_rectangles(noisy, channels):
    assert first(noisy, 1, channels=channels, image_size=(6, 10))[0].images.shape == (4, 6, 10, channels)


def test_the_global_generators_are_left_alone(noisy):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    first(noisy, 2, crop="random")
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_waiting_is_measured(noisy):
    batches = make_batches(noisy, image_size=8, batch_size=4)
    next(batches)
    once = batches.wait_seconds
    next(batches)
    assert 0 < once < batches.wait_seconds < 60


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_size": 12}, r"batch_size=12 .* is larger than the 11 images .*lower it to at most 11"),
        ({"batch_size": 12, "size": 2}, "at most 10"),
        ({"batch_size": 3, "size": 2}, "positive multiple of 2 processes"),
        ({"batch_size": 0}, "positive multiple"),
        ({"rank": 2, "size": 2}, r"rank=2: must be in 0\.\.1"),
        ({"crop": "left"}, "crop='left': must be 'center' or 'random'"),
        ({"on_error": "ignore"}, "on_error='ignore': must be 'raise' or 'skip'"),
        ({"channels": 7}, r"channels=7: must be one of \[1, 2, 3, 4\]"),
        ({"image_size": 0}, "must be positive"),
        ({"workers": -1}, "workers=-1"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_mistakes_are_named_before_the_first_batch(records, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_batches(records, **{"image_size": 8, "batch_size": 4, **options})


@pytest.fixture
def damaged(tmp_path, noisy) -> Records:
    """The noisy pictures, of which numbers 3 and 4 are cut short."""
    for path in noisy.paths:
        data = Path(path).read_bytes()
        broken = os.path.basename(path) in ("03.png", "04.png")
        (tmp_path / os.path.basename(path)).write_bytes(data[:60] if broken else data)
    return list_records(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_stops_with_its_name_alone(damaged, workers):
    with pytest.raises(ValueError, match=r"cannot read image '.*0[34]\.png'.*on_error='skip'") as caught:
        first(damaged, 3, workers=workers)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_or_is_replaced_by_the_next_and_counted(damaged, noisy, workers):
    options = {"shuffle": False, "flip": False}
    batches = make_batches(damaged, image_size=8, batch_size=4, workers=workers, on_error="skip", **options)
    words = r"times an unreadable image was replaced by another; the latest: .*0[34]\.png"
    with pytest.warns(RuntimeWarning, match=words):
        got = torch.cat([batch.images for batch in islice(batches, 2)])
    whole = torch.cat([batch.images for batch in first(noisy, 2, **options)])
    assert torch.equal(got, whole[[0, 1, 2, 5, 5, 5, 6, 7]])
    assert batches.skipped == 3  # 3, then 4 in its place, then 4
    batches.close()


def test_replacements_have_their_own_label(tmp_path):
    for name in ("a_1", "b_1", "b_2"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a_1.png").write_bytes(b"")
    records = list_records(tmp_path, labels="prefix")
    with pytest.warns(RuntimeWarning, match="1 times"):
        batch = next(make_batches(records, image_size=8, batch_size=1, on_error="skip", shuffle=False))
    assert batch.labels.tolist() == [1]


def test_nothing_but_broken_pictures_is_an_error(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(b"")
    batches = make_batches(list_records(tmp_path), image_size=8, batch_size=1, on_error="skip")
    with pytest.raises(ValueError, match="3 images in a row cannot .* first: .*png"), pytest.warns(RuntimeWarning):
        next(batches)


def test_what_workers_are_sent_survives_pickling(noisy):
    # As platforms need that start workers afresh instead of forking.
    batches = make_batches(noisy, image_size=8, batch_size=4, crop="random")
    index = next(batches._indices())
    copy = pickle.loads(pickle.dumps(batches._examples))
    assert torch.equal(copy[index][0].images, batches._examples[index][0].images)


def test_odd_file_names_reach_the_workers(tmp_path):
    for name in ("ü 1.png", "日本.png", os.fsdecode(b"latin-\xe9.png")):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(first(list_records(tmp_path), 3, batch_size=3)) == 3
