"""Read the constants of a TensorFlow `GraphDef` file without TensorFlow and without protobuf.

Only what the frozen 2015 Inception graph needs: `Const` nodes holding float32 or int32 tensors, and three attributes of
the batch normalisations. Nothing in the file is executed or unpickled. The file is treated as untrusted: each length is
checked against what is left, counts and sizes are capped, there is no recursion, and damage is a `ValueError` that names
the byte where reading stopped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MAX_FILE_BYTES = 1 << 30
MAX_NODES = 100_000
MAX_FIELDS = 1_000_000
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8
MAX_TENSOR_ELEMENTS = 1 << 23
MAX_TOTAL_ELEMENTS = 1 << 26
MAX_LOOSE_VALUES = 1 << 16

_FLOAT, _INT32 = 1, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Graph(NamedTuple):
    """What `read_graph` finds."""

    constants: dict[str, np.ndarray]
    """Constant nodes by name, float32 or int32, writable copies."""
    scale_after_normalization: dict[str, bool]
    """For each batch normalisation: whether its gamma is used."""
    variance_epsilon: dict[str, float]
    """For each batch normalisation: what is added to the variance."""
    nodes: int


class _Reader:
    """Bounded reader of the protobuf wire format over one buffer; counts every field it meets."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.fields = 0

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for place in range(10):
            if at >= end:
                raise ValueError(f"a number is cut off at byte {at}")
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if value >= 1 << 64:
                    break
                return value, at
        raise ValueError(f"a number before byte {at} is longer than 64 bits")

    def each(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (field, wire type, value or start, end) of one message lying in [start, end)."""
        at = start
        while at < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise ValueError(f"more than {MAX_FIELDS} fields (byte {at})")
            tag, at = self.varint(at, end)
            field, wire = tag >> 3, tag & 7
            if field == 0:
                raise ValueError(f"field number 0 at byte {at}")
            if wire == _VARINT:
                value, at = self.varint(at, end)
                yield field, wire, value, at
                continue
            if wire == _BYTES:
                length, at = self.varint(at, end)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError(f"wire type {wire} at byte {at} is not used by this kind of file")
            if length > end - at:
                raise ValueError(f"a length of {length} at byte {at} where {end - at} bytes are left")
            yield field, wire, at, at + length
            at += length

    def text(self, start: int, end: int) -> str:
        if end - start > MAX_NAME_BYTES:
            raise ValueError(f"a name of {end - start} bytes at byte {start} (at most {MAX_NAME_BYTES})")
        return bytes(self.data[start:end]).decode("utf-8", "backslashreplace")


def read_constants(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every float32 and int32 constant of the graph in `path` by node name; ValueError where the file is damaged."""
    return read_graph(path).constants


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Constants and batch normalisation attributes of the `GraphDef` in `path`; ValueError where it is damaged."""
    size = os.stat(path).st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size} bytes; a graph has at most {MAX_FILE_BYTES}")
    with open(path, "rb") as file:
        data = file.read(size)
    try:
        return _parse(_Reader(memoryview(data)), len(data))
    except ValueError as error:
        raise ValueError(f"{path} is not a whole GraphDef file: {error}. Copy or download it again.") from error


def _parse(reader: _Reader, size: int) -> Graph:
    graph = Graph({}, {}, {}, 0)
    nodes = 0
    elements = 0
    for field, wire, start, end in reader.each(0, size):
        if field != 1 or wire != _BYTES:
            continue
        nodes += 1
        if nodes > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} nodes")
        name, op, attributes = _node(reader, start, end)
        if op == "Const" and "value" in attributes:
            if name in graph.constants:
                raise ValueError(f"two constants are called {name!r}")
            array = _constant(reader, name, *attributes["value"])
            if array is not None:
                elements += array.size
                if elements > MAX_TOTAL_ELEMENTS:
                    raise ValueError(f"more than {MAX_TOTAL_ELEMENTS} numbers in all")
                graph.constants[name] = array
        elif op == "BatchNormWithGlobalNormalization":
            for key, (first, last) in attributes.items():
                for attribute, kind, value, _ in reader.each(first, last):
                    if key == "scale_after_normalization" and (attribute, kind) == (5, _VARINT):
                        graph.scale_after_normalization[name] = bool(value)
                    elif key == "variance_epsilon" and (attribute, kind) == (4, _FIXED32):
                        (epsilon,) = struct.unpack_from("<f", reader.data, value)
                        graph.variance_epsilon[name] = epsilon
    if nodes == 0:
        raise ValueError("it holds no nodes")
    return graph._replace(nodes=nodes)


def _node(reader: _Reader, start: int, end: int) -> tuple[str, str, dict[str, tuple[int, int]]]:
    """Name, operation and the places of the attribute values of one NodeDef."""
    name, op = "", ""
    attributes: dict[str, tuple[int, int]] = {}
    for field, wire, first, last in reader.each(start, end):
        if wire != _BYTES:
            continue
        if field == 1:
            name = reader.text(first, last)
        elif field == 2:
            op = reader.text(first, last)
        elif field == 5:
            key, value = "", (last, last)
            for part, kind, here, there in reader.each(first, last):
                if (part, kind) == (1, _BYTES):
                    key = reader.text(here, there)
                elif (part, kind) == (2, _BYTES):
                    value = (here, there)
            attributes[key] = value
    return name, op, attributes


def _constant(reader: _Reader, name: str, start: int, end: int) -> np.ndarray | None:
    """The tensor of an AttrValue (field 8); None for text and other element types, which no weight has."""
    for field, wire, first, last in reader.each(start, end):
        if (field, wire) == (8, _BYTES):
            return _tensor(reader, name, first, last)
    return None


def _tensor(reader: _Reader, name: str, start: int, end: int) -> np.ndarray | None:
    kind, shape = 0, []
    content: memoryview | None = None
    packed: list[np.ndarray] = []
    floats: list[float] = []
    ints: list[int] = []
    for field, wire, first, last in reader.each(start, end):
        if (field, wire) == (1, _VARINT):
            kind = first
        elif (field, wire) == (2, _BYTES):
            shape = _shape(reader, name, first, last)
        elif (field, wire) == (4, _BYTES):
            content = reader.data[first:last]
        elif field == 5 and wire == _FIXED32:
            floats += struct.unpack_from("<f", reader.data, first)
        elif field == 5 and wire == _BYTES:
            if (last - first) % 4:
                raise ValueError(f"{last - first} bytes are no list of float32 in {name!r}")
            packed.append(np.frombuffer(reader.data[first:last], "<f4"))
        elif field == 7 and wire == _VARINT:
            ints.append(_signed(first))
        elif field == 7 and wire == _BYTES:
            while first < last and len(ints) <= MAX_LOOSE_VALUES:
                value, first = reader.varint(first, last)
                ints.append(_signed(value))
        if len(floats) + len(ints) > MAX_LOOSE_VALUES:
            raise ValueError(f"more than {MAX_LOOSE_VALUES} single values in {name!r}")
    if kind not in (_FLOAT, _INT32):
        return None
    dtype = np.dtype("<f4") if kind == _FLOAT else np.dtype("<i4")
    count = 1
    for dimension in shape:  # Python integers: no overflow
        count *= dimension
    if count > MAX_TENSOR_ELEMENTS:
        raise ValueError(f"{name!r} claims shape {shape}: more than {MAX_TENSOR_ELEMENTS} numbers")
    if content:
        if len(content) != count * dtype.itemsize:
            raise ValueError(f"{name!r} holds {len(content)} bytes where shape {shape} needs {count * dtype.itemsize}")
        return np.frombuffer(content, dtype).reshape(shape).copy()
    if kind == _FLOAT:
        values = np.concatenate([*packed, np.array(floats, dtype)])
    else:
        if ints and not -(1 << 31) <= min(ints) <= max(ints) < 1 << 31:
            raise ValueError(f"{name!r} holds numbers that are no int32")
        values = np.array(ints, dtype)
    if values.size > count:
        raise ValueError(f"{name!r} holds {values.size} numbers where shape {shape} has {count}")
    full = np.zeros(count, dtype)
    # Fewer values than elements: the last one stands for all the rest (how an all-ones tensor may be stored).
    full[: values.size] = values
    if values.size:
        full[values.size :] = values[-1]
    return full.reshape(shape)


def _shape(reader: _Reader, name: str, start: int, end: int) -> list[int]:
    shape = []
    for field, wire, first, last in reader.each(start, end):
        if (field, wire) != (2, _BYTES):
            continue
        size = 0
        for part, kind, value, _ in reader.each(first, last):
            if (part, kind) == (1, _VARINT):
                size = _signed(value)
        if size < 0:
            raise ValueError(f"{name!r} has a dimension of {size}")
        shape.append(size)
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{name!r} has more than {MAX_DIMENSIONS} dimensions")
    return shape


def _signed(value: int) -> int:
    """A 64-bit two's complement varint as a number."""
    return value - (1 << 64) if value >= 1 << 63 else value
