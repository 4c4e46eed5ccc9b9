"""Folders, zips and tars as people make them: the pictures and classes of what they would be once unpacked, or a word."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.data.listing import list_records
from guided_diffusion.data.sources import image_files, open_source

Member = tuple[str, bytes]


def picture(k: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 20 * k, np.uint8)).save(stream, form)
    return stream.getvalue()


def grey_levels(path: Path | str) -> list[int]:
    """Which pictures were listed, in order: picture k is 20 k all over."""
    records = list_records(path, labels="none")
    reader = open_source(records.kind, records.root)
    return [int(reader.read(one)[0, 0, 0]) // 20 for one in records.paths]


def make_zip(path: Path, members: Sequence[Member]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name  # as it is: the module would tidy it
            archive.writestr(info, content)
    return path


def make_tar(path: Path, members: Sequence[Member], links: Sequence[tuple[str, str, bytes]] = ()) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


def make_folder(path: Path, members: Sequence[Member]) -> Path:
    for name, content in members:
        target = path / name.replace("\\", "/").lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return path


MAKERS: dict[str, Callable[..., Path]] = {"a.zip": make_zip, "a.tar": make_tar, "a": make_folder}
CLASSES = [(f"{c}/{k}.png", picture(k)) for k, c in enumerate(("cat", "dog", "cat", "dog"))]
EDM = [(f"0000{k // 2}/img0000{k // 2}{k:03d}.png", picture(k)) for k in range(4)]
TABLE = json.dumps({"labels": [[name, 3 * (k % 2)] for k, (name, _) in enumerate(EDM)]}).encode()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("top", ["", "./", "/", "top/", "./top/"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_names_are_those_of_the_unpacked_folder(kind, top, slash, tmp_path):
    found = list_records(MAKERS[kind](tmp_path / kind, [((top + n).replace("/", slash), b) for n, b in CLASSES]))
    assert [name.rsplit("/")[-1] for name in found.class_names] == ["cat", "dog"]
    assert found.labels.tolist() == ([0, 1, 0, 1] if kind == "a.tar" else [0, 0, 1, 1])
    assert found.label_source == "folders"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("top", ["", "./", "top/", "a/b/"])
def test_chunks_of_numbered_files_are_no_classes_but_their_table_holds_some(kind, top, tmp_path):
    inside = [(top + n, b) for n, b in EDM]
    assert list_records(MAKERS[kind](tmp_path / f"plain{kind}", inside)).labels is None
    found = list_records(MAKERS[kind](tmp_path / kind, [*inside, (top + "dataset.json", TABLE)]))
    assert found.labels.tolist() == [0, 3, 0, 3] and len(found.class_names) == 4
    assert found.label_source.endswith("dataset.json") and not found.left_out


@pytest.mark.parametrize(
    ("names", "are_chunks"),
    [
        (("000000/000000.png", "001000/001000.png", "001000/001999.png"), True),  # EDM's generate.py --subdirs
        (("00000/00000.png", "01000/01234.png"), True),  # FFHQ
        (("out/000000/000001.jpg", "out/002000/002999.jpg"), True),
        (("00012/img00012345.png", "00000/img00000001.png"), True),
        (("00000/00000.png", "00001/00000.png"), False),  # two classes, each counted from 0
        (("00000/00000_00012.ppm", "00001/00001_00003.ppm"), False),  # GTSRB
        (("0/00001.png", "1/10001.png"), False),
        (("00000/a.png", "00001/b.png"), False),
    ],
)
def test_what_is_a_chunk(names, are_chunks, tmp_path):
    found = list_records(make_folder(tmp_path / "d", [(name, picture(1, "PNG")) for name in names]))
    assert (found.label_source == "none") == are_chunks
    assert (found.labels is None) == are_chunks


@pytest.mark.parametrize("kind", MAKERS)
def test_what_file_managers_leave_is_no_picture_and_no_label(kind, tmp_path):
    clutter = [
        ("._x.png", b"\0\5"), ("cat/._0.png", b"\0\5"), ("__MACOSX/cat/._0.png", b"\0"), ("__MACOSX/1.png", b"\0"), (".DS_Store", b""),
        ("cat/Thumbs.db", b""), (".git/x/1.png", b""), ("cat/._0.cls", b"\0\5\xaa"), ("._dataset.json", b"\xaa"), ("desktop.ini", b""),
    ]  # fmt: skip
    found = list_records(MAKERS[kind](tmp_path / kind, [*clutter, *CLASSES]))
    assert len(found) == 4 and found.class_names == ("cat", "dog") and found.left_out == ""


@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
@pytest.mark.parametrize(
    ("beside", "numbers", "names"),
    [
        (lambda k: {"cls": b"%d\n" % (k % 2)}, [0, 1, 0], ("0", "1")),
        (lambda k: {"cls": [b"owl", b"ant"][k % 2]}, [1, 0, 1], ("ant", "owl")),
        (lambda k: {"cls": "1".encode("utf-16")}, [1, 1, 1], ("0", "1")),
        (lambda k: {"json": b'{"label": %d}' % (k % 2)}, [0, 1, 0], ("0", "1")),
        (lambda k: {"json": b'{"cls": "owl"}', "txt": b"an owl"}, [0, 0, 0], ("owl",)),
        (lambda k: {"cls": b"%d" % (k % 2), "json": b'{"label": "tench"}'}, [0, 1, 0], ("0", "1")),  # .cls counts
        (lambda k: {"json": b'{"caption": "owl"}', "txt": b"an owl"}, None, ()),
    ],
)
def test_labels_beside_the_pictures_of_an_archive(kind, beside, numbers, names, tmp_path):
    members = [(f"x.y/{k:03d}.{e}", b) for k in range(3) for e, b in [("v1.png", picture(k)), *beside(k).items()]]
    found = list_records(MAKERS[kind](tmp_path / kind, members))
    assert len(found) == 3 and found.class_names == names
    assert (found.labels if found.labels is None else found.labels.tolist()) == numbers


@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        (b"", r"1\.cls: the label of '.*1\.png' is ''"),
        (b"-1", "-1"),
        (b"owl", "'owl'; it must be a whole number"),
        (b"\xff\xfe\xff", "1\\.cls"),
    ],
)
def test_labels_that_are_not_wanted_stop_nothing(kind, label, complaint, tmp_path):
    members = [(f"{k}.{e}", b) for k in range(3) for e, b in (("png", picture(k)), ("cls", label if k == 1 else b"7"))]
    path = MAKERS[kind](tmp_path / kind, members)
    with pytest.raises(ValueError, match=complaint):
        list_records(path)
    assert len(list_records(path, labels="none")) == 3
    assert list_records(path, labels="prefix").class_names == ("0.png", "1.png", "2.png")


@pytest.mark.parametrize(
    "text", ["{", '{"labels": [["a", [0.1, 0.2]]]}', '{"x": 1}', '{"labels": [["0.png", 1.5]]}', "[]"]
)
def test_a_table_that_is_not_wanted_is_not_read(text, tmp_path):
    root = make_folder(tmp_path / "d", [*CLASSES, ("dataset.json", text.encode())])
    with pytest.raises(ValueError, match=r"dataset\.json"):
        list_records(root)
    assert list_records(root, labels="none").labels is None
    assert list_records(root, labels="folders").class_names == ("cat", "dog")
    archive = make_tar(tmp_path / "d.tar", [*CLASSES, ("dataset.json", text.encode())])
    assert list_records(archive, labels="folders").class_names == ("cat", "dog")


@pytest.mark.parametrize("store", ["a.tar", "b.TAR", "data.mdb", "packed.json"])
def test_an_archive_never_hides_pictures_beside_it(store, tmp_path):
    root = make_folder(tmp_path / "d", CLASSES)
    make_tar(root / store, EDM)
    with pytest.raises(ValueError, match=rf"holds 4 images \(first: 'cat/0.png'.* and beside them '{store}'"):
        list_records(root)


def test_archives_that_are_not_opened_are_counted(tmp_path):
    root = make_folder(
        tmp_path / "d", [*CLASSES, ("b.zip", b""), ("cat/c.tar", b""), ("d.tar.gz", b""), ("notes", b"")]
    )
    (root / "x.tar").mkdir()
    (root / "x.tar" / "9.png").write_bytes(picture(9))  # a folder, whatever it is called
    found = list_records(root)
    assert len(found) == 5 and "x.tar" in found.class_names
    assert found.left_out == "4 files were left out: .zip 1, .tar 1, .tar.gz 1, without an ending 1"
    for name, ending in (("e/0.tar.gz", ".tar.gz"), ("f/0.tgz", ".tgz"), ("g/x/0.tar", ".tar")):
        only = make_folder(tmp_path, [(name, b"")]) / name.split("/")[0]
        with pytest.raises(ValueError, match=rf"no images found; .*1 file was left out: \{ending} 1"):
            list_records(only)
    nested = make_zip(tmp_path / "nested.zip", [("inner.zip", b"")])
    with pytest.raises(ValueError, match=r"nested\.zip': no images found.*\.zip 1.*archives in archives"):
        list_records(nested)


def test_every_format_is_read_or_counted(tmp_path):
    endings = {"png": "PNG", "JPG": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF", "TIFF": "TIFF"}
    endings |= {"ppm": "PPM", "gif": "GIF", "bmp": "BMP", "tga": "TGA"}
    for ending, form in endings.items():
        Image.fromarray(np.full((4, 5, 3), 40, np.uint8)).save(tmp_path / f"x.{ending}", form)
    for name in ("a.psd", "b.PSD", "c.heic", "labels.csv"):
        (tmp_path / name).write_bytes(b"")
    assert grey_levels(tmp_path) == [2] * len(endings)
    assert list_records(tmp_path).left_out == "4 files were left out: .psd 2, .heic 1, .csv 1"
    assert len(image_files(str(tmp_path), ("jpg", "jpeg", "png", "gif"))) == 3  # the four of 2021 stay four


def test_shards_by_pattern_and_class_tars(tmp_path):
    for k in range(3):
        make_tar(tmp_path / f"n{k:02d}.tar", [(f"./{k}_{i}.png", picture(2 * k + i)) for i in range(2)])
    assert grey_levels(tmp_path) == grey_levels(str(tmp_path / "n{00..02}.tar")) == list(range(6))
    assert grey_levels(str(tmp_path / "n*.tar")) == grey_levels(str(tmp_path / "**" / "n0[0-2].tar")) == list(range(6))
    assert grey_levels(tmp_path / "n01.tar") == [2, 3]
    assert list_records(tmp_path, labels="prefix").class_names == ("0", "1", "2")
    assert list_records(tmp_path, labels="folders").class_names == ("n00.tar", "n01.tar", "n02.tar")
    (tmp_path / "t.csv").write_text("".join(f"{k}_{i}.png,{k}\n" for k in range(3) for i in range(2)))
    assert list_records(str(tmp_path / "n*.tar"), labels=str(tmp_path / "t.csv")).labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"2 of 4 shards are missing .*n03\.tar"):
        list_records(str(tmp_path / "n{01..04}.tar"))
    with pytest.raises(ValueError, match="no such file"):
        list_records(str(tmp_path / "m*.tar"))


def test_links_in_a_tar_stand_for_what_they_lead_to(tmp_path):
    links = [
        ("b/0.png", "a/0.png", tarfile.LNKTYPE),
        ("c", "a", tarfile.SYMTYPE),
        ("d/1.png", "../b/0.png", tarfile.SYMTYPE),
        ("a/up", "..", tarfile.SYMTYPE),
        ("a/self", "../a", tarfile.SYMTYPE),
        ("e.png", "/etc/passwd", tarfile.SYMTYPE),
        ("f.png", "g.png", tarfile.SYMTYPE),
        ("g.png", "f.png", tarfile.SYMTYPE),
    ]
    path = make_tar(tmp_path / "a.tar", [("a/0.png", picture(3)), ("a/1.png", picture(4))], links)
    assert sorted(grey_levels(path)) == [3, 3, 3, 3, 4, 4]
    told = list_records(path).left_out
    assert told.startswith("5 files were left out") and all(f"link '{n}'" in told for n in ("a/up", "a/self", "e.png"))


def test_damaged_archives_are_named(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", CLASSES).read_bytes()
    (tmp_path / "joined.tar").write_bytes(whole + whole)
    (tmp_path / "cut.tar").write_bytes(whole[:1400])
    make_zip(tmp_path / "twice.zip", [("a.png", picture(1)), ("./a.png", picture(2))])
    make_tar(tmp_path / "twice.tar", [("a.png", picture(1)), ("a.png", picture(2))])
    data = bytearray(make_zip(tmp_path / "locked.zip", [("a.png", picture(1))]).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    for name, words in (
        ("joined.tar", "joined by cat"), ("cut.tar", "cut off"), ("twice.zip", "'a.png' twice"), ("twice.tar", "'a.png' twice"),
        ("locked.zip", "'a.png' is encrypted"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}'.*({words})"):
            list_records(tmp_path / name)


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
    assert [os.path.relpath(path, root) for path in image_files(str(root))] == [
        os.path.relpath(p, root) for p in found.paths
    ]
    for one, other in ((root / "owl", root / "cat"), (store / "dog", root / "hound")):
        (one / "a").symlink_to(other)
    assert len(list_records(root)) > 7  # folders that lead to each other


def test_links_that_lead_nowhere_are_told(tmp_path):
    root = make_folder(tmp_path / "d", CLASSES)
    (root / "owl").symlink_to(tmp_path / "gone")
    (root / "cat" / "9.png").symlink_to(tmp_path / "gone.png")
    found = list_records(root)
    assert found.left_out == "1 file was left out: broken link 'owl' 1" and found.empty_folders == ("owl",)
    with pytest.raises(ValueError, match="'owl'"):
        found.require_labels()
    reader = open_source(found.kind, found.root)
    with pytest.raises(ValueError, match=r"9\.png': No such file"):
        [reader.read(path) for path in found.paths]


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="needs file names that are not UTF-8")
def test_names_that_are_not_utf8_are_shown_escaped(tmp_path, capsys):
    from guided_diffusion.cli.main import main

    for name in (b"caf\xe9/1.png", b"caf\xe9/\xff.png", b"th\xe8/3.png"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"no picture" if b"\xff" in name else picture(1))
    found = list_records(tmp_path)
    assert len(found.digest()) == 64 and [name.encode("utf-8", "surrogateescape") for name in found.class_names] == [
        b"caf\xe9",
        b"th\xe8",
    ]
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        assert main(["data", "check", str(tmp_path), "--quiet"]) == 1
        stdout.flush()
    told = stdout.buffer.getvalue().decode()
    assert "3 images" in told and r"caf\udce9" in told and r"\udcff.png" in told


def test_two_stores_in_one_folder_are_both_named(tmp_path):
    for names in (["a.tar", "packed.json"], ["a.tar", "data.mdb"], ["data.mdb", "packed.json"]):
        root = make_folder(tmp_path / "-".join(names), [(name, b"") for name in names])
        with pytest.raises(ValueError, match=f"'{names[0]}' and beside them '{names[1]}'"):
            list_records(root)


def test_shards_of_a_pattern_below_folders_are_no_classes(tmp_path):
    for k in range(2):
        (tmp_path / f"{k}").mkdir()
        make_tar(tmp_path / f"{k}" / f"{k}.tar", CLASSES)
    assert list_records(tmp_path / "*" / "*.tar").class_names == ("cat", "dog")
    flat = [(name.partition("/")[2], content) for name, content in CLASSES]
    for k in range(2):
        make_tar(tmp_path / f"{k}" / f"{k}.tar", flat)
    assert list_records(tmp_path / "*" / "*.tar").label_source == "none"


@pytest.mark.parametrize("kind", MAKERS)
def test_tables_of_some_of_the_images_are_named(kind, tmp_path):
    path = MAKERS[kind](tmp_path / kind, [*CLASSES, ("cat/dataset.json", b"{}"), ("dog/dataset.json", b"{}")])
    with pytest.raises(
        ValueError, match=r"cat/dataset\.json.* for some of the images only.*dog/dataset\.json.*--labels"
    ):
        list_records(path)
    assert list_records(path, labels="folders").class_names == ("cat", "dog")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("lower", ["cat/dataset.json", "empty/dataset.json"])
def test_a_second_table_of_labels_is_named(kind, lower, tmp_path):
    table = json.dumps({"labels": [[name, k] for k, (name, _) in enumerate(CLASSES)]}).encode()
    path = MAKERS[kind](tmp_path / kind, [*CLASSES, ("dataset.json", table), (lower, b"{}")])
    with pytest.raises(ValueError, match=rf"dataset\.json is one of several tables of labels .*{lower}'.*--labels"):
        list_records(path)
    assert list_records(path, labels="folders").class_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["labels.json", "Dataset.json", "cat/notes.json", "0.cls"])
def test_a_table_beside_no_picture_of_its_key_is_counted(name, tmp_path):
    assert not list_records(make_zip(tmp_path / "a.zip", [*CLASSES, ("cat/0.json", b"{}")])).left_out
    left_out = list_records(make_zip(tmp_path / "b.zip", [*CLASSES, ("cat/0.json", b"{}"), (name, b"{}")])).left_out
    assert left_out == f"1 file was left out: .{name[-4:].strip('.')} 1"


def test_folders_of_shards_are_classes_where_asked_for(tmp_path):
    for k, place in enumerate(["cat/00", "cat/01", "dog/00"]):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        make_tar(tmp_path / f"{place}.tar", [("0.png", picture(k))])
    records = list_records(tmp_path / "*" / "*.tar", labels="folders")
    assert (records.class_names, records.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert list_records(tmp_path / "*" / "*.tar").label_source == "none"
    make_tar(tmp_path / "eel.tar", [("0.png", picture(3))])
    with pytest.raises(ValueError, match="1 of 4 images lie in no sub-folder"):
        list_records(tmp_path / "**" / "*.tar", labels="folders")


@pytest.mark.parametrize("content", ["[3]", "[1, 2]", '["cat"]', "true", "null"])
@pytest.mark.parametrize("ending", ["cls", "json"])
def test_several_labels_of_one_picture_are_no_class(ending, content, tmp_path):
    beside = [("0." + ending, content.encode()), ("1." + ending, b"4" if ending == "json" else b"[4]")]
    path = make_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("1.png", picture(1)), *beside])
    with pytest.raises(ValueError, match=r"a\.tar/\d\.(cls|json): the label of|1 of 2 images have no label"):
        list_records(path)


def test_a_json_member_may_be_the_class_itself(tmp_path):
    numbered = [(f"{k}.json", str(5 - k).encode()) for k in range(2)]
    pictures = [(f"{k}.png", picture(k)) for k in range(2)]
    assert list_records(make_tar(tmp_path / "a.tar", [*pictures, *numbered])).labels.tolist() == [5, 4]
    captions = [(f"{k}.json", b'"a cat"') for k in range(2)]
    assert list_records(make_tar(tmp_path / "b.tar", [*pictures, *captions])).labels is None


@pytest.mark.parametrize("label", [[1], {"id": 1}, True])
def test_a_label_beside_a_picture_that_is_none_is_named(label, tmp_path):
    beside = [(f"{k}.json", json.dumps({"label": label}).encode()) for k in range(2)]
    path = make_tar(tmp_path / "a.tar", [*((f"{k}.png", picture(k)) for k in range(2)), *beside])
    with pytest.raises(ValueError, match=r"0\.json: the label of '.*0\.png' is"):
        list_records(path)
    assert list_records(path, labels="none").labels is None


def test_a_label_goes_to_the_picture_of_its_own_name(tmp_path):
    """WebDataset keys end at the first dot; names with dots of their own still find their label."""
    members = [("s1.5_a.png", picture(0)), ("s1.5_a.cls", b"1"), ("s1.7_b.png", picture(1)), ("s1.7_b.cls", b"0")]
    assert list_records(make_tar(tmp_path / "a.tar", members)).labels.tolist() == [1, 0]
    shared = [("a.left.png", picture(0)), ("a.right.png", picture(1)), ("a.cls", b"3")]
    assert list_records(make_tar(tmp_path / "b.tar", shared)).labels.tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"'.*a\.png' may belong to"):
        list_records(make_tar(tmp_path / "c.tar", [("a.png", picture(0)), ("a.x.cls", b"1"), ("a.y.cls", b"2")]))
