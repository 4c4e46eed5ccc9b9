"""The device of a process: choosing it, finding a GPU that two ranks share, its memory, and the arithmetic networks compute in."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

_log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def require_compiler(device: torch.device) -> None:
    """ValueError unless torch.compile will find the C++ compiler that it needs for code on a CPU: CXX, or the usual one."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX") or usual
    if device.type == "cpu" and not shutil.which(name):
        raise ValueError(
            f"--compile on needs a C++ compiler, and there is no {name!r}; install {usual} (Debian: apt-get install "
            "g++), name another in the environment variable CXX, or leave --compile out"
        )


def choose_precision(precision: str, use_fp16: bool, device: torch.device) -> str:
    """`precision` unless it is empty; else fp16 if `use_fp16` is set and the device is not the CPU; else fp32."""
    slow = "float16 convolutions are some 30 times slower on the CPU"
    if precision == "fp16" and device.type == "cpu":
        _log.warning("--precision fp16, as asked for, although %s", slow)
    if precision:
        return precision
    if use_fp16 and device.type == "cpu":
        _log.info("--use_fp16 True: computing in fp32, because %s", slow)
    return "fp16" if use_fp16 and device.type != "cpu" else "fp32"


@contextlib.contextmanager
def float32_products(*, tf32: bool = True, deterministic: bool = False) -> Iterator[None]:
    """Inside, `set_float32_products` holds instead of what the process had before, which is restored at the end.

    deterministic: no TF32, and for each operation the algorithm that gives the same result every time. Where torch has none for an
    operation, it warns.
    """
    # cuBLAS asks for the first before its first product; torch sets the second when it is asked for deterministic algorithms.
    names = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_CACHE_DIR")
    unset = [name for name in names if deterministic and name not in os.environ]
    if deterministic:
        os.environ.setdefault(names[0], ":4096:8")
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in _products(tf32)]
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        set_float32_products(tf32=tf32 and not deterministic)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        for holder, name, value in before:
            setattr(holder, name, value)
        for name in unset:
            os.environ.pop(name, None)


def set_float32_products(*, tf32: bool) -> None:
    """Set how float32 numbers are multiplied, whatever the process had before: in float32, but with `tf32` a GPU convolves in TF32."""
    for holder, name, value in _products(tf32):
        setattr(holder, name, value)


def describe_products(device: torch.device) -> str:
    """How float32 numbers are multiplied on a device now: "convolutions in TF32, matrix products in float32"."""
    if device.type != "cuda":
        return "in float32"
    now = [getattr(holder, name) for holder, name, _ in _products(True)[:2]]
    words = ["TF32" if value in (True, "tf32") else "float32" for value in now]
    return f"convolutions in {words[0]}, matrix products in {words[1]}"


def _products(tf32: bool) -> list[tuple[Any, str, Any]]:
    """(object, attribute, value) of torch's settings: first that of a GPU's convolutions, then that of its matrix products."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    cuda: Any = torch.backends.cuda.matmul
    if not hasattr(cuda, "fp32_precision"):  # torch before 2.9
        return [(cudnn, "allow_tf32", tf32), (cuda, "allow_tf32", False)]
    settings: Any = [
        (cudnn.conv, "tf32" if tf32 else "ieee"),
        (cuda, "ieee"),
        (mkldnn.matmul, "ieee"),
        (mkldnn.conv, "ieee"),
    ]
    settings.append((cudnn.rnn, settings[0][1]))  # of no use here, but the older name `allow_tf32` reads both
    return [(holder, "fp32_precision", value) for holder, value in settings]


def compute_in(net: nn.Module, precision: str, *, store: bool = False) -> None:
    """Let a network compute in fp32, bf16 or fp16; `store`: it may also store its weights in it. ValueError if it supports fp32 only."""
    set_dtype = getattr(net, "set_compute_dtype", None)
    if set_dtype is not None:
        set_dtype(DTYPES[precision], **({"store": True} if store else {}))
    elif precision != "fp32":
        raise ValueError(
            f"{type(net).__name__} cannot compute in {precision}, as it has no set_compute_dtype(dtype, store); give --precision fp32"
        )


def choose_device(device: str | torch.device, local_rank: int, local_size: int) -> torch.device:
    """The device of one process among `local_size` on its host.

    Where several GPUs are visible, local rank k takes GPU k. Where one is (clusters that bind one GPU to each task), every process takes
    the GPU it sees; `shared_gpu` finds out later whether two of them hold the same one.
    """
    wanted = str(device)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device is {wanted!r}; it must be auto, cpu, cuda, or one GPU such as cuda:1") from None
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch sees no CUDA device "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}); use device=cpu or auto"
        )
    if chosen.index is None:
        count = torch.cuda.device_count()
        if local_rank >= count > 1:
            raise ValueError(
                f"process {local_rank} of {local_size} on {platform.node()} has no GPU: {count} are visible "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}); start {count} processes per host, or make more visible"
            )
        chosen = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(chosen)
    return chosen


def shared_gpu(rows: list[dict[str, str]]) -> str:
    """An error message if two ranks hold the same GPU, else "". `rows`: one per rank with "rank", "host", "device", "identity"."""
    first_holder: dict[str, dict[str, str]] = {}
    for row in rows:
        other = first_holder.setdefault(row["host"] + row["identity"], row) if row["identity"] else row
        if other is not row:
            return (
                f"ranks {other['rank']} and {row['rank']} on host {row['host']} would share one GPU ({row['device']}). Start one "
                "process per GPU and give each its own: `torchrun --nproc-per-node=<GPUs>`, or "
                "`srun --ntasks-per-node=<GPUs> --gpus-per-task=1`; or use device=cpu"
            )
    return ""


def versions() -> dict[str, str]:
    """The versions on which numbers depend, for receipts."""
    return {"torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version()}


def describe(device: torch.device) -> dict[str, str]:
    """Host, device and memory of this process. "identity" is equal for two processes on a host if they hold the same GPU; "" on a CPU."""
    name, identity = platform.processor() or platform.machine(), ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        identity = str(getattr(properties, "uuid", "")) or f"{os.environ.get('CUDA_VISIBLE_DEVICES')}/{device.index}"
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "host": platform.node(),
        "device": f"{device} {name}".strip(),
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "?",
        "identity": identity,
    }


def available_memory(device: torch.device) -> int:
    """Free bytes of a GPU; for the CPU, available bytes of main memory within the limits of this container or job (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return min([_line_of("/proc/meminfo", "MemAvailable:") or whole, *_left_in_cgroups()])


def used_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process's tensors occupy; for the CPU, the resident memory of the whole process (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _line_of("/proc/self/status", "VmRSS:") or _peak_resident()


def give_back(device: torch.device) -> None:
    """Return free memory that the allocators of CUDA or glibc keep cached to the device or the operating system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # of glibc
        trim(0)


def return_freed_memory(device: torch.device) -> None:
    """From now on freed tensors in main memory leave the process at once: less memory, some percent more time.

    Otherwise glibc keeps those below 32 MB in its heap, where tensors that live long keep others from using the gaps.
    Nothing changes on other devices and systems.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type == "cpu" and set_option is not None:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            set_option(option, 4 << 20)  # bytes


def _line_of(path: str, name: str) -> int:
    """The size in bytes that the line `name` of a Linux /proc file gives in KiB; 0 if the file or the line is missing."""
    if not Path(path).exists():
        return 0
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[:1] == [name]), 0)


def _peak_resident() -> int:
    """Peak resident memory of this process in bytes: a substitute where there is no /proc; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _left_in_cgroups() -> list[int]:
    """Bytes left below the memory limit of this process's cgroup and of each cgroup above it, at least 1 (Linux, cgroup version 2)."""
    lines = _OWN_GROUP.read_text().splitlines() if _OWN_GROUP.exists() else []
    names = [line[3:].strip("/") for line in lines if line.startswith("0::")]
    left = []
    for group in [folder for name in names for folder in (_GROUPS / name, *(_GROUPS / name).parents)]:
        try:
            limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
            words = (group / "memory.stat").read_text().split()
            # The page cache counts as used, but the kernel drops its inactive part when a process needs memory.
            left.append(max(1, int(limit) - int(used) + int(words[words.index("inactive_file") + 1])))
        except (OSError, ValueError):  # noqa: PERF203 - no such cgroup, or "max": no limit
            pass
    return left


def table(rows: list[dict[str, str]]) -> str:
    """The rows as aligned columns, without "identity"."""
    columns = [name for name in rows[0] if name != "identity"]
    lines = [columns, *([row[name] for name in columns] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
