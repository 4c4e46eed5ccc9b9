"""Image sources: every kind gives the same uint8 images; what is wrong is an error or a told conversion."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import add, all_of, encoded, store
from PIL import Image

from evaluations import reference
from evaluations.inputs import open_images
from evaluations.selftest import synthetic_images
from guided_diffusion.data.listing import list_records
from guided_diffusion.data.sources import open_source


@pytest.fixture
def images() -> np.ndarray:
    return synthetic_images(7, 7, 12, 10)


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
    if kind == "npz":
        assert one == hashlib.sha256((tmp_path / "a" / "images.npz").read_bytes()).hexdigest()


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
    np.savez(tmp_path / "bad.npz", images, np.arange(7) - 1)
    with pytest.raises(ValueError, match="the label -1; classes are numbered from 0"):
        open_images(tmp_path / "bad.npz").want_labels()


BAD_LABELS = {
    "words": np.array(["cat", "dog"] * 4)[:7],
    "objects": np.array([{"cat": 1}] * 7, dtype=object),
    "one-hot": np.eye(7),
    "floats": np.arange(7.0),
    "column": np.arange(7)[:, None],
    "too many": np.arange(8),
    "truth values": np.arange(7) % 2 == 0,
    "one number": np.array(3),
    "complex": np.arange(7) * 1j,
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_are_judged_when_they_are_wanted(kind, images, tmp_path):
    labels = BAD_LABELS[kind]
    np.savez(tmp_path / "x.npz", images, labels)
    source = open_images(tmp_path / "x.npz")
    assert np.array_equal(all_of(source), images)
    with pytest.raises(ValueError, match=r"arr_1.* in .*x\.npz"):
        source.want_labels()
    stream = open_images([(images, labels)])
    assert len(all_of(stream)) == 7
    with pytest.raises(ValueError, match="labels of shape"):
        stream.labels()
    wanted = open_images(iter([(images, labels)]))
    wanted.want_labels()
    with pytest.raises(ValueError, match="labels of shape"):
        all_of(wanted)


def damaged_member(path, name):
    """Turn the bytes of one member of an npz file into noise."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    data[start : start + info.compress_size] = b"\x55" * info.compress_size
    path.write_bytes(data)


@pytest.mark.parametrize("compressed", [False, True])
def test_members_that_nobody_asks_for_may_be_anything(compressed, images, tmp_path):
    path = tmp_path / "x.npz"
    more = {
        "prompts": np.array([f"photo {i}" for i in range(7)]),
        "config": np.array({"cfg": 1.5}, dtype=object),
        "spectrum": np.zeros(4, np.complex64),
        "wide": np.zeros(4, np.longdouble),
        "when": np.zeros(3, "datetime64[s]"),
        "fields": np.zeros(2, [("a", "i4"), ("b", "f4")]),
        "empty": np.zeros((0, 3)),
        "deep": np.zeros((1,) * 9),
        "torn": np.arange(5),
    }
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images, **more)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "made on a Monday")
        archive.writestr("nonsense.npy", b"no array")
        archive.writestr("twice.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("twice.npy", b"")
    damaged_member(path, "torn.npy")
    source = open_images(path)
    assert np.array_equal(all_of(source), images) and source.labels() is None and source.statistics() is None
    assert not source.notes


def test_a_member_that_is_needed_twice_is_refused(images, tmp_path):
    np.savez(tmp_path / "x.npz", images)
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("arr_0.npy", archive.read("arr_0.npy"))
    with pytest.raises(ValueError, match="two arrays called 'arr_0'"):
        open_images(tmp_path / "x.npz")


def test_statistics(images, tmp_path):
    rng = np.random.RandomState(0)
    full = {f"{kind}{end}": rng.rand(size) for end, size in (("", 2048), ("_s", 2023)) for kind in ("mu", "sigma")}
    full = {name: (value if "mu" in name else np.diag(value)).astype(np.float32) for name, value in full.items()}
    np.savez(tmp_path / "ref.npz", arr_0=images, **full)
    source = open_images(tmp_path / "ref.npz")
    pool, spatial = source.statistics()
    found = {"mu": pool.mu, "sigma": pool.sigma, "mu_s": spatial.mu, "sigma_s": spatial.sigma}
    assert all(np.array_equal(found[name], full[name]) and found[name].dtype == np.float64 for name in full)
    np.savez(tmp_path / "alone.npz", **full)
    alone = open_images(tmp_path / "alone.npz")
    assert alone.count == 0
    assert list(alone.batches(4)) == []
    assert "statistics only" in alone.notes[0]
    for absent in (["mu_s"], ["sigma_s"], ["mu_s", "sigma_s"]):  # as other evaluators save them: enough for FID
        np.savez(tmp_path / "pool.npz", **{name: value for name, value in full.items() if name not in absent})
        pool, spatial = open_images(tmp_path / "pool.npz").statistics()
        assert spatial is None and np.array_equal(pool.sigma, full["sigma"])
    for absent in (["mu"], ["mu", "sigma"], ["mu", "mu_s", "sigma_s"]):
        rest = {name: value for name, value in full.items() if name not in absent}
        np.savez(tmp_path / "rest.npz", arr_0=images, **rest)
        source = open_images(tmp_path / "rest.npz")
        assert source.statistics() is None and "without mu: not used" in source.notes[0]
    for change, words in (
        ({"sigma": None}, "mu without sigma"),
        ({"mu": np.zeros(768)}, r"shape \(768,\) .* another network"),
        ({"mu_s": np.zeros(2048)}, r"mu_s in .* expected \(2023,\)"),
        ({"mu": np.zeros(2048, int)}, "dtype int64"),
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
        (np.ones((2, 4, 4, 3), complex), "no images"),
        (np.array([None]), "no images"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(array, words):
    with pytest.raises(ValueError, match=words):
        open_images(array)


@pytest.mark.parametrize("shape", [(32, 24, 3), (3, 32, 24), (32, 24, 1), (32, 24, 4), (4, 32, 24)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_one_image_is_no_set_of_images(shape, dtype, tmp_path):
    image = np.linspace(0, 1 if dtype is np.float32 else 255, int(np.prod(shape))).reshape(shape).astype(dtype)
    np.savez(tmp_path / "x.npz", image)
    np.save(tmp_path / "x.npy", image)
    words = rf"shape {re.escape(str(shape))} and dtype {np.dtype(dtype)}: one image .* \[N, H, W, 3\]"
    for source in (tmp_path / "x.npz", tmp_path / "x.npy", image, torch.from_numpy(image)):
        with pytest.raises(ValueError, match=words):
            open_images(source)
    with pytest.raises(ValueError, match=words):
        all_of(open_images(iter([image]), value_range=(0, 1) if dtype is np.float32 else None))


def test_a_last_batch_of_three_grey_images_is_no_image(images):
    stream = open_images([images[..., 0], images[:3, ..., 0]])
    assert np.array_equal(all_of(stream), np.repeat(np.concatenate([images, images[:3]])[..., :1], 3, axis=3))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.eye(4, dtype=np.int64)[None, :, :, None].repeat(5, 0), "int64 from 0 to 1"),
        (np.eye(6, dtype=np.int16)[None].repeat(5, 0), "int16 from 0 to 1"),
        (np.zeros((5, 4, 4, 3), np.int32), "int32 from 0 to 0"),
        (np.eye(4, dtype=np.uint8)[None, :, :, None].repeat(5, 0), r"only 0 and 1 \(uint8\)"),
        (np.full((5, 4, 4, 3), 60_000, np.uint16), "uint16 from 60000 to 60000.* Convert"),
        (np.full((5, 4, 4, 3), -3, np.int8), "int8 from -3 to -3.* Convert"),
        (np.eye(4)[None, :, :, None].repeat(5, 0) > 0, "truth values .*multiply by 255"),
    ],
    ids=lambda value: str(value)[-30:] if isinstance(value, str) else "",
)
def test_integers_that_are_no_images(array, words, tmp_path):
    np.save(tmp_path / "x.npy", array)
    for source in (array, tmp_path / "x.npy"):
        with pytest.raises(ValueError, match=words):
            open_images(source)
    with pytest.raises(ValueError, match="a batch"):
        all_of(open_images(iter([array])))


def test_tensors_and_loaders_of_pytorch(images):
    tensor = torch.from_numpy(images)
    assert np.array_equal(all_of(open_images(tensor.permute(0, 3, 1, 2))), images)
    halves = open_images((tensor.bfloat16() / 255).clamp(0, 1))
    assert np.abs(all_of(halves).astype(int) - images).max() <= 2 and "[0, 1]" in halves.notes[0]
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tensor, torch.arange(7)), batch_size=3)
    loaded = open_images(pairs)
    assert np.array_equal(all_of(loaded), images) and loaded.labels().tolist() == list(range(7))


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


def test_odd_pictures_have_the_pixels_that_training_sees(images, tmp_path):
    grey = Image.fromarray(images[0][..., 0])
    Image.fromarray(images[0][..., 0].astype(np.uint16) * 257).save(tmp_path / "a16.png")
    Image.fromarray(images[0]).convert("CMYK").save(tmp_path / "b.jpg")
    grey.convert("1").save(tmp_path / "c.tif")
    Image.fromarray(images[0]).save(tmp_path / "d.gif", save_all=True, append_images=[Image.fromarray(images[1])])
    records = list_records(tmp_path)
    expected = [open_source("files", "").read(path) for path in records.paths]
    assert np.array_equal(all_of(tmp_path), np.stack(expected))
    assert np.array_equal(expected[0][..., 0], images[0][..., 0])


def test_classes_are_those_of_training(images, tmp_path):
    for k in range(4):
        (tmp_path / "edm" / f"0000{k // 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[k]).save(tmp_path / "edm" / f"0000{k // 2}" / f"img0000{k // 2}{k:03d}.png")
    assert open_images(tmp_path / "edm").labels() is None
    names = [f"0000{k // 2}/img0000{k // 2}{k:03d}.png" for k in range(4)]
    table = tmp_path / "edm" / "dataset.json"
    table.write_text(json.dumps({"labels": [[name, k % 2] for k, name in enumerate(names)]}))
    assert open_images(tmp_path / "edm").labels().tolist() == [0, 1, 0, 1]
    table.write_text("{")
    source = open_images(tmp_path / "edm")
    assert np.array_equal(all_of(source), images[:4])  # nobody asked for labels
    with pytest.raises(ValueError, match=r"dataset\.json"):
        source.labels()


def test_large_pictures_come_in_small_batches(tmp_path):
    for k in range(5):
        Image.new("RGB", (3000, 2000), (k, 0, 0)).save(tmp_path / f"{k}.png")
    batches = list(open_images(tmp_path).batches(64))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    cropped = reference.CroppedImages(open_images(tmp_path), 8)
    assert [batch.shape for batch in cropped.batches(64)] == [(5, 8, 8, 3)]


def test_a_zip_of_pictures_may_hold_an_array_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.png", encoded(np.zeros((4, 4, 3), np.uint8)))
        archive.writestr("emb.npy", b"")
    assert open_images(tmp_path / "z.zip").count == 1
    for array in ("arr_0.npy", "mu.npy"):  # either may be meant
        shutil.copy(tmp_path / "z.zip", tmp_path / "both.zip")
        with zipfile.ZipFile(tmp_path / "both.zip", "a") as archive:
            archive.writestr(array, b"")
        with pytest.raises(ValueError, match=rf"both\.zip holds {array} and beside it 1 images \(first: 'a\.png'\)"):
            open_images(tmp_path / "both.zip")
