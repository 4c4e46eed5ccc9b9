"""Door: the 2021 helpers for several processes, on `runtime.world`. The process-wide "current world" lives here."""

from __future__ import annotations

import atexit
import io
import os
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace as _replace
from types import SimpleNamespace
from typing import Any

import torch as th
import torch.distributed as dist

from .runtime import launchers as _launchers
from .runtime import storage as _storage
from .runtime import watch as _watch
from .runtime import world as _rooms

GPUS_PER_NODE = 8  # kept for readers; devices follow LOCAL_RANK and CUDA_VISIBLE_DEVICES now
SETUP_RETRY_COUNT = 3

_current: _rooms.World | None = None


def setup_dist() -> None:
    """Join the other processes (torchrun, srun, mpiexec, or a group of one). Does nothing when a group exists already.

    `CUDA_VISIBLE_DEVICES` is left as it is. A rank that dies of an exception takes the others with it.
    """
    global _current
    if dist.is_initialized():
        return
    _current = _rooms.start()
    if _current.size == 1:  # code of 2021 calls torch.distributed itself
        backend = _rooms.backend_of(_current.device)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        _current = _replace(_current, backend=backend)
    atexit.register(_leave)
    if _current.size > 1:
        context, hook = _current.context, sys.excepthook
        sys.excepthook = lambda kind, error, trace: (
            _watch.die(context, error) if dist.is_initialized() else hook(kind, error, trace)
        )


def _leave() -> None:
    """At exit: gloo threads that outlive the interpreter can abort it. No barrier here, the others may be gone."""
    if _current is not None and dist.is_initialized():
        if _current.context.watch is not None:
            _current.context.watch.stop()
        _rooms.take_down()


def _world() -> _rooms.World:
    """The world of `setup_dist`, of a group made elsewhere, or of one process."""
    if _current is not None and dist.is_initialized():
        return _current
    if dist.is_initialized():
        return _rooms.start()
    return _rooms.World()


def dev() -> th.device:
    """The device of this process."""
    if _current is not None:
        return _current.device
    return th.device("cuda" if th.cuda.is_available() else "cpu")


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """`torch.load` of a local or remote file with `kwargs`; `weights_only` is True unless given.

    Every process that calls it reads for itself. It is no collective, so it may stand under `if rank == 0`.
    """
    kwargs.setdefault("weights_only", True)
    path = _storage.expand(path)
    if _storage.is_remote(path):
        return th.load(io.BytesIO(_storage.read_bytes(path)), **kwargs)
    return th.load(path, **kwargs)


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Overwrite `params` with rank 0's values, on all ranks."""
    world = _world()
    for param in params:
        world.broadcast_(param, name="sync_params")


def _find_free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


class _Communicator:
    """What 2021 code asked of `MPI.COMM_WORLD`, answered by torch.distributed."""

    def Get_rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else _launchers.discover(os.environ).rank

    def Get_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else _launchers.discover(os.environ).size

    rank = property(Get_rank)
    size = property(Get_size)

    def bcast(self, obj: Any = None, root: int = 0) -> Any:
        return self._joined("bcast").broadcast_object(obj, src=root)

    def allgather(self, sendobj: Any) -> list[Any]:
        return self._joined("allgather").all_gather_object(sendobj)

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        values = self.allgather(sendobj)
        return values if self.Get_rank() == root else None

    def Barrier(self) -> None:
        self._joined("Barrier").barrier()

    barrier = Barrier

    def _joined(self, operation: str) -> _rooms.World:
        if self.Get_size() > 1 and not dist.is_initialized():
            raise RuntimeError(f"MPI.COMM_WORLD.{operation} needs dist_util.setup_dist() first: mpi4py is not in use")
        return _world()


def _mpi() -> Any:
    # mpi4py's world is the job only if MPI launched it: under torchrun every process would be rank 0 of 1.
    launched_by_mpi = _launchers.discover(os.environ).launcher in ("openmpi", "mpich", "mpi4py")
    if launched_by_mpi and _launchers.mpi_communicator() is not None:
        from mpi4py import MPI

        return MPI
    return SimpleNamespace(COMM_WORLD=_Communicator())


def _blobfile() -> Any:
    import blobfile

    return blobfile


class _Lazy:
    """A module's name that star imports bind too, loaded when an attribute is first asked for."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)


MPI = _Lazy(_mpi)
bf = _Lazy(_blobfile)
