"""What the machine can do at best, measured: matrix products, convolutions, and moving bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .timing import clock_of


def seconds(call: Callable[[], object], device: str, rounds: int = 5) -> float:
    """Median time of a call, after one to warm up."""
    now = clock_of(device)
    call()
    times = []
    for _ in range(rounds):
        begin = now()
        call()
        times.append(now() - begin)
    return median(times)


def rates(device: str = "cpu", quick: bool = False) -> dict[str, float]:
    """GFLOP/s of products and 3x3 convolutions in float32 and bfloat16, and GB/s of a copy (read and written bytes)."""
    side = 8192 if device.startswith("cuda") else 512 if quick else 1024
    pixels, images = (64, 32) if device.startswith("cuda") else (32, 2)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            a = torch.randn(side, side, device=device).to(dtype)
            found[f"matmul {name} GFLOP/s"] = 2e-9 * side**3 / seconds(partial(torch.matmul, a, a), device)
            x = torch.randn(images, 192, pixels, pixels, device=device).to(dtype, memory_format=torch.channels_last)
            weight = torch.randn(192, 192, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
            flops = 2e-9 * images * pixels**2 * 192**2 * 9
            took = seconds(partial(F.conv2d, x, weight, padding=1), device)
            found[f"convolution {name} GFLOP/s"] = flops / took
        words = (1 << 26) if not quick else (1 << 24)
        source = torch.ones(words, device=device)
        target = torch.empty_like(source)
        found["copy GB/s"] = 2e-9 * 4 * words / seconds(lambda: target.copy_(source), device)
    return found


def best(found: dict[str, float], dtype: str = "float32") -> float:
    """The higher of the two arithmetic rates, FLOP/s."""
    return 1e9 * max(found[f"matmul {dtype} GFLOP/s"], found[f"convolution {dtype} GFLOP/s"])


def flops(call: Callable[[], Any]) -> float:
    """Multiplications and additions of the matrix products and convolutions in a call (two per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


# Their arithmetic is counted as operations; what they read and write beside it hides behind it.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_MAKE_PLACE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_READ_NOTHING = (
    "fill_", "zero_", "normal_", "uniform_", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_full",
)  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts bytes that operations inside read and write, but for views, matrix products, convolutions and attention.

    Every operation is taken to read its inputs once and to write its outputs once, as if nothing stayed in a cache: right
    for images larger than the caches, too much for small ones. `copies` counts copies from one kind of device to another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # operations that are made of others, which inference mode would show as one
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        found = func(*args, **kwargs)
        read, written = moved(func, args, kwargs, found)
        name = _name(func)
        self.copies += name in ("copy_", "_to_copy") and len({tensor.device.type for tensor in (*read, *written)}) > 1
        if name not in _PRODUCTS and "convolution" not in name and "attention" not in name:
            self.bytes += sum(map(_extent, (*read, *written)))
        return found


def moved(func: Any, args: Any, kwargs: Any, found: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors that an operation read, tensors that it wrote); neither where it only looked at memory anew or set it aside."""
    name = _name(func)
    read: list[Tensor] = []
    changed: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        tensors = _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        changed += tensors if is_changed else []
        read += [] if name in _READ_NOTHING or (is_changed and name == "copy_") else tensors
    known = {_memory(tensor) for value in (args, kwargs) for tensor in _tensors(value)}
    made = [tensor for tensor in _tensors(found) if _memory(tensor) not in known]
    if name in _MAKE_PLACE or not (made or changed):
        return [], []
    return read, changed + made


def _name(func: Any) -> str:
    """`add` of aten::add.Tensor."""
    return func._schema.name.split("::")[1]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> float:
    """Bytes of the different numbers of a tensor: what an expanded dimension repeats counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride else min(size, 1)
    return float(count * tensor.element_size())


def traffic(call: Callable[[], Any]) -> float:
    """Bytes moved by what is neither a view nor a matrix product, convolution or attention in a call (see Traffic)."""
    with Traffic() as counter:
        call()
    return counter.bytes


@dataclass(frozen=True)
class Work:
    """What a call must do at least: arithmetic of its matrix products and convolutions, and bytes moved besides."""

    flops: float
    bytes: float = 0.0

    def seconds(self, rate: float, bandwidth: float = float("inf")) -> float:
        """At `rate` FLOP/s and `bandwidth` bytes/s, one after the other, as kernels run; at no bandwidth given, arithmetic alone."""
        return self.flops / rate + self.bytes / bandwidth

    def used(self, took: float, rate: float, bandwidth: float) -> str:
        """How much of the machine's best a call of `took` seconds made use of, in words."""
        alone, both = self.seconds(rate) / took, self.seconds(rate, bandwidth) / took
        return f"{alone:.0%} of the floor in arithmetic, {both:.0%} with traffic"


def bandwidth(found: dict[str, float]) -> float:
    """Bytes/s of a copy, read and written."""
    return 1e9 * found["copy GB/s"]
