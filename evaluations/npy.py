"""Arrays in npy files and npz members, read in slices: a 10 GB sample file never lies in memory.

Files are untrusted: headers are small literals that are parsed, never executed; pickled objects are refused; declared
sizes must agree with what is there before anything is read; only as many bytes are unpacked as the header announces.
"""

from __future__ import annotations

import ast
import math
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple

import numpy as np

MAX_HEADER_BYTES = 10_000
MAX_DIMENSIONS = 6
MAX_ITEM_BYTES = 1 << 28
# deflate cannot do better than 1032:1; a member that claims more lies about its size
MAX_DEFLATE_RATIO = 1032


class NpyHeader(NamedTuple):
    """What the head of an npy stream says."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    header_bytes: int

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def item_bytes(self) -> int:
        """Bytes of one entry along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(file: IO[bytes], name: str) -> NpyHeader:
    """Parse the head of an npy stream (format 1.0, 2.0 or 3.0); ValueError with `name` for anything else."""
    start = _exactly(file, 8, name)
    if start[:6] != b"\x93NUMPY":
        raise ValueError(f"{name} is not an npy array (it starts with {start[:6]!r})")
    version = (start[6], start[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{name} has npy format {version[0]}.{version[1]}; 1.0, 2.0 and 3.0 can be read")
    kind = "<H" if version == (1, 0) else "<I"
    (length,) = struct.unpack(kind, _exactly(file, struct.calcsize(kind), name))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{name} has a header of {length} bytes (at most {MAX_HEADER_BYTES})")
    text = _exactly(file, length, name)
    try:
        head = ast.literal_eval(text.decode("utf-8" if version == (3, 0) else "latin1").strip())
        descr, fortran, shape = head["descr"], head["fortran_order"], head["shape"]
        if len(head) != 3 or not isinstance(descr, str) or not isinstance(fortran, bool):
            raise ValueError("fields of unexpected kind")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape {shape!r}")
        dtype = np.dtype(descr)
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} has a damaged header: {error}") from error
    if dtype.hasobject:
        raise ValueError(
            f"{name} holds pickled Python objects, which can run code when read; save a plain array instead"
        )
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise ValueError(f"{name} holds {dtype}, expected numbers (uint8 for images)")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} axes (at most {MAX_DIMENSIONS})")
    header = NpyHeader(dtype, shape, fortran, 8 + struct.calcsize(kind) + length)
    if header.data_bytes > 1 << 62 or header.item_bytes > MAX_ITEM_BYTES:
        raise ValueError(f"{name} claims shape {shape}: one entry may have at most {MAX_ITEM_BYTES} bytes")
    return header


def _exactly(file: IO[bytes], count: int, name: str) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"{name} is cut off: {count} bytes wanted, {len(data)} left")
    return data


class DiskArray:
    """An array in a file, read along its first axis with `read(start, stop)`.

    Stored data is read where it lies. Compressed data is unpacked on the way: going on from the last place is cheap,
    going back starts anew. The checksum of a zip member is compared whenever it has been read from start to end.
    """

    def __init__(self, path: str | os.PathLike[str], member: zipfile.ZipInfo | None = None) -> None:
        self.path = os.fspath(path)
        self.member = member
        self.name = self.path if member is None else f"{member.filename} in {self.path}"
        self._file: IO[bytes] | None = None
        self._at = 0  # bytes of data already passed in self._file
        self._crc: int | None = 0  # running checksum; None when a gap makes it useless
        self._head = b""
        self.offset = 0
        self.compressed = member is not None and member.compress_type != zipfile.ZIP_STORED
        size = self._declared_size()
        with self._open() as file:
            self.header = read_header(file, self.name)
            if member is not None:
                file.seek(0 if self.compressed else self.offset)
                self._head = file.read(self.header.header_bytes)
        if size != self.header.header_bytes + self.header.data_bytes:
            raise ValueError(
                f"{self.name} is cut off or damaged: shape {self.header.shape} of {self.header.dtype} needs "
                f"{self.header.header_bytes + self.header.data_bytes} bytes, there are {size}"
            )

    def _declared_size(self) -> int:
        file_size = os.path.getsize(self.path)
        if self.member is None:
            return file_size
        info = self.member
        if info.flag_bits & 1:
            raise ValueError(f"{self.name} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{self.name} has compression type {info.compress_type}; save with numpy.savez")
        if info.compress_size > file_size or info.file_size > info.compress_size * MAX_DEFLATE_RATIO + 64:
            sizes = f"{info.file_size} bytes from {info.compress_size} in a file of {file_size}"
            raise ValueError(f"{self.name} claims {sizes}, which is not possible")
        if not self.compressed:
            with open(self.path, "rb") as file:
                file.seek(info.header_offset)
                local = file.read(30)
            if len(local) != 30 or local[:4] != b"PK\x03\x04":
                raise ValueError(f"{self.name} is not where the directory of the file says; the file is damaged")
            self.offset = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
            if self.offset + info.file_size > file_size:
                raise ValueError(f"{self.name} is cut off: it ends behind the end of the file")
        return info.file_size

    def _open(self) -> IO[bytes]:
        if self.compressed:
            assert self.member is not None
            return zipfile.ZipFile(self.path).open(self.member)
        file = open(self.path, "rb")  # noqa: SIM115 - the caller closes it
        file.seek(self.offset)
        return file

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of the first axis, in native byte order; ValueError when the data ends early."""
        header = self.header
        stop = min(stop, header.shape[0])
        if header.fortran and len(header.shape) > 1:
            return self._fortran()[start:stop].astype(header.dtype.newbyteorder("="))
        try:
            data = self._bytes(start * header.item_bytes, (stop - start) * header.item_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"{self.name} is damaged: {error}") from error
        array = np.frombuffer(data, header.dtype).reshape(stop - start, *header.shape[1:])
        return array.astype(header.dtype.newbyteorder("="), copy=False)

    def _bytes(self, first: int, count: int) -> bytearray:
        if self._file is None or first < self._at:
            self.close()
            self._file = self._open()
            self._file.read(self.header.header_bytes)
            self._at, self._crc = 0, zlib.crc32(self._head)
        if first > self._at:
            if self.compressed:
                while self._at < first:
                    passed = len(self._file.read(min(1 << 20, first - self._at)))
                    if not passed:
                        raise EOFError("compressed data ends early")
                    self._at += passed
            else:
                self._file.seek(self.offset + self.header.header_bytes + first)
            self._at, self._crc = first, None
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            got = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise EOFError(f"{count - done} bytes are missing")
            done += got
        self._at += count
        if self.member is not None and not self.compressed and self._crc is not None:
            self._crc = zlib.crc32(data, self._crc)
            if self._at == self.header.data_bytes and self._crc != self.member.CRC:
                raise ValueError(f"{self.name} is damaged: its checksum does not agree with its content")
        return data

    def _fortran(self) -> np.ndarray:
        """Map an array in column order; a compressed one is unpacked to a nameless temporary file first."""
        header = self.header
        if not self.compressed:
            if self.member is not None and self._crc == 0:
                self._crc = self._stored_checksum()  # once: later slices jump about
                if self._crc != self.member.CRC:
                    raise ValueError(f"{self.name} is damaged: its checksum does not agree with its content")
            place = self.offset + header.header_bytes
            return np.memmap(self.path, header.dtype, "r", offset=place, shape=header.shape, order="F")
        if self._file is None:
            unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - kept open as long as the array is read
            with self._open() as packed:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            unpacked.flush()
            self._file = unpacked
        return np.memmap(self._file, header.dtype, "r", offset=header.header_bytes, shape=header.shape, order="F")

    def _stored_checksum(self) -> int:
        assert self.member is not None
        left, checksum = self.member.file_size, 0
        with self._open() as file:
            while left and (block := file.read(min(1 << 20, left))):
                checksum, left = zlib.crc32(block, checksum), left - len(block)
        return checksum

    def close(self) -> None:
        """Close the file; reading again opens it anew."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Npz(Mapping[str, DiskArray]):
    """The arrays of an npz file by name (without `.npy`). Each is opened, and judged, when it is asked for.

    Files carry prompts, names and settings beside the images: what nobody asks for may be anything.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._members: dict[str, list[zipfile.ZipInfo]] = {}
        self._opened: dict[str, DiskArray] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if member.filename.endswith(".npy"):
                        self._members.setdefault(member.filename.removesuffix(".npy"), []).append(member)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise ValueError(f"{self.path} cannot be read as npz, it is cut off or damaged: {error}") from error

    def __getitem__(self, name: str) -> DiskArray:
        """ValueError for an array that cannot be read as numbers, KeyError for a name that is not there."""
        members = self._members[name]
        if len(members) > 1:
            raise ValueError(f"{self.path} holds two arrays called {name!r}")
        if name not in self._opened:
            try:
                self._opened[name] = DiskArray(self.path, members[0])
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
                raise ValueError(f"{name}.npy in {self.path} is damaged: {error}") from error
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        """By the directory alone: the array itself may still turn out to be unreadable."""
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def close(self) -> None:
        """Close what was opened."""
        for array in self._opened.values():
            array.close()
