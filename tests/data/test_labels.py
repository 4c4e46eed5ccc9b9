"""The class of each image: from folders, names, tables, or files beside the images; bad labels are named, and never renumber others."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_archives import CLASSES, MAKERS, make_folder, make_tar, make_zip, picture

from guided_diffusion.data import labels as tables
from guided_diffusion.data.listing import list_records

ARCHIVES = ["a.zip", "a.tar"]
EDM = [(f"0000{k // 2}/img0000{k // 2}{k:03d}.png", picture(k)) for k in range(4)]
TABLE = json.dumps({"labels": [[name, 3 * (k % 2)] for k, (name, _) in enumerate(EDM)]}).encode()


@pytest.mark.parametrize(
    ("names", "source", "classes"),
    [
        (("dog/1.png", "cat/1.png", "cat/2.png"), "folders", ("cat", "dog")),
        (("train/dog/1.png", "train/cat/1.png"), "folders", ("train/cat", "train/dog")),
        (("n01_1.png", "n02_1.png", "n01_2.png"), "prefix", ("n01", "n02")),
        (("all/n01_1.png", "all/n02_1.png", "all/n01_2.png"), "prefix", ("n01", "n02")),  # one folder is no class
        (("1.png", "2.png"), "none", ()),
        (("IMG_1.png", "IMG_2.png"), "none", ()),
        (("1_a.png", "2_a.png"), "none", ()),
        (("a_1.png", "b_1.png", "b_2.png", "c.png"), "none", ()),
        # Chunks of numbered files: EDM's dataset tool, its generate.py --subdirs, FFHQ.
        (("00000/img00000000.png", "00001/img00001000.png"), "none", ()),
        (("out/000000/000001.jpg", "out/002000/002999.jpg"), "none", ()),
        (("00000/00000.png", "01000/01234.png"), "none", ()),
        # And what only looks like them; the third is GTSRB.
        (("00000/00000.png", "00001/00000.png"), "folders", ("00000", "00001")),
        (("00000/a.png", "00001/b.png"), "folders", ("00000", "00001")),
        (("00000/00000_00012.ppm", "00001/00001_00003.ppm"), "folders", ("00000", "00001")),
        (("0/00001.png", "1/10001.png"), "folders", ("0", "1")),
    ],
)
def test_auto_says_what_it_took(tmp_path, names, source, classes):
    records = list_records(make_folder(tmp_path, [(name, b"") for name in names]))
    assert (records.label_source, records.class_names) == (source, classes)
    assert (records.labels is None) == (source == "none")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("top", ["", "./", "a/b/"])
def test_chunks_of_numbered_files_are_no_classes_but_their_table_holds_some(kind, top, tmp_path):
    inside = [(top + n, b) for n, b in EDM]
    assert list_records(MAKERS[kind](tmp_path / f"plain{kind}", inside)).labels is None
    found = list_records(MAKERS[kind](tmp_path / kind, [*inside, (top + "dataset.json", TABLE)]))
    assert found.labels.tolist() == [0, 3, 0, 3] and len(found.class_names) == 4
    assert found.label_source.endswith("dataset.json") and not found.left_out
    null = MAKERS[kind](tmp_path / f"null{kind}", [*inside, (top + "dataset.json", b'{"labels": null}')])
    assert list_records(null).label_source == "none"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    ("tables_", "words"),
    [
        (["cat", "dog"], r"cat/dataset\.json is one of several .*dog/dataset\.json.*--labels"),
        (["cat"], r"cat/dataset\.json is .* for some of the images only.*--labels"),
        (["", "cat"], r"dataset\.json is one of several tables of labels .*cat/dataset\.json'.*--labels"),
        (["", "empty"], r"dataset\.json is one of several tables of labels .*empty/dataset\.json'.*--labels"),
    ],
)
def test_tables_that_are_not_one_above_all_images_are_named(kind, tables_, words, tmp_path):
    content = json.dumps({"labels": [[name, k] for k, (name, _) in enumerate(CLASSES)]}).encode()
    files = [(f"{folder}/dataset.json".lstrip("/"), content) for folder in tables_]
    path = MAKERS[kind](tmp_path / kind, [*CLASSES, *files])
    with pytest.raises(ValueError, match=words):
        list_records(path)
    assert list_records(path, labels="folders").class_names == ("cat", "dog")


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize(
    ("beside", "numbers", "names"),
    [
        (lambda k: {"cls": b"%d\n" % (k % 2)}, [0, 1, 0], ("0", "1")),
        (lambda k: {"cls": [b"owl", b"ant"][k % 2]}, [1, 0, 1], ("ant", "owl")),
        (lambda k: {"cls": "1".encode("utf-16")}, [1, 1, 1], ("0", "1")),
        (lambda k: {"json": b'{"label": %d}' % (k % 2)}, [0, 1, 0], ("0", "1")),
        (lambda k: {"json": b"%d" % (2 - k)}, [2, 1, 0], ("0", "1", "2")),
        (lambda k: {"json": b'{"cls": "owl"}', "txt": b"an owl"}, [0, 0, 0], ("owl",)),
        (lambda k: {"cls": b"%d" % (k % 2), "json": b'{"label": "tench"}'}, [0, 1, 0], ("0", "1")),  # .cls counts
        (lambda k: {"json": b'{"caption": "owl"}', "txt": b"an owl"}, None, ()),
        (lambda k: {"json": b'"an owl"'}, None, ()),
    ],
)
def test_labels_beside_the_images_of_an_archive(kind, beside, numbers, names, tmp_path):
    members = [(f"x.y/{k:03d}.{e}", b) for k in range(3) for e, b in [("v1.png", picture(k)), *beside(k).items()]]
    found = list_records(MAKERS[kind](tmp_path / kind, members))
    assert len(found) == 3 and found.class_names == names
    assert (found.labels if found.labels is None else found.labels.tolist()) == numbers


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize(
    ("ending", "label", "complaint"),
    [
        ("cls", b"", r"1\.cls: the label of '.*1\.png' is ''"),
        ("cls", b"-1", "-1"),
        ("cls", b"owl", "'owl'; it must be a whole number"),
        ("cls", b"\xff\xfe\xff", r"1\.cls"),
        ("cls", b"[3, 5]", r"1\.cls: the label of .* not several"),
        ("json", b"[1, 2]", r"1\.json: the label of .* not several"),
        ("json", b'["cat"]', r"1\.json: the label of .* not several"),
        ("json", b'{"label": {"id": 1}}', r"1\.json: the label of .* not several"),
        ("json", b"true", r"1\.json: the label of '.*1\.png' is True"),
        ("json", b"null", "1 of 3 images have no label"),
        ("json", b"{", "not valid JSON"),
    ],
)
def test_a_bad_label_is_named_where_labels_are_wanted(kind, ending, label, complaint, tmp_path):
    members = [(f"{k}.{e}", b) for k in range(3) for e, b in (("png", picture(k)), (ending, label if k == 1 else b"7"))]
    path = MAKERS[kind](tmp_path / kind, members)
    with pytest.raises(ValueError, match=complaint):
        list_records(path)
    assert list_records(path, labels="none").labels is None
    assert list_records(path, labels="prefix").class_names == ("0.png", "1.png", "2.png")


@pytest.mark.parametrize("kind", ["a", "a.tar"])
@pytest.mark.parametrize(
    "text", ["{", '{"labels": [["a", [0.1, 0.2]]]}', '{"x": 1}', '{"labels": [["0.png", 1.5]]}', "[]"]
)
def test_a_table_that_is_not_wanted_is_not_read(text, kind, tmp_path):
    root = MAKERS[kind](tmp_path / kind, [*CLASSES, ("dataset.json", text.encode())])
    with pytest.raises(ValueError, match=r"dataset\.json"):
        list_records(root)
    assert list_records(root, labels="none").labels is None
    assert list_records(root, labels="folders").class_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["labels.json", "Dataset.json", "cat/notes.json", "0.cls"])
def test_a_file_with_the_key_of_no_image_is_counted(name, tmp_path):
    left_out = list_records(make_zip(tmp_path / "b.zip", [*CLASSES, ("cat/0.json", b"{}"), (name, b"{}")])).left_out
    assert left_out == f"1 file was left out: .{name[-4:].strip('.')} 1"


def test_a_label_goes_to_the_image_of_its_own_name(tmp_path):
    """WebDataset keys end at the first dot; names with dots of their own still find their label."""
    members = [("s1.5_a.png", picture(0)), ("s1.5_a.cls", b"1"), ("s1.7_b.png", picture(1)), ("s1.7_b.cls", b"0")]
    assert list_records(make_tar(tmp_path / "a.tar", members)).labels.tolist() == [1, 0]
    shared = [("a.left.png", picture(0)), ("a.right.png", picture(1)), ("a.cls", b"3")]
    assert list_records(make_tar(tmp_path / "b.tar", shared)).labels.tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"'.*a\.png' may belong to several files"):
        list_records(make_tar(tmp_path / "c.tar", [("a.png", picture(0)), ("a.x.cls", b"1"), ("a.y.cls", b"2")]))


def test_folders_around_tars_are_classes_where_asked_for(tmp_path):
    for k, place in enumerate(["cat/00", "cat/01", "dog/00"]):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        make_tar(tmp_path / f"{place}.tar", [(f"{k}_0.png", picture(k))])
    every = tmp_path / "*" / "*.tar"
    records = list_records(every, labels="folders")
    assert (records.class_names, records.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert list_records(every).label_source == "none"
    assert list_records(every, labels="prefix").class_names == ("0", "1", "2")
    assert list_records(tmp_path / "cat", labels="folders").class_names == ("00.tar", "01.tar")
    (tmp_path / "t.csv").write_text("".join(f"{k}_0.png,{k}\n" for k in range(3)))
    assert list_records(every, labels=str(tmp_path / "t.csv")).labels.tolist() == [0, 1, 2]
    make_tar(tmp_path / "eel.tar", [("0.png", picture(3))])
    with pytest.raises(ValueError, match="1 of 4 images lie in no sub-folder"):
        list_records(tmp_path / "**" / "*.tar", labels="folders")
    make_tar(tmp_path / "dog" / "00.tar", CLASSES)  # folders inside of tars go before those around
    assert list_records(tmp_path / "dog").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "a/1.png,7\nb.png,0\n"),
        ("t.csv", "path,label\na/1.png,7\nb.png,0\n"),
        ("t.csv", "label,junk,file\n7,x,a/1.png\n0,y,./b.png\n\n"),
        ("t.csv", "a\\1.png,7\r\nb.png,0"),
        ("t.json", '{"labels": [["a/1.png", 7], ["b.png", 0]]}'),
        ("t.json", '{"labels": {"a/1.png": 7, "b.png": 0}}'),
        ("t.json", '{"b.png": 0, "a/1.png": "7"}'),
    ],
)
def test_tables_of_every_form(write_pictures, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    records = list_records(write_pictures("a/1.png", "b.png"), labels=str(tmp_path / name))
    assert records.labels.tolist() == [7, 0]
    assert records.class_names == tuple("01234567")
    assert records.label_source == str(tmp_path / name)


def test_names_in_a_table_are_numbered_in_sorted_order(write_pictures, tmp_path):
    (tmp_path / "labels.csv").write_text("a.png,zebra\nb.png,ant\nc.png,zebra")
    records = list_records(write_pictures("a.png", "b.png", "c.png"), labels=str(tmp_path / "labels.csv"))
    assert (records.labels.tolist(), records.class_names) == ([1, 0, 1], ("ant", "zebra"))


def test_a_table_that_does_not_fit_is_one_error_with_counts_and_names(write_pictures, tmp_path):
    (tmp_path / "labels.csv").write_text("".join(f"gone{k}.png,0\n" for k in range(7)) + "a.png,0\n")
    with pytest.raises(ValueError) as caught:
        list_records(write_pictures("a.png", "b.png"), labels=str(tmp_path / "labels.csv"))
    message = str(caught.value)
    assert "7 of its 8 entries name no image (first: 'gone0.png'" in message and "gone6" not in message
    assert "1 of 2 images have no label (first: 'b.png')" in message


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("l.json", "{", "not valid JSON"),
        ("l.json", '{"labels": [[1, 2]]}', "must be a path and a class"),
        ("l.json", '{"labels": [["a.png", true]]}', "entry 1: the label of 'a.png' is True; it must be"),
        ("l.json", "[1, 2]", "must be"),
        ("l.json", '{"a.png": -1}', "is -1; it must be a whole number from 0"),
        ("l.json", '{"a.png": 0, "./a.png": 1}', "two labels"),
        ("l.csv", "a.png\n", "row 1: 'a.png' lacks a path or a label"),
        ("l.csv", "a.png,640,0\n", "row 1: 'a.png,640,0' has 3 columns, and no first line says which is which"),
        ("l.csv", "a.png;0;train\n", "row 1: 'a.png,0,train' has 3 columns"),
        ("l.csv", "path,cat,dog\na.png,0,1\n", "row 1: 'path,cat,dog' has 3 columns"),
        (
            "l.csv",
            "a.png,[0]\n",
            "row 1: the label of 'a.png' is '.0.'; it must be a class number or name .*not several",
        ),
        ("l.csv", "a.png,\nb.png,cat\n", r"row 1: the label of 'a\.png' is ''; it must be a class number or name"),
        ("l.csv", b"path,label\na.png,th\xe9\n", r"l\.csv, row 2: b'\\xe9' is not utf-8 text; save the table as"),
        ("l.csv", "a.png,1\n".encode("utf-16-le"), r"l\.csv: holds zero bytes"),
        ("l.csv", "a.png;3,0\n", r"l\.csv"),
    ],
)
def test_malformed_tables(write_pictures, tmp_path, name, text, complaint):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=complaint):
        list_records(write_pictures("a.png"), labels=str(tmp_path / name))


@pytest.fixture
def twelve(tmp_path):
    return make_folder(tmp_path / "twelve", [(f"im{k:02d}.png", b"") for k in range(12)])


def numbered(label) -> str:
    return "path,label\n" + "".join(f"im{k:02d}.png,{label(k)}\n" for k in range(12))


@pytest.mark.parametrize(
    ("label", "written"),
    [
        (str, str),
        (lambda k: f"{k}.0", str),  # pandas
        (lambda k: f'"{k}"', str),
        (lambda k: f" {k} ", str),
        (str, lambda text: text.replace(",", ";")),
        (str, lambda text: text.replace(",", "\t")),
        (str, lambda text: text.replace("\n", "\r\n") + "\r\n,\r\n"),
        (str, lambda text: "," + text.replace("\nim", "\n0,im")),  # an index column
        (str, lambda text: text + "im00.png,0\n"),
        (str, lambda text: text.encode("utf-8-sig")),
        (str, lambda text: text.encode("utf-16")),
    ],
)
def test_class_ten_stays_ten(twelve, tmp_path, label, written):
    table = written(numbered(label))
    (tmp_path / "t.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    assert list_records(twelve, labels=str(tmp_path / "t.csv")).labels.tolist() == list(range(12))


@pytest.mark.parametrize("value", [str, float, int])
def test_class_ten_stays_ten_in_json(twelve, tmp_path, value):
    (tmp_path / "t.json").write_text(json.dumps({f"im{k:02d}.png": value(k) for k in range(12)}))
    assert list_records(twelve, labels=str(tmp_path / "t.json")).labels.tolist() == list(range(12))


@pytest.mark.parametrize("bad", ["", "-1", "3.5", "nan", "owl", '"1,000"', "1e99", "True", "99999999999", "inf", "n01"])
def test_one_bad_row_is_named_and_renumbers_nothing(twelve, tmp_path, bad):
    (tmp_path / "t.csv").write_text(numbered(lambda k: bad if k == 3 else k))
    value = bad.strip('"')
    words = rf"t\.csv, row 5: the label of 'im03\.png' is '{value}'; it must be a whole number"
    with pytest.raises(ValueError, match=words):
        list_records(twelve, labels=str(tmp_path / "t.csv"))


@pytest.mark.parametrize("bad", [None, -1, 3.5, float("nan"), True, [3], {"a": 1}, "owl"])
def test_one_bad_entry_of_json_is_named(twelve, tmp_path, bad):
    (tmp_path / "t.json").write_text(json.dumps({f"im{k:02d}.png": bad if k == 3 else k for k in range(12)}))
    with pytest.raises(ValueError, match=r"t\.json, entry 4: the label of 'im03\.png' is .* must be a whole number"):
        list_records(twelve, labels=str(tmp_path / "t.json"))


def test_other_mistakes_say_what_to_do(write_pictures):
    root = write_pictures("a.png", "x/b.png")
    with pytest.raises(ValueError, match=r"1 of 2 images lie in no sub-folder \(first: 'a.png'\); move them"):
        list_records(root, labels="folders")
    with pytest.raises(ValueError, match="'auto', 'folders', 'prefix', 'none' or the path"):
        list_records(root, labels="directories")
    with pytest.raises(ValueError, match="class-conditional run needs labels and 2 images have none"):
        list_records(root).require_labels()


def test_a_class_folder_without_images_is_named(write_pictures):
    root = write_pictures("cat/1.png", "dog/2.png")
    (root / "ox" / "calf").mkdir(parents=True)
    (root / ".cache").mkdir()
    records = list_records(root)
    assert records.class_names == ("cat", "dog") and records.empty_folders == ("ox",)
    with pytest.raises(ValueError, match="1 class folders hold no images .*'ox'.*; put images into them or remove"):
        records.require_labels()
    assert list_records(root, labels="none").empty_folders == ()


NAME = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=6)


@given(st.lists(NAME, min_size=1, max_size=9))
def test_numbers_point_back_to_names(names):
    labels = tables.by_prefix(names)
    assert [labels.class_names[k] for k in labels.numbers] == [name.split("_")[0] for name in names]
    assert list(labels.class_names) == sorted(set(labels.class_names))
