"""Arrays in npy files and npz members, read in slices: a 10 GB sample file is never in memory as a whole.

Files are untrusted: nothing in them is executed, pickled objects are refused, and the declared size must agree with the shape.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class DiskArray:
    """An array in a file, of which `array[start:stop]` reads a range of the first axis.

    Compressed data is unpacked while it is read: reading on is cheap, going back starts at the beginning of the file. zipfile checks
    the checksum of a member that is read from start to end. ValueError for anything but an array of numbers.
    """

    def __init__(self, path: str | os.PathLike[str], member: zipfile.ZipInfo | None = None) -> None:
        self.path = os.fspath(path)
        self.name = self.path if member is None else f"{member.filename} in {self.path}"
        self._member = member
        self._columns: np.ndarray | None = None
        self._file = self._open()
        try:
            self.shape, self._fortran, self.dtype = _HEADERS[np.lib.format.read_magic(self._file)](self._file)
        except Exception as error:  # numpy parses headers by Python's parser, which raises many kinds of error
            raise ValueError(f"{self.name} is not an npy array, or its header is damaged: {error}") from error
        self._start = self._file.tell()
        if self.dtype.hasobject:
            raise ValueError(
                f"{self.name} holds pickled Python objects, which can run code when read; save a plain array"
            )
        if self.dtype.kind not in "buif" or self.dtype.itemsize > 8:
            raise ValueError(f"{self.name} holds {self.dtype}, expected numbers (uint8 for images)")
        self._item_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        size = os.path.getsize(self.path) if member is None else member.file_size
        needed = self._start + math.prod(self.shape) * self.dtype.itemsize
        if size != needed:
            raise ValueError(
                f"{self.name} is cut off or damaged: shape {self.shape} of {self.dtype} needs {needed} bytes, there are {size}"
            )

    def _open(self) -> IO[bytes]:
        return open(self.path, "rb") if self._member is None else zipfile.ZipFile(self.path).open(self._member)

    def __getitem__(self, span: slice) -> np.ndarray:
        """Entries of the first axis, in native byte order; ValueError when the data is damaged or ends early."""
        native = self.dtype.newbyteorder("=")
        start, stop, _ = span.indices(self.shape[0])
        try:
            if self._fortran and len(self.shape) > 1:
                return self._mapped()[start:stop].astype(native)
            data = self._bytes(self._start + start * self._item_bytes, (stop - start) * self._item_bytes)
        except Exception as error:  # zipfile and zlib raise several kinds of error for damage
            raise ValueError(f"{self.name} is damaged: {error}") from error
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:]).astype(native, copy=False)

    def _bytes(self, first: int, count: int) -> bytearray:
        if first < self._file.tell():
            # Open it again, since zipfile stops checking the checksum of a member after a seek backwards.
            self._file.close()
            self._file = self._open()
        self._file.seek(first)
        data = bytearray(self._file.read(count))  # writable, as PyTorch wants it
        if len(data) != count:
            raise EOFError(f"{count - len(data)} bytes are missing")
        return data

    def _mapped(self) -> np.ndarray:
        """Map an array in column order; a zip member is unpacked to a nameless temporary file first."""
        if self._columns is None:
            with open(self.path, "rb") if self._member is None else tempfile.TemporaryFile() as file:
                if self._member is not None:
                    with self._open() as packed:
                        shutil.copyfileobj(packed, file, 1 << 20)
                    file.flush()
                # The map stays when the file is closed.
                self._columns = np.memmap(file, self.dtype, "r", offset=self._start, shape=self.shape, order="F")
        return self._columns


class Npz(Mapping[str, DiskArray]):
    """The arrays of an npz file by name (without `.npy`). Each is opened, and checked, when it is asked for.

    Files carry prompts, names and settings beside the images: members that are not read may be anything.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._opened: dict[str, DiskArray] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        except Exception as error:  # zipfile raises several kinds of error for damage
            raise ValueError(f"{self.path} cannot be read as npz, it is cut off or damaged: {error}") from error
        self._members = {member.filename.removesuffix(".npy"): member for member in members}
        self._names = [member.filename for member in members]

    def __getitem__(self, name: str) -> DiskArray:
        """ValueError for an array that cannot be read as numbers, KeyError for a name that is not there."""
        member = self._members[name]
        if self._names.count(member.filename) > 1:
            raise ValueError(f"{self.path} holds two arrays called {name!r}")
        if name not in self._opened:
            try:
                self._opened[name] = DiskArray(self.path, member)
            except (
                zipfile.BadZipFile,
                NotImplementedError,
                RuntimeError,
                OSError,
            ) as error:  # when the member is opened
                raise ValueError(f"{name}.npy in {self.path} is damaged: {error}") from error
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        """Whether the zip directory lists the array; it may still be unreadable."""
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
