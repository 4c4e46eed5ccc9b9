"""Damaged and hostile image files: an error that names the file; never execution, never a hang, never a wrong image."""

from __future__ import annotations

import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import all_of, store

from evaluations.inputs import open_images
from evaluations.selftest import synthetic_images


@pytest.fixture
def images() -> np.ndarray:
    return synthetic_images(7, 7, 12, 10)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickles_are_never_executed(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    np.savez("object.npz", np.array([Bomb()], dtype=object))
    np.save("object.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez("labels.npz", images, np.array([Bomb()] * 7, dtype=object))
    Path("plain.npz").write_bytes(pickle.dumps(Bomb()))
    Path("plain.bin").write_bytes(pickle.dumps(Bomb()))
    for name in ("object.npz", "object.npy", "labels.npz", "plain.npz", "plain.bin"):
        with pytest.raises(ValueError, match=name) as refused:
            open_images(name).want_labels()
        assert "pickle" in str(refused.value)
    assert np.array_equal(all_of("labels.npz"), images)
    assert not Path("executed").exists()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}"


@pytest.mark.parametrize(
    "data",
    [
        npy(HEADER.format("'|u1'", "(2, 4, 4, 3)"), b"\0" * 95),
        npy(HEADER.format("'|u1'", "(2, 4, 4, 3)"), b"\0" * 97),
        npy(HEADER.format("'|u1'", "(10**12, 4, 4, 3)")),
        npy(HEADER.format("'|u1'", f"({10**30}, 4, 4, 3)")),
        npy(HEADER.format("'|u1'", f"(2, {10**6}, {10**6}, 3)")),
        npy(HEADER.format("'|u1'", "(-2, 4, 4, 3)")),
        npy(HEADER.format("'|u1'", "(2.0, 4, 4, 3)")),
        npy(HEADER.format("'|u1'", "(True, 4, 4, 3)")),
        npy(HEADER.format("'|O'", "(2, 4, 4, 3)"), b"\0" * 768),
        npy(HEADER.format("[('a', '|O')]", "(2,)"), b"\0" * 16),
        npy(HEADER.format("'nonsense'", "(2, 4, 4, 3)")),
        npy(HEADER.format("'|u1'", "__import__('os')")),
        npy("(" * 9000),
        npy("-" * 9000 + "1"),
        npy("{}"),
        npy("[]"),
        npy("\0"),
        npy("x" * 20_000),
        npy(HEADER.format("'|u1'", "(2, 4, 4, 3)"), b"\0" * 96, version=b"\x09\x00"),
        b"\x93NUMPY",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"",
        b"nonsense",
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\0" * 18,
    ],
    ids=range(25),
)
@pytest.mark.parametrize("suffix", ["npy", "npz", "zip"])
def test_bad_arrays_are_errors(data, suffix, tmp_path):
    path = tmp_path / f"bad.{suffix}"
    if suffix == "npy":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", data)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"bad\."):
        open_images(path)
    assert time.perf_counter() - start < 5


def test_missing_things_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder 'absent\.npz'"):
        open_images("absent.npz")
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"missing arr_0 .*\['images'\]"):
        open_images(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="cannot read images from int"):
        open_images(3)


@pytest.mark.parametrize("kind", ["npz", "deflated"])
def test_a_truncated_npz_is_an_error(kind, images, tmp_path):
    data = Path(store(images, kind, tmp_path)).read_bytes()
    for end in (10, len(data) // 2, len(data) - 30):
        (tmp_path / "cut.npz").write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"cut\.npz"):
            open_images(tmp_path / "cut.npz")


@pytest.mark.parametrize("kind", ["npz", "deflated", "fortran", "fortran deflated"])
def test_a_flipped_bit_in_the_pixels_is_found(kind, images, tmp_path):
    data = bytearray(Path(store(images, kind, tmp_path)).read_bytes())
    data[900] ^= 4
    (tmp_path / "flipped.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"flipped\.npz"):
        all_of(tmp_path / "flipped.npz")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """A member that holds far more than its header announces, and one that announces more than it can hold."""
    honest = npy(HEADER.format("'|u1'", "(2, 4, 4, 3)"), b"\0" * 96)
    with zipfile.ZipFile(tmp_path / "more.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", honest + b"\0" * 50_000_000)
    data = bytearray(Path(tmp_path / "more.npz").read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", len(honest))
    (tmp_path / "lies.npz").write_bytes(data)
    data[place + 24 : place + 28] = struct.pack("<I", 0xF0000000)
    (tmp_path / "claims.npz").write_bytes(data)
    tracemalloc.start()
    for name in ("more.npz", "claims.npz"):
        with pytest.raises(ValueError, match=name):
            all_of(tmp_path / name)
    with pytest.raises(ValueError, match=r"lies\.npz"):
        all_of(tmp_path / "lies.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("kind", ["npz", "deflated", "npy"])
def test_a_long_file_is_never_wholly_in_memory(kind, tmp_path):
    images = np.zeros((2000, 32, 32, 3), np.uint8)
    images[:, 0, 0] = 200
    path = store(images, kind, tmp_path)
    tracemalloc.start()
    source = open_images(path)
    total = sum(int(batch[:, 0, 0, 0].sum(dtype=np.int64)) for batch in source.batches(50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 2000 * 200
    assert peak < images.nbytes / 4


@settings(max_examples=150, deadline=3000)
@given(st.data())
def test_damaged_npz_never_does_worse_than_an_error(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["npz", "deflated", "npy", "zip"]))
    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    images = (np.arange(3 * 6 * 5 * 3) % 251).astype(np.uint8).reshape(3, 6, 5, 3)
    content = bytearray(Path(store(images, kind, folder)).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / f"damaged.{'npy' if kind == 'npy' else 'zip' if kind == 'zip' else 'npz'}"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        source = open_images(path)
        got = list(source.batches(2))
    except ValueError:
        return
    assert all(batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[3] == 3 for batch in got)
    if kind != "npy":  # npy has no checksum
        assert np.array_equal(np.concatenate(got).reshape(images.shape), images) or source.notes
