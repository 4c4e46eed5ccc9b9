"""What is found below a folder, in which order, and every source of labels."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.data import labels as tables
from guided_diffusion.data.listing import Records, list_records
from guided_diffusion.data.sources import image_files


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


NAMES = (
    "b.png",
    "a_1.JPG",
    "a.b/x_2.jpeg",
    "a/z.gif",
    "a/B/q_9_1.png",
    "a-c/y.png",
    "Z.png",
    "a b.png",
    "ä_3.png",
    "a0.png",
)


def test_order_is_that_of_2021(write_pictures):
    root = write_pictures(*NAMES)
    (root / "notes.txt").write_text("no picture")
    (root / "png").write_text("no picture")
    (root / "empty").mkdir()
    assert image_files(str(root)) == walk_like_2021(str(root))
    assert list(list_records(root, labels="none").paths) == walk_like_2021(str(root))
    assert image_files(str(root) + "/") == walk_like_2021(str(root))


def test_classes_from_prefixes_are_those_of_2021(write_pictures):
    root = write_pictures(*NAMES)
    prefixes = [os.path.basename(path).split("_")[0] for path in walk_like_2021(str(root))]
    number = {name: k for k, name in enumerate(sorted(set(prefixes)))}
    records = list_records(root, labels="prefix")
    assert records.labels.tolist() == [number[prefix] for prefix in prefixes]
    assert records.labels.dtype == np.int64
    assert list(records.class_names) == sorted(set(prefixes))


def test_other_formats_any_case_and_hidden_files(write_pictures):
    root = write_pictures("a.WEBP", "b.bmp", "c.JpEg", ".hidden.png", ".cache/d.png", "._a.png")
    assert [os.path.basename(path) for path in image_files(str(root))] == ["a.WEBP", "b.bmp", "c.JpEg"]


def test_a_link_to_a_folder_is_followed_once(write_pictures):
    root = write_pictures("a/1.png")
    (root / "b").symlink_to(root / "a", target_is_directory=True)
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    assert [os.path.relpath(path, root) for path in image_files(str(root))] == ["a/1.png", "b/1.png"]


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
        (("00000/img00000000.png", "00001/img00001000.png"), "none", ()),
    ],
)
def test_auto_says_what_it_took(write_pictures, names, source, classes):
    records = list_records(write_pictures(*names))
    assert records.label_source == source
    assert records.class_names == classes
    assert (records.labels is None) == (source == "none")


@pytest.mark.parametrize(
    "text",
    [
        "a/1.png,7\nb.png,0\n",
        "path,label\na/1.png,7\nb.png,0\n",
        "label,junk,file\n7,x,a/1.png\n0,y,./b.png\n\n",
        "a\\1.png,7\r\nb.png,0",
    ],
)
def test_csv_with_and_without_header(write_pictures, tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    records = list_records(write_pictures("a/1.png", "b.png"), labels=str(tmp_path / "labels.csv"))
    assert records.labels.tolist() == [7, 0]
    assert records.class_names == tuple("01234567")
    assert records.label_source == str(tmp_path / "labels.csv")


def test_names_in_a_table_are_numbered_in_sorted_order(write_pictures, tmp_path):
    (tmp_path / "labels.csv").write_text("a.png,zebra\nb.png,ant\nc.png,zebra")
    records = list_records(write_pictures("a.png", "b.png", "c.png"), labels=str(tmp_path / "labels.csv"))
    assert records.labels.tolist() == [1, 0, 1]
    assert records.class_names == ("ant", "zebra")


@pytest.mark.parametrize(
    "table", [{"labels": [["a.png", 3], ["b.png", 1]]}, {"a.png": 3, "b.png": 1}, {"labels": {"a.png": 3, "b.png": 1}}]
)
def test_json_of_both_shapes(write_pictures, tmp_path, table):
    (tmp_path / "labels.json").write_text(json.dumps(table))
    records = list_records(write_pictures("a.png", "b.png"), labels=str(tmp_path / "labels.json"))
    assert records.labels.tolist() == [3, 1]


def test_dataset_json_in_the_folder_is_found(write_pictures):
    root = write_pictures("00000/img00000000.png", "00000/img00000001.png")
    (root / "dataset.json").write_text(
        json.dumps({"labels": [["00000/img00000001.png", 1], ["00000/img00000000.png", 0]]})
    )
    records = list_records(root)
    assert records.labels.tolist() == [0, 1]
    assert records.label_source.endswith("dataset.json")
    (root / "dataset.json").write_text('{"labels": null}')
    assert list_records(root).label_source == "none"


def test_a_table_that_does_not_fit_is_one_error_with_counts_and_names(write_pictures, tmp_path):
    (tmp_path / "labels.csv").write_text("".join(f"gone{k}.png,0\n" for k in range(7)) + "a.png,0\n")
    with pytest.raises(ValueError) as caught:
        list_records(write_pictures("a.png", "b.png"), labels=str(tmp_path / "labels.csv"))
    message = str(caught.value)
    assert "7 of its 8 entries name no image (first: 'gone0.png'" in message
    assert "1 of 2 images have no label (first: 'b.png')" in message
    assert "gone6" not in message


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
        ("l.csv", "a.png,[0]\n", "row 1: the label of 'a.png' is '.0.'; it must be a class number or name"),
    ],
)
def test_malformed_tables(write_pictures, tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=complaint):
        list_records(write_pictures("a.png"), labels=str(tmp_path / name))


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
def test_class_ten_stays_ten(write_pictures, tmp_path, label, written):
    root = write_pictures(*(f"im{k:02d}.png" for k in range(12)))
    table = written(numbered(label))
    (tmp_path / "t.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    assert list_records(root, labels=str(tmp_path / "t.csv")).labels.tolist() == list(range(12))
    for value in (str, float, int):
        (tmp_path / "t.json").write_text(json.dumps({f"im{k:02d}.png": value(k) for k in range(12)}))
        assert list_records(root, labels=str(tmp_path / "t.json")).labels.tolist() == list(range(12))


@pytest.mark.parametrize("bad", ["", "-1", "3.5", "nan", "owl", '"1,000"', "1e99", "True", "99999999999", "inf", "n01"])
def test_one_bad_row_is_named_and_renumbers_nothing(write_pictures, tmp_path, bad):
    root = write_pictures(*(f"im{k:02d}.png" for k in range(12)))
    (tmp_path / "t.csv").write_text(numbered(lambda k: bad if k == 3 else k))
    value = bad.strip('"')
    with pytest.raises(
        ValueError, match=rf"t\.csv, row 5: the label of 'im03\.png' is '{value}'; it must be a whole number"
    ):
        list_records(root, labels=str(tmp_path / "t.csv"))


@pytest.mark.parametrize("bad", [None, -1, 3.5, float("nan"), True, [3], {"a": 1}, "owl"])
def test_one_bad_entry_of_json_is_named(write_pictures, tmp_path, bad):
    root = write_pictures(*(f"im{k:02d}.png" for k in range(12)))
    (tmp_path / "t.json").write_text(json.dumps({f"im{k:02d}.png": bad if k == 3 else k for k in range(12)}))
    with pytest.raises(ValueError, match=r"t\.json, entry 4: the label of 'im03\.png' is .* must be a whole number"):
        list_records(root, labels=str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            "path,label\na.png,th\xe9\n".encode("cp1252"),
            r"t\.csv, row 2: b'\\xe9' is not utf-8 text; save the table as UTF-8",
        ),
        ("a.png,1\n".encode("utf-16-le"), r"t\.csv: holds zero bytes"),
        (b"a.png,\nb.png,cat\n", r"row 1: the label of 'a\.png' is ''; it must be a class number or name"),
        (b"a.png,3,0\nb.png,cat", r"row 1: 'a.png,3,0' has 3 columns"),
        (b"a.png;3,0\n", r"t\.csv"),
    ],
)
def test_tables_in_no_known_form(write_pictures, tmp_path, content, complaint):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        list_records(write_pictures("a.png"), labels=str(tmp_path / "t.csv"))


def test_other_mistakes_say_what_to_do(write_pictures, tmp_path):
    root = write_pictures("a.png", "x/b.png")
    with pytest.raises(ValueError, match=r"1 of 2 images lie in no sub-folder \(first: 'a.png'\); move them"):
        list_records(root, labels="folders")
    with pytest.raises(ValueError, match="'auto', 'folders', 'prefix', 'none' or the path"):
        list_records(root, labels="directories")
    with pytest.raises(ValueError, match="unspecified data directory"):
        list_records("")
    with pytest.raises(ValueError, match="no such folder or file"):
        list_records(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images found; looked for \.jpg"):
        list_records(tmp_path / "empty")
    with pytest.raises(ValueError, match="class-conditional run needs labels and 2 images have none"):
        list_records(root).require_labels()


def test_a_class_folder_without_images_is_told(write_pictures):
    root = write_pictures("cat/1.png", "dog/2.png")
    (root / "ox" / "calf").mkdir(parents=True)
    (root / ".cache").mkdir()
    records = list_records(root)
    assert records.class_names == ("cat", "dog") and records.empty_folders == ("ox",)
    with pytest.raises(
        ValueError, match="1 class folders hold no images .*'ox'.*; put images into them or remove them"
    ):
        records.require_labels()
    assert list_records(root, labels="none").empty_folders == ()


def test_taking_some_records_keeps_class_numbers(write_pictures):
    records = list_records(write_pictures("a/1.png", "b/1.png", "b/2.png"))
    assert records.take(slice(1, None)).labels.tolist() == [1, 1]
    assert records.take([2, 0]).paths == (records.paths[2], records.paths[0])
    assert records.take([2, 0]).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        Records(("a", "b"), np.array([0]))


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=6), min_size=1, max_size=20
    )
)
def test_numbers_point_back_to_names(names):
    labels = tables.by_prefix(names)
    assert [labels.class_names[k] for k in labels.numbers] == [name.split("_")[0] for name in names]
    assert list(labels.class_names) == sorted(set(labels.class_names))
