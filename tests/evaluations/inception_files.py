"""Inputs of the recorded numbers of 2021, and Inception weights of the published layout with numbers from a seed."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from evaluations.selftest import synthetic_features, synthetic_images

FOLDER = Path(__file__).parents[1] / "golden" / "evaluation"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text())


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def features_of(case: dict[str, Any], name: str) -> np.ndarray:
    """The features that a recorded case calls `sample`, `ref` or `features`, in every bit where its digest was recorded."""
    made = synthetic_features(**case[name])
    assert case.get("sha256" if name == "features" else f"sha256_{name}") in (None, sha(made))
    return made


def images_of(case: dict[str, Any]) -> np.ndarray:
    recipe = case["images"]
    made = synthetic_images(recipe["seed"], recipe["n"], recipe["h"], recipe["w"])
    assert sha(made) == case["sha256_images"]
    return made


def conv_specs() -> dict[str, tuple[int, int, int, int]]:
    """Scope of each convolution of the 2015 graph -> height, width, channels in and out of its kernel, in the order of the graph."""
    specs: dict[str, tuple[int, int, int, int]] = {}

    def chain(scope: str, channels: int, *layers: tuple[int, int, int]) -> None:
        for k, (height, width, out) in enumerate(layers):
            specs[f"{scope}conv_{k}" if k else f"{scope}conv"] = (height, width, channels, out)
            channels = out

    chain("", 3, (3, 3, 32), (3, 3, 32), (3, 3, 64), (1, 1, 80), (3, 3, 192))
    for block, channels, pooled in (("mixed", 192, 32), ("mixed_1", 256, 64), ("mixed_2", 288, 64)):
        chain(f"{block}/", channels, (1, 1, 64))
        chain(f"{block}/tower/", channels, (1, 1, 48), (5, 5, 64))
        chain(f"{block}/tower_1/", channels, (1, 1, 64), (3, 3, 96), (3, 3, 96))
        chain(f"{block}/tower_2/", channels, (1, 1, pooled))
    chain("mixed_3/", 288, (3, 3, 384))
    chain("mixed_3/tower/", 288, (1, 1, 64), (3, 3, 96), (3, 3, 96))
    for block, w in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        chain(f"{block}/", 768, (1, 1, 192))
        chain(f"{block}/tower/", 768, (1, 1, w), (1, 7, w), (7, 1, 192))
        chain(f"{block}/tower_1/", 768, (1, 1, w), (7, 1, w), (1, 7, w), (7, 1, w), (1, 7, 192))
        chain(f"{block}/tower_2/", 768, (1, 1, 192))
    chain("mixed_8/tower/", 768, (1, 1, 192), (3, 3, 320))
    chain("mixed_8/tower_1/", 768, (1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192))
    for block, channels in (("mixed_9", 1280), ("mixed_10", 2048)):
        chain(f"{block}/", channels, (1, 1, 320))
        for tower, layers in (("tower", [(1, 1, 384)]), ("tower_1", [(1, 1, 448), (3, 3, 384)])):
            chain(f"{block}/{tower}/", channels, *layers)
            specs[f"{block}/{tower}/mixed/conv"] = (1, 3, 384, 384)
            specs[f"{block}/{tower}/mixed/conv_1"] = (3, 1, 384, 384)
        chain(f"{block}/tower_2/", channels, (1, 1, 192))
    return specs


def synthetic_constants(seed: int = 1234) -> dict[str, np.ndarray]:
    """The constants of the graph, float32, all drawn from one stream in the order of `conv_specs`."""
    source, found = np.random.RandomState(seed), {}
    for scope, (height, width, channels, out) in conv_specs().items():
        scale = math.sqrt(2.0 / (height * width * channels))
        found[f"{scope}/conv2d_params"] = source.standard_normal((height, width, channels, out)) * scale
        for name, low, high in (("beta", -0.1, 0.1), ("moving_mean", -0.1, 0.1), ("moving_variance", 0.5, 1.5)):
            found[f"{scope}/batchnorm/{name}"] = source.uniform(low, high, out)
        found[f"{scope}/batchnorm/gamma"] = np.ones(out)
    found["softmax/weights"] = source.standard_normal((2048, 1008)) * 0.05
    found["softmax/biases"] = source.uniform(-1, 1, 1008)
    return {name: value.astype(np.float32) for name, value in found.items()}


# --- the wire format of protobuf, and graphs in it -------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(field: int, payload: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(payload)) + payload


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def shape(*sizes: int) -> bytes:
    return message(2, b"".join(message(2, number(1, size)) for size in sizes))


def node(name: str, op: str, *inputs: str, **attributes: bytes) -> bytes:
    body = message(1, name.encode()) + message(2, op.encode()) + b"".join(message(3, i.encode()) for i in inputs)
    return message(
        1, body + b"".join(message(5, message(1, k.encode()) + message(2, v)) for k, v in attributes.items())
    )


def const(name: str, tensor: bytes, op: str = "Const") -> bytes:
    return node(name, op, dtype=number(6, 1), value=message(8, tensor))


def write_graph(path: Path, constants: dict[str, np.ndarray]) -> None:
    """Constants as in `classify_image_graph_def.pb`, between nodes with attributes of every kind that it has."""
    text = number(1, 7) + message(2, b"") + message(8, b"")
    nodes = [node("DecodeJpeg/contents", "Const", dtype=number(6, 7), value=message(8, text))]
    nodes.append(const("ResizeBilinear/size", number(1, 3) + shape(2) + message(4, np.int32([299, 299]).tobytes())))
    for name, value in constants.items():
        nodes.append(const(name, number(1, 1) + shape(*value.shape) + message(4, value.tobytes())))
        if name.endswith("conv2d_params"):
            strides = message(1, b"".join(number(3, size) for size in (1, 2, 2, 1)))
            nodes.append(node(name[:-7], "Conv2D", "x", name, strides=strides, padding=message(2, b"VALID")))
        elif name.endswith("gamma"):
            epsilon = varint(4 << 3 | 5) + np.float32(0.001).tobytes()
            nodes.append(node(name[:-6], "BatchNormWithGlobalNormalization", name, epsilon=epsilon, scale=number(5, 0)))
    path.write_bytes(b"".join(nodes))
