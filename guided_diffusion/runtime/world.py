"""The processes of a job: this one's rank and device, and the collectives between them.

A single process makes no process group, and every collective is a no-op. Several processes (torchrun, srun, mpiexec) meet through a store,
check that no two share a GPU, and from then on communicate through torch.distributed only: NCCL on CUDA, gloo elsewhere.
Every collective is entered by all ranks or by none; never write one under `if world.is_main`.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import launchers, watch
from .devices import choose_device, describe, shared_gpu, table

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 600.0
REQUEUE_EXIT_CODE = 85  # "stopped early on request, everything saved: start me again"
_log = logging.getLogger(__name__)
_MEETINGS = count()
# By place and address, for the life of the process: a later `start` meets there again, maybe while other ranks still use the last world.
_STORES: dict[Any, Any] = {}
_TIMEOUT = re.compile("[Tt]imed out|[Tt]imeout")
# Found in the errors of gloo, NCCL, TCPStore and the operating system when another rank does not answer.
_NETWORK = re.compile(f"{_TIMEOUT.pattern}|[Cc]onnection|gloo|NCCL|TCPStore|socket|[Bb]roken pipe|remote|peer")


class CollectiveError(RuntimeError):
    """A collective failed or timed out; the message names rank, operation and step."""


class _ReportedElsewhere(ValueError):
    """A user's error that every rank raises and rank 0 alone reports."""

    reported_elsewhere = True


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process, and its collectives. `World()` is a single process on the CPU."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str | None = None
    launcher: str = "alone"
    context: watch.Context = field(default_factory=watch.Context, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and messages."""
        return self.rank == 0

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Name the collective that the body waits for: if it fails or times out, `CollectiveError` gives rank, step and `name`."""
        context, start = self.context, time.monotonic()
        outer = (context.operation, context.since)
        context.operation, context.since = name, start
        try:
            yield
        except CollectiveError:
            raise
        except RuntimeError as error:
            if not _NETWORK.search(str(error)):
                raise
            waited = time.monotonic() - start
            if _TIMEOUT.search(str(error)):
                text = watch.timeout_message(context, name, waited)
            else:
                text = (
                    f"[{context.where()}] {name} failed after {waited:.1f} s: another rank has probably ended. {error}"
                )
            raise CollectiveError(text) from error
        finally:
            context.operation, context.since = outer

    def barrier(self, name: str = "barrier") -> None:
        """Wait until every rank is here. An all-reduce whose result the host reads, so that the host waits on CUDA too."""
        self.any_true(False, name)

    def broadcast_(self, tensor: Tensor, src: int = 0, name: str = "broadcast") -> Tensor:
        """Overwrite `tensor` (same shape and dtype on all ranks) with rank `src`'s values; returns it."""
        return self._in_place(dist.broadcast, tensor, name, src=src)

    def all_reduce_sum_(self, tensor: Tensor, name: str = "all_reduce") -> Tensor:
        """Replace `tensor` by its sum over the ranks, in place; returns it. On CUDA the host does not wait."""
        return self._in_place(dist.all_reduce, tensor, name)

    def _in_place(self, collective: Callable[..., Any], tensor: Tensor, name: str, **options: Any) -> Tensor:
        """Start `collective` as the operation `name`, note it for the watch, and wait (on CUDA only the stream waits)."""
        if self.size > 1:
            moved = tensor.detach().to(self.device).contiguous()
            with self.operation(name):
                work = collective(moved, async_op=True, **options)
                if self.device.type == "cuda":
                    self.context.pending.append((name, time.monotonic(), work))
                work.wait()
            if moved.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(moved)
        return tensor

    def all_gather_cat(self, tensor: Tensor, name: str = "all_gather") -> Tensor:
        """All ranks' tensors joined along dim 0 in rank order. Their first dimensions may differ, also be 0; the others may not."""
        if self.size == 1:
            return tensor
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = tensor.shape[0]
        counts = self.all_reduce_sum_(lengths, f"{name} (lengths)").tolist()
        if not any(counts):
            return tensor
        wire = tensor.detach().to(self.device).contiguous()
        if wire.dtype == torch.bool:
            wire = wire.to(torch.uint8)
        padded = wire.new_zeros((max(counts), *wire.shape[1:]))
        padded[: wire.shape[0]] = wire
        parts = [torch.empty_like(padded) for _ in counts]
        with self.operation(name):
            dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts)]).to(tensor)

    def broadcast_object(self, value: T, src: int = 0, name: str = "broadcast_object") -> T:
        """Rank `src`'s picklable `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self.operation(name):
            dist.broadcast_object_list(box, src=src, device=self.device)
        return box[0]

    def all_gather_object(self, value: T, name: str = "all_gather_object") -> list[T]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        with self.operation(name):
            dist.all_gather_object(box, value)
        return box

    def any_true(self, flag: bool, name: str = "any_true") -> bool:
        """True on every rank if `flag` is true on any rank: an all-reduce of one number."""
        if self.size == 1:
            return bool(flag)
        with self.operation(name):
            return bool(self.all_reduce_sum_(torch.tensor(int(flag)), name).item())


def start(device: str | torch.device = "auto", *, timeout_s: float = DEFAULT_TIMEOUT_S) -> World:
    """Find the rank and device of this process and join the process group.

    `device`: "auto" (CUDA if there is any, else CPU), "cpu", "cuda", or one device such as "cuda:1" for one process.
    `timeout_s`: how long a rank waits in a collective before it ends with an error that names it.
    Rank 0 logs a table of rank, host, device and memory.
    A process group that exists already is used as it is, and `stop` leaves it alone.
    """
    place = launchers.discover(os.environ)
    if dist.is_available() and dist.is_initialized():
        return _adopt(device, place)
    if place.size == 1:
        world = World(device=choose_device(device, 0, 1), launcher=place.launcher)
        _log.info(table([_describe(world)]))
        return world
    store = _meet(place, min(timeout_s, DEFAULT_TIMEOUT_S))
    # Host names and devices go through the store, before there is a process group, so that every rank learns of an error of any.
    hosts = _exchange(store, "hosts", place, platform.node())
    same_host = [r for r, host in enumerate(hosts) if host == hosts[place.rank]]
    local_rank = same_host.index(place.rank) if place.local_rank is None else place.local_rank
    local_size = len(same_host) if place.local_size is None else place.local_size
    context = watch.Context(rank=place.rank, size=place.size, store=store)
    row, chosen = {}, torch.device("cpu")
    try:
        chosen = choose_device(device, local_rank, local_size)
    except ValueError as error:  # sent to the other ranks, so that all of them raise it
        row = {"problem": str(error)}
    backend = backend_of(chosen)
    world = World(place.rank, place.size, local_size, chosen, backend, place.launcher, context)
    rows = _exchange(store, "devices", place, row or _describe(world))
    problem = next((row["problem"] for row in rows if "problem" in row), "") or shared_gpu(rows)
    if problem:
        raise (ValueError if world.is_main else _ReportedElsewhere)(problem)
    # gloo raises on a timeout in the main thread. NCCL would abort the process without our message, so there the watch times out first.
    nccl = backend == "nccl"
    context.patience_s = timeout_s if nccl else timeout_s + watch.GRACE_S
    context.silence_s = min(watch.SILENCE_S, timeout_s)
    context.watch = watch.Watch(context, store.clone())
    limit = timedelta(seconds=timeout_s + watch.GRACE_S if nccl else timeout_s)
    device_id = chosen if nccl else None
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.size, timeout=limit, device_id=device_id
    )
    context.watch.start()
    atexit.register(context.watch.stop)  # a thread that still waits for the store would abort the process at exit
    if world.is_main:
        _log.info(table(rows))
    return world


def stop(world: World) -> None:
    """Wait for the other ranks and destroy the process group. Call it on every rank that ends without an error.

    gloo threads that outlive the interpreter can abort the process, so the group is destroyed before the exit.
    """
    context = world.context
    if context.watch is None or not dist.is_initialized():
        return
    try:
        # In this order: a rank that waits here for the others must keep up its heartbeat.
        world.barrier("last barrier before the end")
        context.watch.stop()
    finally:
        take_down()
        context.watch = context.store = None


def take_down() -> None:
    """Destroy the process group and let its threads finish.

    An object that still refers to the group (a DDP network) keeps its threads alive. Such a thread may still be freeing the tensors of
    the last collective, which needs the interpreter: if that is already shutting down, the process aborts. Hence the pause.
    """
    dist.destroy_process_group()
    time.sleep(0.1)


@contextmanager
def session(device: str | torch.device = "auto", *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[World]:
    """`start` and `stop` around the body. The whole life of a command: `with session() as world: ...`.

    With several ranks, an exception in the body is printed with its rank and ends the whole job within seconds.
    """
    world = start(device, timeout_s=timeout_s)
    leaving = None  # exit codes of success, and of a stop that all ranks agreed on, leave the group in order like a normal end
    try:
        try:
            yield world
        except SystemExit as error:
            if error.code not in (None, 0, REQUEUE_EXIT_CODE):
                raise
            leaving = error
        stop(world)
    except BaseException as error:
        if world.size == 1:
            raise
        watch.die(world.context, error)
    if leaving is not None:
        raise leaving


def _adopt(device: str | torch.device, place: launchers.Place) -> World:
    """The world of a process group that the calling program has made."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if place.size != size:
        place = launchers.Place(rank, size, None, None, place.launcher)
    local_rank = rank if place.local_rank is None else place.local_rank
    local_size = size if place.local_size is None else place.local_size
    chosen = choose_device(device, local_rank, local_size)
    context = watch.Context(rank=rank, size=size)
    return World(rank, size, local_size, chosen, dist.get_backend(), place.launcher, context)


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"


def _meet(place: launchers.Place, timeout_s: float) -> Any:
    """The store through which all processes of the job find each other."""
    limit = timedelta(seconds=timeout_s)
    try:
        known = launchers.known_address(place, os.environ)
        if (place, known) not in _STORES:
            if place.launcher == "torchrun":  # as a rule torchrun itself has opened a store
                store = next(iter(dist.rendezvous("env://", place.rank, place.size, timeout=limit)))[0]
            elif known:
                store = _tcp_store(*known, place, limit)
            else:
                store = _meet_through_mpi(place, limit)
            _STORES[place, known] = store
        _STORES[place, known].set_timeout(limit)
        # The store outlives restarts by torchrun and each world of this process. Keys that these left in it (a death note, the
        # addresses of gloo) must not be read again, so each world prefixes its keys.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"attempt{attempt}/meeting{next(_MEETINGS)}", _STORES[place, known])
    except (RuntimeError, TimeoutError) as error:
        raise CollectiveError(
            f"[rank {place.rank} of {place.size}] could not meet the other processes: {error}"
        ) from error


def _meet_through_mpi(place: launchers.Place, limit: timedelta) -> Any:
    """A store for processes on several hosts: rank 0 opens a free port and broadcasts its address through MPI."""
    comm = launchers.mpi_communicator()
    if comm is None or comm.Get_size() != place.size:
        raise ValueError(
            f"{place.size} processes were started by {place.launcher}, not all on this host, and nothing says where they can meet. "
            "Either install mpi4py, or pass MASTER_ADDR (the name of the first host) and MASTER_PORT (any free port) to every process: "
            "`mpiexec -genv MASTER_ADDR node1 -genv MASTER_PORT 29500 ...` (MPICH), "
            "`mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500 ...` (Open MPI); or start with torchrun or srun."
        )
    store = _tcp_store(platform.node(), 0, place, limit) if place.rank == 0 else None
    host, port = comm.bcast((platform.node(), store.port) if store is not None else None)
    return _tcp_store(host, port, place, limit) if store is None else store


def _tcp_store(host: str, port: int, place: launchers.Place, limit: timedelta) -> Any:
    # torch's Windows builds come without libuv
    options = {"use_libuv": False} if os.name == "nt" else {}
    return dist.TCPStore(host, port, place.size, place.rank == 0, timeout=limit, wait_for_workers=False, **options)


def _exchange(store: Any, key: str, place: launchers.Place, value: Any) -> list[Any]:
    """Every rank's JSON-able `value`, in rank order, before there is a process group."""
    names = [f"guided_diffusion/{key}/{rank}" for rank in range(place.size)]
    store.set(names[place.rank], json.dumps(value))
    try:
        if place.rank == 0:  # reads all, so that the others read one key each
            store.set(f"guided_diffusion/{key}", json.dumps([json.loads(store.get(name)) for name in names]))
        return json.loads(store.get(f"guided_diffusion/{key}"))
    except RuntimeError as error:
        missing = [str(rank) for rank, name in enumerate(names) if place.rank == 0 and not store.check([name])]
        cause = f"no word from rank {', '.join(missing)}" if missing else str(error)
        raise CollectiveError(f"[rank {place.rank} of {place.size}] exchanging {key}: {cause}") from None


def _describe(world: World) -> dict[str, str]:
    """One row of the start table."""
    row = describe(world.device)
    return {"rank": str(world.rank), **row, "backend": world.backend or "-", "launcher": world.launcher}
