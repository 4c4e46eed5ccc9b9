"""Memory of this process and of its device, in bytes: what it holds, the most that it held, what is left."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

from .doctor import available_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUPS = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
_ALONE = 4 << 20  # bytes from which on an allocation is the system's own


def give_back(device: torch.device) -> None:
    """Return memory that allocators keep for later to the device or the operating system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        _call("malloc_trim", 0)


def give_back_at_once(device: torch.device) -> None:
    """From now on, let freed tensors of main memory leave the process at once: less memory, some percent more time.

    Else glibc keeps those below 32 MB in its heap, and what lives long between them (gradients) keeps others from using
    their places: of a small network's passes up to a third. On other devices and systems nothing changes.
    """
    if device.type == "cpu" and sys.platform == "linux":
        _call("mallopt", _M_MMAP_THRESHOLD, _ALONE)
        _call("mallopt", _M_TRIM_THRESHOLD, _ALONE)


def used(device: torch.device) -> int:
    """What this process holds: tensors on a GPU; on the CPU the whole process, its code and its data."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _highest()


def peak(device: torch.device) -> int:
    """The most that `used` was since `restart_peak`, or since the process began where that cannot be had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _highest()


def restart_peak(device: torch.device) -> bool:
    """Let `peak` count from now on. False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def free(device: torch.device) -> int:
    """What this process could still take: of the GPU; or of main memory, within the limit of its container or job."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return available_memory(device) + cached
    return min([available_memory(device), *_left_in_groups()])


def _call(name: str, *numbers: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)  # glibc has it, other C libraries need not
    if function is not None:
        function(*numbers)


def _status(name: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _highest() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _left_in_groups() -> list[int]:
    """What is left below each memory limit that holds for this process (Linux control groups, version 2)."""
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = _CGROUPS / own.strip("/")
    left = []
    for group in (folder, *folder.parents):
        try:
            most, now = (group / "memory.max").read_text(), (group / "memory.current").read_text()
            words = (group / "memory.stat").read_text().split()
            # Files that were read count as memory, but make way for what asks for it.
            left.append(int(most) - int(now) + int(words[words.index("inactive_file") + 1]))
        except (OSError, ValueError):  # no such group, or "max": no limit
            pass
        if group == _CGROUPS:
            break
    return left
