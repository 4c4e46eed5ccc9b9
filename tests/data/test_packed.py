"""Packed data, and `guided-diffusion data check` and `data pack` as a user types them."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion.cli import main as command
from guided_diffusion.data import images, packed
from guided_diffusion.data.listing import list_records
from guided_diffusion.data.loader import make_batches

NAMES = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/10.png", "dog/2.png")


@pytest.mark.parametrize("size", [8, (6, 10)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_packed_rows_are_what_the_loader_makes(write_pictures, tmp_path, size, channels):
    source = list_records(write_pictures(*NAMES))
    done = packed.pack(source, tmp_path / "out", size, channels=channels, shard_bytes=8 * 8 * channels * 2)
    assert done.kind == "packed"
    assert done.preprocessing == images.preprocessing_id(size, channels)
    assert done.labels.tolist() == source.labels.tolist()
    assert (done.class_names, done.label_source) == (source.class_names, "folders")
    assert len(list((tmp_path / "out").glob("images-*.npy"))) == 3
    options = {"image_size": size, "batch_size": 4, "channels": channels, "seed": 4}
    for a, b in islice(zip(make_batches(source, **options), make_batches(done, **options)), 4):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_packed_files_are_plain_numpy_and_checked(write_pictures, tmp_path):
    source, out = list_records(write_pictures(*NAMES)), tmp_path / "out"
    packed.pack(source, out, 8)
    mapped = np.load(out / "images-00000.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap) and (mapped.shape, mapped.dtype) == ((5, 8, 8, 3), np.uint8)
    assert np.load(out / "labels.npy").tolist() == [0, 0, 1, 1, 1]
    assert (out / "names.txt").read_text().splitlines() == list(source.paths)
    assert packed.verify(out) == []
    assert list_records(out, labels="none").labels is None
    (tmp_path / "t.csv").write_text("".join(f"{k},{k}\n" for k in range(5)))
    assert list_records(out, labels=str(tmp_path / "t.csv")).labels.tolist() == [0, 1, 2, 3, 4]
    np.save(out / "labels.npy", np.zeros(5))
    with pytest.raises(ValueError, match=r"labels\.npy: .*float64 .* must be 5 whole numbers; pack the data again"):
        list_records(out)
    shard = out / "images-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    (out / "labels.npy").unlink()
    wrong = [os.path.basename(text.split(":")[0]) for text in packed.verify(out)]
    assert wrong == ["images-00000.npy", "labels.npy"]


def test_a_missing_file_of_packed_data_is_no_unreadable_image(write_pictures, tmp_path):
    done = packed.pack(list_records(write_pictures(*NAMES)), tmp_path / "out", 8, shard_bytes=8 * 8 * 3 * 2)
    (tmp_path / "out" / "images-00001.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"images-00001\.npy"):
        next(make_batches(done, image_size=8, batch_size=5, on_error="skip"))


@pytest.mark.parametrize(
    "change",
    [
        {"count": None}, {"shape": [8, 8]}, {"shape": 8}, {"shards": None}, {"shards": ["images-00000.npy"]},
        {"shards": [{"file": "images-00000.npy"}]}, {"labels": "labels.npy"}, {"labels": {"sha256": ""}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_index_is_named(write_pictures, tmp_path, change):
    packed.pack(list_records(write_pictures(*NAMES)), tmp_path / "out", 8)
    index = tmp_path / "out" / "packed.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ValueError, match=r"packed\.json: not the index of packed data that `data pack` writes"):
        list_records(tmp_path / "out")


def test_packed_images_are_not_enlarged(write_pictures, tmp_path):
    done = packed.pack(list_records(write_pictures(*NAMES)), tmp_path / "out", 8)
    next(make_batches(done, image_size=4, batch_size=2))
    next(make_batches(done, image_size=6, batch_size=2, crop="random"))
    words = r"packed at 8x8, but crop='center' at 9x9 needs at least 9x9; pack the source"
    with pytest.raises(ValueError, match=words):
        make_batches(done, image_size=9, batch_size=2)
    with pytest.raises(ValueError, match=r"crop='random' at 8x8 needs at least 10x10"):
        make_batches(done, image_size=8, batch_size=2, crop="random")


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
    assert ["cat/2.png" in reason for reason in packed.read_packed_index(str(tmp_path / "two"))["skipped"]] == [True]


def test_packing_mistakes(write_pictures, tmp_path):
    records = list_records(write_pictures("a.png"))
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        packed.pack(records, tmp_path, 8)
    for options, words in (({"on_error": "ignore"}, "on_error='ignore'"), ({"workers": 0}, "workers=0")):
        with pytest.raises(ValueError, match=words):
            packed.pack(records, tmp_path / "new", 8, **options)
    Path(records.paths[0]).write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images"):
        packed.pack(records, tmp_path / "new", 8, on_error="skip")


@pytest.mark.parametrize(
    "index", [{"format": 1}, {"format": "npz"}, {"format": 2}, {"name": "another"}, [1, 2], "", None]
)
def test_an_index_of_another_tool_or_version_is_named(tmp_path, index):
    (tmp_path / "packed.json").write_text(json.dumps(index) if index != "" else "")
    words = r"packed.json: not the index|packed data of format .*; this version reads format 1"
    with pytest.raises(ValueError, match=words) as raised:
        list_records(str(tmp_path))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def main(*words: object) -> int:
    return command.main(["data", *map(str, words)])


def test_check_prints_classes_sizes_and_modes(write_pictures, capsys):
    root = write_pictures("cat/1.png", "cat/2.png", "dog/1.png")
    assert main("check", root) == 0
    printed = capsys.readouterr()
    for line in (
        f"3 images in {root} (files)", "labels: 2 classes, from folders; 1 to 2 images per class", "      0  cat",
        "sizes (width x height): 3 different; width 12 to 14, height 9 to 11, shorter side 9 to 11", "          12x9         1  ####",
        "modes: RGB 3", "unreadable: 0",
    ):  # fmt: skip
        assert f"\n{line}" in f"\n{printed.out}"
    assert "3/3" in printed.err  # the progress bar


def test_check_names_unreadable_files_and_fails(write_pictures, capsys):
    root = write_pictures("1.png", "2.png", mode="L")
    (root / "3.png").write_bytes(b"nonsense")
    assert main("check", root, "--quiet", "--labels", "none") == 1
    printed = capsys.readouterr()
    for words in ("labels: none", "modes: L 2", "unreadable: 1", "3.png': not an image that PIL knows"):
        assert words in printed.out
    assert printed.err == ""


def test_pack_then_check(write_pictures, tmp_path, capsys):
    root, out = write_pictures("cat/1.png", "cat/2.png", "dog/1.png"), tmp_path / "packed"
    assert main("pack", root, out, "--size", "6x8", "--channels", "1") == 0
    assert list_records(out).stored_size == (6, 8)
    assert main("check", out) == 0
    assert "all 8x6 (width x height); center-crop" in capsys.readouterr().out
    shard = out / "images-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-3])
    assert main("check", out, "--quiet") == 1
    assert "changed since it was packed" in capsys.readouterr().out


def test_pack_may_leave_out_unreadable_files(write_pictures, tmp_path, capsys):
    root = write_pictures("1.png", "2.png")
    (root / "3.png").write_bytes(b"nonsense")
    assert main("pack", root, tmp_path / "a", "--size", 8, "--quiet") == 2
    assert "on_error='skip'" in capsys.readouterr().err
    assert main("pack", root, tmp_path / "b", "--size", 8, "--quiet", "--skip-unreadable") == 0
    assert "left out: cannot read image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        ((), 2, "usage"),
        (("--help",), 0, "usage"),
        (("chekc",), 2, "must be one of check, pack"),
        (("check", "gone"), 2, "no such folder or file"),
        (("pack", "a", "b", "--size", "0x3"), 2, "must be a side like 64"),
    ],
)
def test_mistakes_of_a_command_line(capsys, words, code, printed):
    assert main(*words) == code
    assert printed in "".join(capsys.readouterr())
