"""Image sources: every kind gives the same uint8 images; what is wrong is an error or a told conversion."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import add, all_of, encoded, store
from PIL import Image

from evaluations.inputs import open_images


@pytest.fixture
def images(recipes) -> np.ndarray:
    return recipes.images(7, 7, 12, 10)


ARRAYS = ["npz", "deflated", "fortran", "fortran deflated", "npy", "npy 2.0", "array"]
PICTURES = ["folder", "zip", "tar"]


@pytest.mark.parametrize("kind", [*ARRAYS, *PICTURES, "list"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_kind_gives_the_same_images_in_order(kind, batch_size, images, tmp_path):
    source = open_images(store(images, kind, tmp_path))
    batches = list(source.batches(batch_size))
    assert all(batch.dtype == np.uint8 and len(batch) <= batch_size for batch in batches)
    assert np.array_equal(np.concatenate(batches), images)
    assert source.count == len(images)
    assert source.shape == (12, 10, 3)
    assert len(source.sha256()) == 64
    assert source.statistics() is None


@pytest.mark.parametrize("kind", [*ARRAYS, *PICTURES])
def test_any_range_in_any_order(kind, images, tmp_path):
    source = open_images(store(images, kind, tmp_path))
    for start, stop in ((5, 7), (2, 5), (0, 1), (3, None), (4, 4), (6, 100)):
        got = list(source.batches(2, start, stop))
        assert np.array_equal(np.concatenate([images[:0], *got]), images[start:stop])


@pytest.mark.parametrize("kind", [*ARRAYS, *PICTURES])
def test_identity_follows_the_content(kind, images, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = open_images(store(images, kind, tmp_path / "a")).sha256()
    other = images.copy()
    other[3, 2, 1, 0] ^= 1
    assert open_images(store(other, kind, tmp_path / "b")).sha256() != one


def test_identity_of_a_file_is_its_sha256(images, tmp_path):
    path = store(images, "npz", tmp_path)
    assert open_images(path).sha256() == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_labels(images, tmp_path):
    assert open_images(store(images, "npz", tmp_path)).labels().tolist() == list(range(7))
    assert open_images(store(images, "folder", tmp_path)).labels().tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert open_images(store(images, "tar", tmp_path)).labels().tolist() == list(range(7))
    assert open_images(store(images, "zip", tmp_path)).labels() is None
    assert open_images(store(images, "npy", tmp_path)).labels() is None
    stream = open_images([(images[:3], np.array([4, 5, 6])), (images[3:], torch.arange(4))])
    assert sum(len(batch) for batch in stream.batches(2)) == 7
    assert stream.labels().tolist() == [4, 5, 6, 0, 1, 2, 3]
    np.savez(tmp_path / "bad.npz", images, np.arange(3))
    with pytest.raises(ValueError, match="one for each of the 7 images"):
        open_images(tmp_path / "bad.npz").labels()


def test_statistics(images, tmp_path):
    rng = np.random.RandomState(0)
    full = {
        "mu": rng.rand(2048),
        "sigma": rng.rand(2048, 2048),
        "mu_s": rng.rand(2023),
        "sigma_s": rng.rand(2023, 2023),
    }
    full = {name: value.astype(np.float32) for name, value in full.items()}
    np.savez(tmp_path / "ref.npz", arr_0=images, **full)
    source = open_images(tmp_path / "ref.npz")
    found = source.statistics()
    assert sorted(found) == sorted(full)
    assert all(np.array_equal(found[name], full[name]) and found[name].dtype == np.float64 for name in full)
    np.savez(tmp_path / "alone.npz", **full)
    alone = open_images(tmp_path / "alone.npz")
    assert alone.count == 0
    assert list(alone.batches(4)) == []
    assert "statistics only" in alone.notes[0]
    for change, words in (
        ({"mu_s": None}, "without 'mu_s'"),
        ({"sigma": np.zeros((3, 3))}, r"expected \(2048, 2048\)"),
        ({"mu": np.full(2048, np.nan)}, "not finite"),
    ):
        broken = {name: value for name, value in {**full, **change}.items() if value is not None}
        np.savez(tmp_path / "broken.npz", arr_0=images, **broken)
        with pytest.raises(ValueError, match=words):
            open_images(tmp_path / "broken.npz").statistics()


# --- conversions: exact and told -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("low", [0, -1])
def test_floats_are_found_out_and_told(dtype, low, tmp_path):
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    floats = (images / 255.0 if low == 0 else images / 127.5 - 1).astype(dtype)
    np.savez(tmp_path / "floats.npz", floats)
    source = open_images(tmp_path / "floats.npz")
    exact = dtype is not np.float16
    difference = np.abs(all_of(source).astype(int) - images)
    assert difference.max() <= (0 if exact else 1)
    assert f"[{low}, 1]" in source.notes[0]


def test_a_range_is_judged_by_all_values(tmp_path):
    floats = np.full((100, 4, 4, 3), 0.5, np.float32)
    floats[99, 3, 3, 2] = -0.25
    np.save(tmp_path / "late.npy", floats)
    assert (all_of(tmp_path / "late.npy")[0] == 191).all()


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda x: x.transpose(0, 3, 1, 2), "channels come before rows"),
        (lambda x: x.astype(np.int64), "int64 images within 0..255"),
        (lambda x: x.astype(">i2"), "int16 images within 0..255"),
    ],
)
def test_layouts_and_integers(change, note, images, tmp_path):
    np.savez(tmp_path / "x.npz", change(images))
    source = open_images(tmp_path / "x.npz")
    assert np.array_equal(all_of(source), images)
    assert note in source.notes[0]


@pytest.mark.parametrize("shape", [(7, 12, 10), (7, 12, 10, 1), (7, 1, 12, 10)])
def test_grey_is_told(shape, images):
    source = open_images(images[..., 0].copy().reshape(shape))
    assert np.array_equal(all_of(source), np.repeat(images[..., :1], 3, axis=3))
    assert any("grey" in note for note in source.notes)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 4, 4, 4), np.uint8), "transparency"),
        (np.zeros((2, 4, 4, 2), np.uint8), r"expected \[N, H, W, 3\]"),
        (np.zeros((4, 4), np.uint8), r"expected \[N, H, W, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no images"),
        (np.zeros((2, 0, 4, 3), np.uint8), "without pixels"),
        (np.zeros((), np.uint8), "no images"),
        (np.full((2, 4, 4, 3), 128.0), "from 128 to 128"),
        (np.full((2, 4, 4, 3), np.nan), "not finite"),
        (np.full((2, 4, 4, 3), np.inf, np.float32), "not finite"),
        (np.full((2, 4, 4, 3), -1.5, np.float32), r"\[0, 1\] or \[-1, 1\]"),
        (np.full((2, 4, 4, 3), 300), "expected 0..255"),
        (np.full((2, 4, 4, 3), -3, np.int8), "expected 0..255"),
        (np.ones((2, 4, 4, 3), bool), "truth values"),
        (np.ones((2, 4, 4, 3), np.uint8), "cast to integers"),
        (np.ones((2, 4, 4, 3), complex), "no images"),
        (np.array([None]), "no images"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(array, words):
    with pytest.raises(ValueError, match=words):
        open_images(array)


def test_a_declared_range_is_held_to():
    floats = np.full((2, 4, 4, 3), 0.5, np.float32)
    assert (all_of(open_images(floats, value_range=(-1, 1))) == 191).all()
    assert (all_of(open_images([floats], value_range=(0, 1))) == 128).all()
    with pytest.raises(ValueError, match="was declared"):
        all_of(open_images([floats, -floats], value_range=(0, 1)))
    with pytest.raises(ValueError, match="allowed are"):
        open_images(floats, value_range=(0, 255))
    with pytest.raises(ValueError, match="give uint8"):
        all_of(open_images([floats]))


def test_batches_are_read_once():
    source = open_images(iter([np.full((2, 4, 4, 3), 9, np.uint8)]))
    with pytest.raises(ValueError, match="all of them have been read"):
        source.sha256()
    assert source.count is None
    assert len(all_of(source)) == 2
    with pytest.raises(ValueError, match="once only"):
        all_of(source)
    with pytest.raises(ValueError, match="no images"):
        all_of(open_images(iter([])))
    with pytest.raises(ValueError, match="got str"):
        all_of(open_images(iter(["x"])))


# --- pictures --------------------------------------------------------------------------------------------------------


def test_mixed_sizes_modes_and_other_files(images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    Image.fromarray(images[1][:5]).save(tmp_path / "b.png")
    Image.fromarray(images[2][..., 0]).save(tmp_path / "c.png")
    Image.fromarray(np.dstack([images[3], images[3][..., :1]])).save(tmp_path / "d.png")
    Image.fromarray(images[4]).save(tmp_path / "e.jpg")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    source = open_images(tmp_path)
    batches = list(source.batches(4))
    assert [batch.shape for batch in batches] == [(1, 12, 10, 3), (1, 5, 10, 3), (3, 12, 10, 3)]
    assert np.array_equal(batches[0][0], images[0])
    assert np.array_equal(batches[2][0], np.repeat(images[2][..., :1], 3, axis=2))
    assert np.array_equal(batches[2][1], images[3])
    assert source.shape is None
    told = " ".join(source.notes)
    for word in ("1 file was left out: .txt 1", "different sizes", "grey", "transparency", "JPEG"):
        assert word in told


def test_bad_pictures_are_named(images, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "x.png").write_bytes(encoded(images[0])[:60])
    with pytest.raises(ValueError, match=r"cannot read image .*x\.png"):
        all_of(tmp_path / "cut")
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "deep" / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif.* 8 or 16 bits"):
        all_of(tmp_path / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images found"):
        open_images(tmp_path / "empty")


def test_a_picture_that_claims_too_many_pixels(tmp_path):
    Image.new("1", (19_000, 19_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png.* decompression bomb"):
        all_of(tmp_path)


def test_tar_members_do_not_leave_the_archive(images, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add(archive, "../up.png", encoded(images[0]))
    source = open_images(tmp_path / "x.tar")
    assert source.count == 1
    assert np.array_equal(all_of(source), images[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    with open(tmp_path / "x.tar", "rb") as file:
        data = file.read()
    (tmp_path / "cut.tar").write_bytes(data[:1200])
    with pytest.raises(ValueError, match="cut"):
        open_images(tmp_path / "cut.tar")
    with pytest.raises(ValueError, match=r"2 of 2 shards are missing .*y-0\.tar"):
        open_images(str(tmp_path / "y-{0..1}.tar"))
