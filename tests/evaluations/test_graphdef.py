"""The reader of TensorFlow graphs: right on good files, an error (never a hang, never execution) on bad ones."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inception_files import const, message, number, shape, varint

from evaluations.graphdef import read_constants

TIME_CAP_S = 5.0


def read(tmp_path, data: bytes):
    path = tmp_path / "graph.pb"
    path.write_bytes(data)
    start = time.process_time()
    try:
        return read_constants(path)
    finally:
        assert time.process_time() - start < TIME_CAP_S


def test_every_constant_of_the_inception_graph(synthetic_pb, synthetic_constants):
    found = read_constants(synthetic_pb)
    for name, expected in synthetic_constants.items():
        assert found[name].dtype == np.float32 and np.array_equal(found[name], expected), name


def test_ways_of_storing_floats(tmp_path):
    one = struct.pack("<f", 1.5)
    packed = np.arange(3, dtype="<f4").tobytes()
    data = b"".join(
        [
            const("content", number(1, 1) + shape(2, 2) + message(4, np.arange(4, dtype="<f4").tobytes())),
            const("packed", number(1, 1) + shape(3) + message(5, packed)),
            const("loose", number(1, 1) + shape(2) + varint(5 << 3 | 5) + one + varint(5 << 3 | 5) + packed[4:8]),
            const("repeated", number(1, 1) + shape(5) + message(5, packed)),
            const("filled", number(1, 1) + shape(2, 3) + varint(5 << 3 | 5) + one),
            const("empty", number(1, 1) + shape(0)),
            const("ints", number(1, 3) + shape(2) + number(7, 7) + number(7, -1)),
            const("zeros", number(1, 1) + shape(2)),
            const("text", number(1, 7) + shape() + message(8, b"cos\nsystem\n")),
            const("not a constant", number(1, 1) + shape(1) + message(5, packed[:4]), op="Placeholder"),
        ]
    )
    found = read(tmp_path, data)
    assert set(found) == set("content packed loose repeated filled empty zeros".split())
    assert found["content"].tolist() == [[0, 1], [2, 3]]
    assert found["loose"].tolist() == [1.5, 1]
    assert found["repeated"].tolist() == [0, 1, 2, 2, 2]
    assert found["filled"].tolist() == [[1.5] * 3] * 2
    assert found["empty"].shape == (0,) and found["zeros"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x0a", "index out of bounds"),
        (varint(1 << 3 | 2) + varint(1 << 63), "a length of"),
        (varint(1 << 3 | 2) + b"\xff" * 20, "64 bits"),
        (varint(1 << 3 | 3), "wire type 3"),
        (number(1, 5), "has no len"),
        (const("x", number(1, 1) + shape(1 << 60, 1 << 60) + message(5, b"\0" * 4)), "not a whole GraphDef"),
        (const("x", number(1, 1) + shape(-3) + message(5, b"\0" * 4)), "not a whole GraphDef"),
        (const("x", number(1, 1) + shape(2) + message(4, b"\0" * 4)), "holds 1 numbers"),
        (const("x", number(1, 1) + shape(1) + message(5, b"\0" * 8)), "holds 2 numbers"),
        (const("x", number(1, 1) + shape(2) + message(5, b"\0" * 7)), "multiple of element size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_named(tmp_path, data, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, data)


def small_graph() -> bytes:
    weights = np.arange(12, dtype="<f4").tobytes()
    text = const("s", number(1, 7) + shape() + message(8, b"x"))
    ints = const("c", number(1, 3) + shape(2) + number(7, 5))
    return text + const("a/b", number(1, 1) + shape(3, 4) + message(4, weights)) + ints


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bits_and_cut_files_never_do_worse_than_an_error(tmp_path_factory, data):
    graph = bytearray(small_graph())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(graph) - 1))
        graph[place] ^= 1 << data.draw(st.integers(0, 7))
    end = data.draw(st.integers(0, len(graph)))
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "graph.pb"
    path.write_bytes(bytes(graph[:end]) + data.draw(st.binary(max_size=20)))
    try:
        found = read_constants(path)
    except ValueError:
        return
    assert all(isinstance(value, np.ndarray) and value.dtype.kind == "f" for value in found.values())


def test_a_cut_inception_graph_is_an_error(synthetic_pb, tmp_path):
    with open(synthetic_pb, "rb") as file:
        data = file.read(1_000_001)
    with pytest.raises(ValueError, match="not a whole GraphDef"):
        read(tmp_path, data)
