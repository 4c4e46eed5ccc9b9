"""Read the constants of a TensorFlow `GraphDef` file without TensorFlow and without protobuf.

Only the `Const` nodes with float32 tensors are read, which hold the weights of the frozen 2015 Inception graph. Nothing in the file
is executed or unpickled; a damaged file raises ValueError.

The wire format (protobuf.dev/programming-guides/encoding): a message is a sequence of fields, each a tag (number << 3 | wire type)
and a value. Field numbers are from TensorFlow's graph.proto, node_def.proto, attr_value.proto, tensor.proto, tensor_shape.proto.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_FLOAT = 1  # DT_FLOAT of types.proto
_VARINT, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types; _FIXED: wire type of fixed length -> its number of bytes


def read_constants(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The float32 constants of the `GraphDef` in `path` by name, writable; ValueError where the file is damaged."""
    constants: dict[str, np.ndarray] = {}
    try:
        for number, value in _fields(memoryview(Path(path).read_bytes())):
            if number == 1:
                _add_node(constants, value)
    except (ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:  # any can come of damage
        raise ValueError(f"{path} is not a whole GraphDef file: {error}. Copy or download it again.") from error
    return constants


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value of the varint at byte `at`, index of the byte after it): seven bits per byte, the lowest first."""
    value = 0
    for k in range(10):
        byte = data[at + k]
        value |= (byte & 0x7F) << (7 * k)
        if byte < 0x80:  # the highest bit is 0 in the last byte only
            return value, at + k + 1
    raise ValueError(f"a number at byte {at} is longer than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of one message: (number, value); the value is an int for a varint, else bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire} before byte {at} is not used by this kind of file")
        if length > len(data) - at:
            raise ValueError(f"a length of {length} at byte {at} where {len(data) - at} bytes are left")
        yield number, data[at : at + length]
        at += length


def _add_node(constants: dict[str, np.ndarray], node: memoryview) -> None:
    """Add a NodeDef (name 1, op 2, attributes 5: key 1, value 2) if it is a constant of float32."""
    name, operation = "", ""
    attributes: dict[str, memoryview] = {}
    for number, value in _fields(node):
        if number == 1:
            name = _text(value)
        elif number == 2:
            operation = _text(value)
        elif number == 5:
            entry = dict(_fields(value))
            attributes[_text(entry.get(1, b""))] = entry.get(2, memoryview(b""))
    if operation == "Const" and "value" in attributes:
        tensor = dict(_fields(attributes["value"])).get(8)  # AttrValue.tensor; other kinds of value are no weights
        array = None if tensor is None else _floats(name, tensor)
        if array is not None:
            constants[name] = array


def _floats(name: str, tensor: memoryview) -> np.ndarray | None:
    """A TensorProto (type 1, shape 2, content 4, values 5) as an array; None for other element types, which no weight has."""
    kind, shape, content = 0, (), b""
    values: list[bytes] = []
    for number, value in _fields(tensor):
        if number == 1:
            kind = value
        elif number == 2:  # TensorShapeProto: dimensions 2, each with its size 1
            shape = tuple(dict(_fields(size)).get(1, 0) for field, size in _fields(value) if field == 2)
        elif number == 4:
            content = value
        elif number == 5:
            values.append(value)
    if kind != _FLOAT:
        return None
    stored = np.frombuffer(content or b"".join(values), "<f4")
    count = math.prod(shape)
    if len(stored) > count or (content and len(stored) < count):
        raise ValueError(f"{name!r} holds {len(stored)} numbers where its shape {shape} has {count}")
    # If there are fewer values than elements, the last value is repeated (an all-ones tensor may be stored as a single 1).
    array = np.full(shape, stored[-1] if len(stored) else 0, np.float32)
    array.reshape(-1)[: len(stored)] = stored
    return array


def _text(value: Any) -> str:
    return str(value, "utf-8", "backslashreplace")
