"""Archives and packed folders read like the folder they were made from."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion.data import images, packed
from guided_diffusion.data.listing import Records, list_records
from guided_diffusion.data.loader import make_batches
from guided_diffusion.data.sources import open_source
from guided_diffusion.runtime import storage

NAMES = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/10.png", "dog/2.png")


def pixels(records: Records, channels: int = 3) -> list[np.ndarray]:
    reader = open_source(records.kind, records.root)
    return [reader.read(path, channels) for path in records.paths]


def assert_same_pictures(left: Records, right: Records) -> None:
    for a, b in zip(pixels(left), pixels(right), strict=True):
        np.testing.assert_array_equal(a, b)


def zipped(root: Path, target: Path, table: object = "absent") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for name in reversed(NAMES):
            archive.write(root / name, name)
        archive.writestr("readme.txt", "no picture")
        if table != "absent":
            archive.writestr("dataset.json", json.dumps({"labels": table}))
    return target


def tarred(root: Path, target: Path, names: tuple[str, ...], label: str = "cls") -> Path:
    with tarfile.open(target, "w") as archive:
        for name in names:
            archive.add(root / name, name.replace("/", "-"))
            text = name.split("/")[0].encode() if label == "cls" else json.dumps({"label": ord(name[0])}).encode()
            info = tarfile.TarInfo(name.replace("/", "-").split(".")[0] + f".{label}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return target


def test_zip_with_its_table(write_pictures, tmp_path):
    root = write_pictures(*NAMES)
    records = list_records(zipped(root, tmp_path / "a.zip", [[name, k] for k, name in enumerate(NAMES)]))
    assert records.kind == "zip"
    assert records.paths == NAMES
    assert records.labels.tolist() == [0, 1, 2, 3, 4]
    assert records.label_source.endswith("a.zip/dataset.json")
    assert_same_pictures(records, list_records(root))


def test_zip_without_or_with_an_empty_table(write_pictures, tmp_path):
    root = write_pictures(*NAMES)
    assert list_records(zipped(root, tmp_path / "a.zip")).class_names == ("cat", "dog")
    assert list_records(zipped(root, tmp_path / "b.zip", None)).labels is None
    with pytest.raises(ValueError, match="4 of 5 images have no label"):
        list_records(zipped(root, tmp_path / "c.zip", [["cat/1.png", 0]]))


@pytest.mark.parametrize(("label", "expected"), [("cls", [0, 0, 1, 1, 1]), ("json", [99, 99, 100, 100, 100])])
def test_tars_with_labels_beside_the_pictures(write_pictures, tmp_path, label, expected):
    root = write_pictures(*NAMES)
    (tmp_path / "shards").mkdir()
    tarred(root, tmp_path / "shards" / "00.tar", NAMES[:3], label)
    tarred(root, tmp_path / "shards" / "01.tar", NAMES[3:], label)
    records = list_records(tmp_path / "shards")
    assert records.kind == "tar"
    assert records.labels.tolist() == expected
    assert_same_pictures(records, list_records(root))
    single = list_records(tmp_path / "shards" / "01.tar")
    np.testing.assert_array_equal(pixels(single)[0], pixels(records)[3])


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_broken_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"nonsense" * 200)
    with pytest.raises(ValueError, match=rf"{name}': not a readable"):
        list_records(tmp_path / name)
    (tmp_path / "a.rar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file; must be a folder, or end with \.zip or \.tar"):
        list_records(tmp_path / "a.rar")


def test_a_broken_picture_in_an_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/broken.png", b"nonsense")
    with pytest.raises(ValueError, match=r"a\.zip: x/broken\.png': not an image"):
        pixels(list_records(tmp_path / "a.zip"))


def test_lmdb_without_the_package_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="pip install lmdb"):
        list_records(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("lmdb") is None, reason="needs lmdb")
def test_lsun_lmdb(write_pictures, tmp_path):
    import lmdb

    root = write_pictures(*NAMES)
    with (
        lmdb.open(str(tmp_path / "lsun"), map_size=1 << 22) as environment,
        environment.begin(write=True) as transaction,
    ):
        for name in NAMES:
            transaction.put(name.encode(), (root / name).read_bytes())
    records = list_records(tmp_path / "lsun")
    assert records.kind == "lmdb"
    assert_same_pictures(records, list_records(root))
    with ThreadPoolExecutor(4) as pool:
        reader = open_source(records.kind, records.root)
        assert all(picture.ndim == 3 for picture in pool.map(reader.read, records.paths * 4))


@pytest.mark.parametrize("make", ["zip", "tar", "packed"])
def test_a_reader_goes_to_workers_and_threads(write_pictures, tmp_path, make):
    root = write_pictures(*NAMES)
    if make == "zip":
        records = list_records(zipped(root, tmp_path / "a.zip"))
    elif make == "tar":
        records = list_records(tarred(root, tmp_path / "a.tar", NAMES))
    else:
        records = packed.pack(list_records(root), tmp_path / "out", 8)
    reader = open_source(records.kind, records.root)
    before = [reader.read(path) for path in records.paths]
    copy = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(4) as pool:
        for picture, expected in zip(pool.map(copy.read, records.paths * 20), before * 20):
            np.testing.assert_array_equal(picture, expected)
    options = {"image_size": 8, "batch_size": 4, "seed": 1}
    here, there = make_batches(records, **options), make_batches(records, workers=2, **options)
    for a, b in islice(zip(here, there), 4):
        assert torch.equal(a.images, b.images)


def test_threads_do_not_move_each_others_file(write_pictures, tmp_path, monkeypatch):
    root = write_pictures(*NAMES)
    records = list_records(tarred(root, tmp_path / "a.tar", NAMES))
    real = storage.open_file

    class Slow:
        """A file on which another thread gets its turn between seek and read."""

        def __init__(self, path: str, mode: str = "rb") -> None:
            self.file = real(path, mode)
            self.read = self.file.read

        def seek(self, offset: int) -> None:
            self.file.seek(offset)
            time.sleep(0.002)

    expected = pixels(records)
    monkeypatch.setattr(storage, "open_file", Slow)
    reader = open_source(records.kind, records.root)
    with ThreadPoolExecutor(4) as pool:
        for picture, other in zip(pool.map(reader.read, records.paths * 8), expected * 8):
            np.testing.assert_array_equal(picture, other)


@pytest.mark.parametrize("size", [8, (6, 10)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_packed_rows_are_what_the_loader_makes(write_pictures, tmp_path, size, channels):
    source = list_records(write_pictures(*NAMES))
    done = packed.pack(source, tmp_path / "out", size, channels=channels, shard_bytes=8 * 8 * channels * 2)
    assert done.kind == "packed"
    assert done.preprocessing == images.preprocessing_id(size, channels)
    assert done.labels.tolist() == source.labels.tolist()
    assert done.class_names == source.class_names
    assert done.label_source == "folders"
    assert len(list((tmp_path / "out").glob("images-*.npy"))) == 3
    options = {"image_size": size, "batch_size": 4, "channels": channels, "seed": 4}
    for a, b in islice(zip(make_batches(source, **options), make_batches(done, **options)), 4):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_packed_files_are_plain_numpy(write_pictures, tmp_path):
    source = list_records(write_pictures(*NAMES))
    packed.pack(source, tmp_path / "out", 8)
    mapped = np.load(tmp_path / "out" / "images-00000.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert mapped.shape == (5, 8, 8, 3)
    assert mapped.dtype == np.uint8
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0, 0, 1, 1, 1]
    assert (tmp_path / "out" / "names.txt").read_text().splitlines() == list(source.paths)
    assert packed.verify(tmp_path / "out") == []
    shard = tmp_path / "out" / "images-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    (tmp_path / "out" / "labels.npy").unlink()
    assert [os.path.basename(text.split(":")[0]) for text in packed.verify(tmp_path / "out")] == [
        "images-00000.npy",
        "labels.npy",
    ]


def test_packed_labels_may_be_replaced_or_dropped(write_pictures, tmp_path):
    done = packed.pack(list_records(write_pictures(*NAMES)), tmp_path / "out", 8)
    assert list_records(done.root, labels="none").labels is None
    (tmp_path / "t.csv").write_text("".join(f"{k},{k}\n" for k in range(5)))
    assert list_records(done.root, labels=str(tmp_path / "t.csv")).labels.tolist() == [0, 1, 2, 3, 4]


def test_packed_pictures_are_not_blown_up_silently(write_pictures, tmp_path):
    done = packed.pack(list_records(write_pictures(*NAMES)), tmp_path / "out", 8)
    options = {"batch_size": 2}
    next(make_batches(done, image_size=4, **options))
    next(make_batches(done, image_size=6, crop="random", **options))
    with pytest.raises(
        ValueError, match=r"packed at 8x8, but crop='center' at 9x9 needs at least 9x9; pack the source"
    ):
        make_batches(done, image_size=9, **options)
    with pytest.raises(ValueError, match=r"crop='random' at 8x8 needs at least 10x10"):
        make_batches(done, image_size=8, crop="random", **options)


def test_packing_refuses_or_leaves_out_what_it_cannot_read(write_pictures, tmp_path):
    root = write_pictures(*NAMES)
    (root / "cat/2.png").write_bytes(b"")
    records = list_records(root)
    with pytest.raises(ValueError, match=r"cat/2\.png'.*on_error='skip'"):
        packed.pack(records, tmp_path / "one", 8)
    assert not (tmp_path / "one" / "packed.json").exists()
    seen: list[int] = []
    done = packed.pack(records, tmp_path / "two", 8, on_error="skip", progress=seen.append)
    assert sum(seen) == 5
    assert done.labels.tolist() == [0, 1, 1, 1]
    assert ["cat/2.png" in reason for reason in packed.list_skipped(tmp_path / "two")] == [True]


def test_packing_mistakes(write_pictures, tmp_path):
    records = list_records(write_pictures("a.png"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        packed.pack(records, tmp_path / "full", 8)
    with pytest.raises(ValueError, match="on_error='ignore'"):
        packed.pack(records, tmp_path / "new", 8, on_error="ignore")
    with pytest.raises(ValueError, match="workers=0"):
        packed.pack(records, tmp_path / "new", 8, workers=0)
    Path(records.paths[0]).write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images"):
        packed.pack(records, tmp_path / "new", 8, on_error="skip")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "packed.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="format 2; this version reads format 1"):
        list_records(tmp_path / "later")
    with pytest.raises(ValueError, match="kind='rar': must be one of files, zip, tar, lmdb, packed"):
        open_source("rar", "")
