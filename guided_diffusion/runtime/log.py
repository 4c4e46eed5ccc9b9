"""Where numbers and words go: a table on the screen, progress.csv, progress.json (one object per line), TensorBoard.

Values may be tensors on any device. They are summed where they live and read once, in `dump`: one wait for the device per interval.
With several ranks, means are taken over all of them; only rank 0 writes.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from . import storage
from .world import World

FIRST_COLUMNS = ("step", "samples")


def silence_closed_streams() -> None:
    """Send output to the null device where its reader is gone (a pipe without a reader, a closed terminal), so that writing is no error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # no file, or no poll (Windows)
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if poll.poll(0):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


class _Messages(logging.Handler):
    """Prints messages as they are, warnings with that word before them; through a `Log` that is open, so that its files hold them too."""

    def __init__(self, log: Log | None) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        text = ("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()
        if self._log is not None and self._log.is_open:
            self._log.info(text)
        else:  # a reader that has left is an error here, as it is for print
            print(text, flush=True)


def setup_messages(world: World | None = None, log: Log | None = None) -> None:
    """Show the package's messages (its loggers from level INFO on) on standard output, on the main process only.

    Commands call it; programs that use the package as a library configure `logging` as they like. A later call replaces what an
    earlier one set up: the commands make one before the processes meet, one when the world is known and one with the run's `log`.
    """
    package = logging.getLogger(__name__.rpartition(".runtime.")[0])
    for handler in [handler for handler in package.handlers if isinstance(handler, (_Messages, logging.NullHandler))]:
        package.removeHandler(handler)
    is_main = world is None or world.is_main
    package.addHandler(_Messages(log) if is_main else logging.NullHandler())
    package.setLevel(logging.INFO)
    package.propagate = is_main


class Writer(Protocol):
    """A place for numbers (`write`) and words (`note`); either may ignore what it cannot hold."""

    def write(self, values: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class TextWriter:
    """A table for people, on a stream or appended to a file. Without a target: whatever `sys.stdout` is at the time."""

    def __init__(self, target: str | os.PathLike[str] | TextIO | None = None) -> None:
        self._own = isinstance(target, (str, os.PathLike))
        self._file: TextIO | None = open(target, "a") if isinstance(target, (str, os.PathLike)) else target  # noqa: SIM115

    def write(self, values: Mapping[str, Any]) -> None:
        if values:
            self.note(table(values))

    def note(self, text: str) -> None:
        file = sys.stdout if self._file is None else self._file
        file.write(text + "\n")
        file.flush()

    def close(self) -> None:
        if self._own and self._file is not None:
            self._file.close()


class JsonWriter:
    """One JSON object per line, appended."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _end_last_line(Path(path))
        self._file = open(path, "a")  # noqa: SIM115

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(storage.to_json({name: _plain(value) for name, value in values.items()}, indent=None) + "\n")
        self._file.flush()

    def note(self, text: str) -> None:
        """Words have no line here."""

    def close(self) -> None:
        self._file.close()


class CsvWriter:
    """One row per `write`, appended. A new name becomes a new last column: the header is rewritten, old rows stay empty there."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        _end_last_line(self._path)
        self.columns: list[str] = []
        if self._path.exists():
            with open(self._path, newline="") as file:
                self.columns = next(csv.reader(file), [])
        self._file = open(self._path, "a", newline="")  # noqa: SIM115

    def write(self, values: Mapping[str, Any]) -> None:
        new = [name for name in values if name not in self.columns]
        if new:
            self._grow(new)
        csv.writer(self._file, lineterminator="\n").writerow([_plain(values.get(name, "")) for name in self.columns])
        self._file.flush()

    def note(self, text: str) -> None:
        """Words have no row here."""

    def close(self) -> None:
        self._file.close()

    def _grow(self, new: Sequence[str]) -> None:
        rows = []
        if self._path.exists():  # else somebody removed it: begin again
            with open(self._path, newline="") as file:
                rows = list(csv.reader(file))[1:]
        columns = [*self.columns, *new]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(row + [""] * (len(columns) - len(row)) for row in rows)
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(text.getvalue(), newline="")
        os.replace(temporary, self._path)  # a crash leaves the old file or the new one
        self._file.close()
        self.columns = columns
        self._file = open(self._path, "a", newline="")  # noqa: SIM115


class TensorBoardWriter:
    """Scalars for TensorBoard, at the row's "step" (or the row's number where it has none)."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "the log format 'tensorboard' needs the package tensorboard: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder))
        self._rows = 0

    def write(self, values: Mapping[str, Any]) -> None:
        self._rows += 1
        step = int(values.get("step", self._rows))
        for name, value in values.items():
            with suppress(TypeError, ValueError):  # words have no curve
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def note(self, text: str) -> None:
        """Words have no curve."""

    def close(self) -> None:
        self._writer.close()


WRITERS = ("stdout", "log", "csv", "json", "tensorboard")


def make_writer(name: str, directory: str | os.PathLike[str], suffix: str = "") -> Writer:
    """The writer called `name` in `directory`: stdout, log{suffix}.txt, progress{suffix}.csv, progress{suffix}.json or tb{suffix}/."""
    folder = Path(directory)
    if name == "stdout":
        return TextWriter()
    if name == "log":
        return TextWriter(folder / f"log{suffix}.txt")
    if name == "csv":
        return CsvWriter(folder / f"progress{suffix}.csv")
    if name == "json":
        return JsonWriter(folder / f"progress{suffix}.json")
    if name == "tensorboard":
        return TensorBoardWriter(folder / f"tb{suffix}")
    raise ValueError(f"unknown log format {name!r}; choose among {', '.join(WRITERS)}")


class Log:
    """Collects values between two `dump`s and writes them as one row.

    `directory`: a local folder, made if missing; None keeps to the screen. `continuing`: this run resumes one in that folder; otherwise
    earlier rows there are kept and reported. `world`: with several ranks, `dump` is a collective that takes means over all of them.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        *,
        writers: Sequence[str] = ("stdout", "csv", "json"),
        is_main: bool = True,
        world: World | None = None,
        continuing: bool = False,
    ) -> None:
        self.directory = directory
        self._world = world if world is not None else World()
        self._is_main = is_main and self._world.is_main
        self._values: dict[str, Any] = {}
        self._sums: dict[str, list[Any]] = {}  # name -> [sum, count]
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        self._writers: list[Writer] = []
        self._troubled: set[int] = set()
        self.reader_left = False
        """Whether the program that read our words (`| tee`, `| head`) has ended: mostly a sign that the job shall end."""
        if unknown := [name for name in writers if name not in WRITERS]:
            raise ValueError(f"unknown log format {unknown[0]!r}; choose among {', '.join(WRITERS)}")
        if directory is not None and "://" in str(directory):
            raise ValueError(
                f"the log folder {str(directory)!r} must be local: rows are appended; only checkpoints may be remote"
            )
        if not self._is_main:
            return
        if directory is None:
            writers = [name for name in writers if name == "stdout"]
        else:
            Path(directory).mkdir(parents=True, exist_ok=True)
        rows = 0 if directory is None or continuing else _rows(Path(directory) / "progress.csv")
        self._writers = [make_writer(name, directory or ".") for name in writers]
        if rows:
            self.warn(f"{directory} already holds {rows} rows of an earlier run in progress.csv; new rows follow them")

    @property
    def is_open(self) -> bool:
        """Whether this process writes, and `close` was not called."""
        return bool(self._writers)

    def put(self, name: str, value: Any) -> None:
        """Set `name` for the next row: a number, a word or a tensor of one element. With several ranks, rank 0's counts."""
        self._values[name] = value.detach() if isinstance(value, Tensor) else value

    def mean(self, name: str, value: float | Tensor, count: int = 1) -> None:
        """Add to `name`'s mean a value that is itself the mean of `count` items; a tensor of several elements is several items."""
        if isinstance(value, Tensor) and value.numel() != 1:
            self.total(name, value.detach().sum(), value.numel())
        else:
            self.total(name, value * count, count)

    def total(self, name: str, value: float | Tensor, count: int | Tensor) -> None:
        """Add to `name`'s mean the sum of `count` items. `count` may be a tensor, and 0: a name that got no item is not written."""
        entry = self._sums.setdefault(name, [0.0, 0])
        entry[0] = entry[0] + _wide(value)
        entry[1] = entry[1] + _wide(count)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the body's seconds; `dump` writes `share_{name}`, their share of the time since the last `dump`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def dump(self, step: int) -> dict[str, float]:
        """Write one row and forget the values; returns the row's numbers. All ranks call it (a collective), and all get the row."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        for name, seconds in self._seconds.items():
            self.put(f"share_{name}", min(1.0, seconds / elapsed))
        # One order on every rank; the names may differ (a rank may have met no example of a kind).
        names = sorted(
            {name for part in self._world.all_gather_object(sorted(self._sums), "log names") for name in part}
        )
        own = [self._sums.get(name, [0.0, 0]) for name in names]
        flat = _read([part for entry in own for part in entry] + list(self._values.values()))
        pairs = torch.tensor([float(x) for x in flat[: 2 * len(names)]], dtype=torch.float64)
        pairs = self._world.all_reduce_sum_(pairs, "log means")
        sums, counts = pairs.view(-1, 2).unbind(1)
        row = dict(zip(self._values, flat[2 * len(names) :]))
        row = self._world.broadcast_object(row, name="log values")
        row |= {name: s / n for name, s, n in zip(names, sums.tolist(), counts.tolist()) if n}
        row.setdefault("step", step)
        row = {name: row[name] for name in (*FIRST_COLUMNS, *sorted(row)) if name in row}
        for writer in self._writers:
            self._attempt(writer, partial(writer.write, row))
        self._values, self._sums, self._seconds = {}, {}, {}
        self._since = time.perf_counter()
        return {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}

    def info(self, text: str) -> None:
        """Say something, on rank 0."""
        for writer in self._writers:
            self._attempt(writer, partial(writer.note, text))

    def _attempt(self, writer: Writer, action: Callable[[], None]) -> None:
        """A full disk, or a folder that is gone, costs rows of the log and not the run; it is said once per writer."""
        try:
            action()
        except OSError as error:
            self.reader_left |= isinstance(error, BrokenPipeError)
            silence_closed_streams()
            if id(writer) not in self._troubled:
                self._troubled.add(id(writer))
                print(f"warning: the log cannot be written: {error}. Training goes on", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say something that deserves attention, on rank 0."""
        self.info(f"warning: {text}")

    def close(self) -> None:
        """Close the files; values not dumped are lost."""
        for writer in self._writers:
            self._attempt(writer, writer.close)
        self._writers = []


def table(values: Mapping[str, Any]) -> str:
    """`values` as a two-column table."""
    rows = [(_short(name), _short(_number(value))) for name, value in values.items()]
    left, right = (max((len(row[k]) for row in rows), default=0) for k in (0, 1))
    rule = "-" * (left + right + 7)
    return "\n".join([rule, *(f"| {name.ljust(left)} | {value.ljust(right)} |" for name, value in rows), rule])


def _number(value: Any) -> str:
    value = _plain(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _short(text: str, longest: int = 30) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _plain(value: Any) -> Any:
    """A Python number for whatever has one element (tensors, numpy scalars)."""
    return value.item() if hasattr(value, "item") else value


def _wide(value: Any) -> Any:
    """Sums of thousands of float32 losses lose digits; float64 where the device has it."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().reshape(()).to(torch.float32 if value.device.type == "mps" else torch.float64)


def _read(values: Sequence[Any]) -> list[Any]:
    """`values` with every one-element tensor replaced by its number: one transfer per device."""
    out = list(values)
    places: dict[torch.device, list[int]] = {}
    for k, value in enumerate(out):
        if isinstance(value, Tensor):
            places.setdefault(value.device, []).append(k)
    for indices in places.values():
        for k, number in zip(indices, torch.stack([_wide(out[k]) for k in indices]).tolist()):
            out[k] = number
    return out


def _end_last_line(path: Path) -> None:
    """Complete the half line that a killed run may have left, so that ours starts on its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _rows(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, newline="") as file:
        return max(0, sum(1 for _ in csv.reader(file)) - 1)
