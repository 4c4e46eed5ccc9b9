"""Which images are found in a folder, a zip, tars or an lmdb, and in which order: those of what it would be once unpacked."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from image_archives import CLASSES, MAKERS, grey_levels, make_folder, make_tar, make_zip, picture, pixels
from PIL import Image

from guided_diffusion.data import packed
from guided_diffusion.data.listing import Records, list_records
from guided_diffusion.data.loader import make_batches
from guided_diffusion.data.sources import SOURCES, Source, open_source
from guided_diffusion.runtime import storage

NAMES = "b.png,a_1.JPG,a.b/x_2.jpeg,a/z.gif,a/B/q_9_1.png,a-c/y.png,Z.png,a b.png,ä_3.png,a0.png".split(",")


def walk_like_2021(folder: str) -> list[str]:
    """The order of the 2021 release, from its description: the sorted names of a folder, folders opened where they stand."""
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.lower().rsplit(".", 1)[-1] in ("jpg", "jpeg", "png", "gif") and "." in name:
            found.append(path)
        elif os.path.isdir(path):
            found += walk_like_2021(path)
    return found


def test_order_and_classes_from_prefixes_are_those_of_2021(write_pictures):
    root = write_pictures(*NAMES)
    for name in ("notes.txt", "png"):
        (root / name).write_text("no image")
    (root / "empty").mkdir()
    expected = walk_like_2021(str(root))
    records = list_records(root, labels="prefix")
    assert list(records.paths) == list(list_records(f"{root}/").paths) == expected
    prefixes = [os.path.basename(path).split("_")[0] for path in expected]
    assert list(records.class_names) == sorted(set(prefixes)) and records.labels.dtype == np.int64
    assert [records.class_names[k] for k in records.labels] == prefixes


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("top", ["", "./", "/", "top/"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_names_are_those_of_the_unpacked_folder(kind, top, slash, tmp_path):
    found = list_records(MAKERS[kind](tmp_path / kind, [((top + n).replace("/", slash), b) for n, b in CLASSES]))
    assert [name.rsplit("/")[-1] for name in found.class_names] == ["cat", "dog"]
    assert found.labels.tolist() == ([0, 1, 0, 1] if kind == "a.tar" else [0, 0, 1, 1])
    assert found.label_source == "folders"


@pytest.mark.parametrize("kind", MAKERS)
def test_what_file_managers_leave_is_no_image_and_no_label(kind, tmp_path):
    clutter = [
        ("._x.png", b"\0\5"), ("cat/._0.png", b"\0\5"), ("__MACOSX/cat/._0.png", b"\0"), ("__MACOSX/1.png", b"\0"), (".DS_Store", b""),
        ("cat/Thumbs.db", b""), (".git/x/1.png", b""), ("cat/._0.cls", b"\0\5\xaa"), ("._dataset.json", b"\xaa"), ("desktop.ini", b""),
    ]  # fmt: skip
    found = list_records(MAKERS[kind](tmp_path / kind, [*clutter, *CLASSES]))
    assert len(found) == 4 and found.class_names == ("cat", "dog") and found.left_out == ""


@pytest.mark.parametrize("store", ["a.tar", "b.TAR", "data.mdb", "packed.json"])
def test_an_archive_never_hides_images_beside_it(store, tmp_path):
    root = make_folder(tmp_path / "d", [*CLASSES, (store, b"")])
    with pytest.raises(ValueError, match=rf"holds 4 images \(first: 'cat/0.png'.* and beside them '{store}'"):
        list_records(root)
    for other in {"a.tar", "data.mdb", "packed.json"} - {"a.tar" if "tar" in store.lower() else store}:
        two = make_folder(tmp_path / f"with {other}", [(name, b"") for name in (store, other)])
        with pytest.raises(ValueError, match=rf"holds '({store}|{other})' and beside them '({store}|{other})'"):
            list_records(two)


def test_archives_that_are_not_opened_are_counted(tmp_path):
    others = [("b.zip", b""), ("cat/c.tar", b""), ("d.tar.gz", b""), ("notes", b"")]
    root = make_folder(tmp_path / "d", [*CLASSES, *others, ("x.tar/9.png", picture(9))])  # x.tar is a folder
    found = list_records(root)
    assert len(found) == 5 and "x.tar" in found.class_names
    assert found.left_out == "4 files were left out: .zip 1, .tar 1, .tar.gz 1, without an ending 1"
    only = make_folder(tmp_path / "e", [("x/0.tar", b"")])
    with pytest.raises(ValueError, match=r"no images found; .*1 file was left out: \.tar 1"):
        list_records(only)
    with pytest.raises(ValueError, match=r"nested\.zip': no images found.*\.zip 1.*archives in archives"):
        list_records(make_zip(tmp_path / "nested.zip", [("inner.zip", b"")]))


def test_every_format_is_read_or_counted(tmp_path):
    endings = {"png": "PNG", "JPG": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF", "TIFF": "TIFF"}
    endings |= {"ppm": "PPM", "gif": "GIF", "bmp": "BMP", "tga": "TGA"}
    for ending, form in endings.items():
        Image.fromarray(np.full((4, 5, 3), 40, np.uint8)).save(tmp_path / f"x.{ending}", form)
    for name in ("a.psd", "b.PSD", "c.heic", "labels.csv"):
        (tmp_path / name).write_bytes(b"")
    assert grey_levels(tmp_path) == [2] * len(endings)
    assert list_records(tmp_path).left_out == "4 files were left out: .psd 2, .heic 1, .csv 1"


def test_shards_by_pattern(tmp_path):
    for k in range(3):
        make_tar(tmp_path / f"n{k:02d}.tar", [(f"./{k}_{i}.png", picture(2 * k + i)) for i in range(2)])
    for pattern in ("", "n{00..02}.tar", "n*.tar", "**/n0[0-2].tar"):
        assert grey_levels(f"{tmp_path}/{pattern}") == list(range(6))
    assert grey_levels(tmp_path / "n01.tar") == [2, 3]
    for pattern, words in (("n{01..04}.tar", r"2 of 4 shards are missing .*n03\.tar"), ("m*.tar", "no such file")):
        with pytest.raises(ValueError, match=words):
            list_records(tmp_path / pattern)


def test_links_in_a_tar_stand_for_what_they_lead_to(tmp_path):
    symbolic = tarfile.SYMTYPE
    links = [
        ("b/0.png", "a/0.png", tarfile.LNKTYPE), ("c", "a", symbolic), ("d/1.png", "../b/0.png", symbolic), ("a/up", "..", symbolic),
        ("a/self", "../a", symbolic), ("e.png", "/etc/passwd", symbolic), ("f.png", "g.png", symbolic), ("g.png", "f.png", symbolic),
    ]  # fmt: skip
    path = make_tar(tmp_path / "a.tar", [("a/0.png", picture(3)), ("a/1.png", picture(4))], links)
    assert sorted(grey_levels(path)) == [3, 3, 3, 3, 4, 4]
    left_out = list_records(path).left_out
    assert left_out.startswith("5 files were") and all(f"link '{n}'" in left_out for n in ("a/up", "a/self", "e.png"))


def test_damaged_archives_are_named(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", CLASSES).read_bytes()
    locked = bytearray(make_zip(tmp_path / "locked.zip", [("a.png", picture(1))]).read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    bomb = bytearray(make_zip(tmp_path / "bomb.zip", [("a.png", picture(1))]).read_bytes())
    at = bomb.index(b"PK\x01\x02") + 24  # where the directory says how long the member is once unpacked
    bomb[at : at + 4] = (1 << 30).to_bytes(4, "little")
    sparse = tarfile.TarInfo("a.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    files = {
        "joined.tar": whole + whole,
        "cut.tar": whole[:1400],
        "short.tar": whole[:600],
        "locked.zip": bytes(locked),
        "bomb.zip": bytes(bomb),
        "sparse.tar": sparse.tobuf() + bytes(1024),
    }
    files |= {"bad.zip": b"nonsense" * 200, "bad.tar": b"nonsense" * 200, "a.rar": b""}
    make_folder(tmp_path, [*files.items(), ("empty/.hidden", b"")])
    make_zip(tmp_path / "twice.zip", [("a.png", picture(1)), ("./a.png", picture(2))])
    make_tar(tmp_path / "twice.tar", [("a.png", picture(1)), ("a.png", picture(2))])
    for name, words in {
        "joined.tar": "joined by cat", "cut.tar": "cut off", "short.tar": "unexpected end of data", "twice.zip": "'a.png' twice",
        "twice.tar": "'a.png' twice", "locked.zip": "'a.png' is encrypted", "bomb.zip": "'a.png' claims 1073741824 bytes",
        "sparse.tar": "'a.png' is stored with holes", "bad.zip": "not a readable", "bad.tar": "not a readable",
        "a.rar": r"is a file; must be a folder, or end with \.zip or \.tar", "gone.zip": "no such folder or file",
        "gone": "no such folder or file", "empty": r"looked for \.jpg",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}'.*({words})"):
            list_records(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.zip: x/broken\.png': not an image"):
        pixels(list_records(make_zip(tmp_path / "a.zip", [("x/broken.png", b"nonsense")])))
    with pytest.raises(ValueError, match="unspecified data directory"):
        list_records("")
    with pytest.raises(ValueError, match="kind='rar': must be one of files, zip, tar, lmdb, packed"):
        open_source("rar", "")


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    store = make_folder(tmp_path / "store", CLASSES)
    root = make_folder(tmp_path / "d", [("owl/5.png", picture(5))])
    (root / "cat").symlink_to(store / "cat")
    (root / "hound").symlink_to(store / "dog")
    (root / "dog").symlink_to(store / "dog")  # two links to one folder are two folders
    (root / "owl" / "round").symlink_to(root)
    (root / "owl" / "up").symlink_to(tmp_path)  # a folder above the root
    (store / "cat" / "back").symlink_to(store)
    found = list_records(root)
    assert found.class_names == ("cat", "dog", "hound", "owl") and np.bincount(found.labels).tolist() == [2, 2, 2, 1]
    for one, other in ((root / "owl", root / "cat"), (store / "dog", root / "hound")):
        (one / "a").symlink_to(other)
    assert len(list_records(root)) > 7  # folders that lead to each other


def test_links_that_lead_nowhere_are_named(tmp_path):
    root = make_folder(tmp_path / "d", CLASSES)
    (root / "owl").symlink_to(tmp_path / "gone")
    (root / "cat" / "9.png").symlink_to(tmp_path / "gone.png")
    found = list_records(root)
    assert found.left_out == "1 file was left out: broken link 'owl' 1" and found.empty_folders == ("owl",)
    with pytest.raises(ValueError, match="'owl'"):
        found.require_labels()
    with pytest.raises(ValueError, match=r"9\.png': No such file"):
        pixels(found)


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="needs file names that are not UTF-8")
def test_names_that_are_not_utf8_are_shown_escaped(tmp_path, monkeypatch):
    from guided_diffusion.cli.main import main

    for name in (b"caf\xe9/1.png", b"caf\xe9/\xff.png", b"th\xe8/3.png"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"no image" if b"\xff" in name else picture(1))
    found = list_records(tmp_path)
    assert len(found.digest()) == 64
    assert [os.fsencode(name) for name in found.class_names] == [b"caf\xe9", b"th\xe8"]
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["data", "check", str(tmp_path), "--quiet"]) == 1
    stdout.flush()
    printed = stdout.buffer.getvalue().decode()
    assert "3 images" in printed and r"caf\udce9" in printed and r"\udcff.png" in printed


def test_taking_some_records_keeps_class_numbers(write_pictures):
    records = list_records(write_pictures("a/1.png", "b/1.png", "b/2.png"))
    assert records.take(slice(1, None)).labels.tolist() == [1, 1]
    assert records.take([2, 0]).paths == (records.paths[2], records.paths[0])
    assert records.take([2, 0]).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        Records(("a", "b"), np.array([0]))


def lmdb_of(path, members):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for name, content in members:
            transaction.put(name.encode(), content)
    return path


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a", "lmdb", "packed"])
def test_every_source_gives_the_same_images_to_threads_and_workers(write_pictures, tmp_path, kind):
    names = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/10.png", "dog/2.png")
    folder = list_records(write_pictures(*names))
    members = [(name, (tmp_path / "pictures" / name).read_bytes()) for name in names]
    if kind == "packed":
        records = packed.pack(folder, tmp_path / kind, (12, 14))
        folder = list_records(make_folder(tmp_path / "crops", [(n, picture(0)) for n in names]))
        for path, crop in zip(folder.paths, pixels(records)):
            Image.fromarray(crop).save(path)
    else:
        records = list_records((MAKERS | {"lmdb": lmdb_of})[kind](tmp_path / kind, members))
    options = {"image_size": 8, "batch_size": 4, "seed": 1}
    here, there = make_batches(folder, **options), make_batches(records, workers=2, **options)
    for a, b in islice(zip(here, there), 3):
        assert torch.equal(a.images, b.images)
    source, expected = open_source(records.kind, records.root), pixels(folder)
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        for image, one in zip(pool.map(copy.read, records.paths * 20), expected * 20, strict=True):
            np.testing.assert_array_equal(image, one)


def test_threads_do_not_move_each_others_file(tmp_path, monkeypatch):
    records = list_records(make_tar(tmp_path / "a.tar", CLASSES))
    real = storage.open_file

    class Slow:
        """A file on which another thread gets its turn between seek and read."""

        def __init__(self, path: str, mode: str = "rb") -> None:
            self.file = real(path, mode)
            self.read = self.file.read

        def seek(self, offset: int) -> None:
            self.file.seek(offset)
            time.sleep(0.002)

    monkeypatch.setattr(storage, "open_file", Slow)
    source = open_source(records.kind, records.root)
    with ThreadPoolExecutor(4) as pool:
        levels = [int(image[0, 0, 0]) // 20 for image in pool.map(source.read, records.paths * 8)]
    assert levels == [0, 1, 2, 3] * 8


class Npz(Source):
    """A new kind of source, as a user adds it: the images of an npz, uint8 `[N, H, W, C]`; the address of one is its number."""

    kind, ending, all_images, threads_share = "npz", ".npz", True, True

    def members(self, files, others):
        return {f"{k:08d}": str(k) for k in range(len(np.load(self.root)["arr_0"]))}

    def open(self):
        images = np.load(self.root)["arr_0"]
        return lambda address: images[int(address)]


def test_a_new_kind_of_source_is_one_class_and_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "npz", Npz)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images)
    records = list_records(tmp_path / "a.npz")
    assert (records.kind, records.labels) == ("npz", None)
    np.testing.assert_array_equal(pixels(records), images)
    np.testing.assert_array_equal(pixels(packed.pack(records, tmp_path / "packed", 8)), images)
    batch = next(make_batches(records, image_size=8, batch_size=6, workers=1, shuffle=False))
    np.testing.assert_array_equal(batch.images, images)
    (tmp_path / "t.csv").write_text("".join(f"{k:08d},{k}\n" for k in range(6)))
    assert list_records(tmp_path / "a.npz", labels=str(tmp_path / "t.csv")).labels.tolist() == list(range(6))
    (tmp_path / "a.rar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"end with \.zip or \.tar or \.npz"):
        list_records(tmp_path / "a.rar")


def test_an_lmdb_has_no_labels_of_its_own(tmp_path):
    root = lmdb_of(tmp_path / "lmdb", [(f"{name}_{k}", picture(k)) for name in ("cat", "dog") for k in range(2)])
    assert list_records(root).labels is None
    assert list_records(root, labels="prefix").class_names == ("cat", "dog")


def test_lmdb_without_the_package_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="pip install lmdb"):
        list_records(tmp_path)


@pytest.mark.parametrize("content", [b"", b"MDB of something else", bytes(8192)])
def test_an_lmdb_that_is_something_else_is_named(tmp_path, content):
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(ValueError, match=r"data.mdb: not a readable lmdb|no images found"):
        list_records(str(tmp_path))
