"""A pretended GPU, for the tests that need one on a machine without: `python -m pytest -p tests.pretend_gpu -m gpu`.

Everything that asks for a CUDA device gets one, and code written for a GPU runs there as written: only its numbers come from
the CPU (device.cpp). A real GPU's refusals are kept: operations do not mix devices, memory runs out (earlier with
`torch.cuda.set_per_process_memory_fraction`), waiting for the device raises where `torch.cuda.set_sync_debug_mode("error")`
forbids it, a CUDA graph computes with what lies in the memory it was recorded on. What it cannot tell: speed, rounding of
other kernels, NCCL, Triton and what Inductor makes of it; generators are the CPU's, whatever device they were made for; and not
every operation that waits on a real GPU is known here to wait.

`python -m tests.pretend_gpu` builds it and says whether that is possible here: it takes a C++ compiler, and a torch without
CUDA whose internals are those it was written for (2.13).
`PRETEND_GPU_SHAPES_ONLY=1 python -m tests.pretend_gpu benchmarks --device cuda --only gpu-fitting` computes nothing but shapes:
what of the released networks' memory fits into `PRETEND_GPU_GB`, in a minute.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
WRITTEN_FOR = "2.13."  # the torch whose internals device.cpp knows
GB = 1 << 30


class Impossible(RuntimeError):
    """There can be no pretended GPU on this machine, or with this torch."""


def built() -> Path:
    """The library, compiled unless it lies there from an earlier time. Impossible, or RuntimeError where the source is at fault."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise Impossible("there is no torch")
    torch = Path(spec.origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise Impossible("this torch is made for real GPUs")
    version = (torch / "version.py").read_text()
    name = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    library = SOURCE.parents[2] / "build" / f"pretend_gpu-{name}.so"
    if library.exists():
        return library
    library.parent.mkdir(exist_ok=True)
    half = tempfile.mktemp(suffix=".so", dir=library.parent)
    command = [
        *(os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++20", "-O1", "-w", str(SOURCE), "-o", half),
        *(f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"),
        *(f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Impossible(f"there is no C++ compiler: {error}") from None
    if done.returncode:
        kind = RuntimeError if f"'{WRITTEN_FOR}" in version else Impossible
        raise kind(f"it does not compile against this torch:\n{done.stderr[-2000:]}")
    os.replace(half, library)  # several processes may build at once
    return library


def install() -> None:
    """Give this process the pretended GPU. Before torch is imported: what torch finds when it starts is what it keeps."""
    if "torch" in sys.modules:
        raise RuntimeError("the pretended GPU comes too late: torch is imported already")
    library = ctypes.CDLL(str(built()))
    library.pretend_limit.argtypes = [ctypes.c_long]
    for name in ("pretend_used", "pretend_peak"):
        getattr(library, name).restype = ctypes.c_long
    total = int(float(os.environ.get("PRETEND_GPU_GB", "80")) * GB)
    library.pretend_limit(total)

    import torch

    for name, value in _stand_ins(library, total).items():
        setattr(torch.cuda, name, value)
    torch.cuda.pretended = True  # type: ignore[attr-defined]


def _stand_ins(library: Any, total: int) -> dict[str, Any]:
    """What `torch.cuda` has in a torch that is built for GPUs, as far as it is needed here."""
    import torch

    streams = [_Stream()]

    @contextlib.contextmanager
    def stream(chosen: _Stream) -> Iterator[None]:
        streams.append(chosen)
        try:
            yield
        finally:
            streams.pop()

    def properties(_: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name="pretended GPU", total_memory=total, major=9, minor=0, multi_processor_count=1)

    used, peak = (lambda _=None: library.pretend_used()), (lambda _=None: library.pretend_peak())
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda _=None: None,
        "get_device_name": lambda _=None: "pretended GPU",
        "get_device_capability": lambda _=None: (9, 0),
        "get_device_properties": properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda _=None: (total - library.pretend_used(), total),
        "set_per_process_memory_fraction": lambda share, _=None: library.pretend_limit(int(share * total)),
        "memory_allocated": used,
        "memory_reserved": used,
        "max_memory_allocated": peak,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": lambda _=None: library.pretend_forget_peak(),
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: library.pretend_forbid_waiting(mode in ("error", 2)),
        "get_sync_debug_mode": lambda: 0,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda state, _=None: torch.set_rng_state(state),
        "get_rng_state_all": list,
        "set_rng_state_all": lambda _: None,
        "Stream": _Stream,
        "Event": _Event,
        "stream": stream,
        "current_stream": lambda _=None: streams[-1],
        "default_stream": lambda _=None: streams[0],
        "is_current_stream_capturing": lambda: False,
        "CUDAGraph": _Graph,
        "graph": _record,
    }


class _Stream:
    """Everything happens in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    wait_event = wait_stream

    def synchronize(self) -> None:
        pass


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._at: float | None = None

    def record(self, _: Any = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        assert self._at is not None, "an event that was never recorded is waited for"

    def query(self) -> bool:
        return self._at is not None

    def elapsed_time(self, later: _Event) -> float:
        assert self._at is not None and later._at is not None
        return 1e3 * (later._at - self._at)


class _Graph:
    """Operations with the tensors they were recorded with. Replayed, they leave their results in the same memory."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operations: list[Any] = []

    def replay(self) -> None:
        import torch
        from torch.utils._pytree import tree_leaves

        assert self.operations, "a graph that was never recorded is replayed"
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def _record(graph: _Graph, **_: Any) -> Iterator[None]:
    """Fills `graph`. As on a GPU, nothing may wait for the device meanwhile."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            graph.operations.append((func, args, kwargs or {}, result))
            return result

    torch.cuda.set_sync_debug_mode("error")
    try:
        with Recorder():
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def main(words: list[str]) -> int:
    """Build it; with words, run the module they begin with on it. Returns 0, 3 where that cannot be here, 1 where it must be."""
    try:
        built()
    except RuntimeError as error:
        print(f"no pretended GPU: {error}")
        return 3 if isinstance(error, Impossible) else 1
    if words:
        install()
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return 0


if "pytest" in sys.modules:  # as a plugin of pytest, asked for by name
    install()
