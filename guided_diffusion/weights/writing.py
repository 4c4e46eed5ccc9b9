"""Copy tensors to main memory, and write them with torch.save, hashed and sent to the disk while more is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import IO, Any, TypeVar, cast

import torch
from torch import Tensor

from ..runtime import storage

T = TypeVar("T")
_SMALL = 1 << 16  # bytes: less is not worth another thread
_SENT_AT_ONCE = 128 << 20  # bytes that go to the disk while the next ones are written


def begun(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """The result, to come, of a call in a thread of its own; at the end of the interpreter, which waits for a save, of a call now."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run).start()
    except RuntimeError:  # no thread begins any more
        run()
    return future


def write_tensors(path: str, content: dict[str, Any]) -> tuple[int, str]:
    """`torch.save` of tensors in main memory, atomically; returns (bytes, SHA-256) of the file. Raises OSError if it cannot write."""
    with storage.atomic_write(path) as file, contextlib.closing(_Hashing(file)) as hashing:
        try:
            torch.save(content, cast(IO[bytes], hashing))
        except RuntimeError:  # torch reports a full disk as "unexpected pos"
            if hashing.error is None:
                raise
            raise hashing.error from None
    return hashing.bytes, hashing.sha.hexdigest()


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples with `change` applied to every tensor in them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def copied_to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in main memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def on_host(tensor: Tensor) -> Tensor:
    """The tensor itself where a file of it is the same as one of `copied_to_host`, else that copy."""
    strides = torch.empty(tensor.shape, device="meta").stride()
    alone = tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach() if alone and tensor.stride() == strides else copied_to_host(tensor)


class _Hashing:
    """A file that counts and hashes the bytes written, so that they need not be read again; `error`: the last OSError of `write`.

    Hashing, copying into the system's cache and writing to the disk each take about as long, so each has a thread.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None
        self._unsent = 0
        self._sending: Future[None] | None = None

    def write(self, data: Any) -> int:
        self.bytes += len(data)
        if len(data) < _SMALL:
            self.sha.update(data)
            return self._written(data)
        hashed = begun(self.sha.update, data)
        try:
            return self._written(data)
        finally:
            hashed.result()  # after this call `data` may be freed

    def _written(self, data: Any) -> int:
        try:
            if self._unsent >= _SENT_AT_ONCE and (self._sending is None or self._sending.done()):
                self.close()
                self._unsent, self._sending = 0, begun(os.fsync, self.file.fileno())
            count = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._unsent += count
        return count

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        """Wait for what is on the way to the disk; the file stays open. OSError if it did not arrive: the system reports that
        once, to the fsync that met it."""
        if self._sending is not None:
            self._sending.result()
