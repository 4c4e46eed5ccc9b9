"""Where rows of numbers and messages go: a table on the screen, progress.csv, progress.json (one object per line), TensorBoard.

With several ranks only rank 0 writes.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from . import storage
from .world import World

FIRST_COLUMNS = ("step", "samples")


def silence_closed_streams() -> None:
    """Redirect stdout and stderr to the null device if their reader has gone (closed pipe or terminal), so that writing raises nothing."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # no file, or no poll (Windows)
            poll = select.poll()
            poll.register(stream.fileno(), 0)  # 0: report only errors and hang-ups
            if poll.poll(0):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


class _Messages(logging.Handler):
    """Prints log messages, warnings with the prefix "warning: "; an open `Log` writes them instead, so that its files hold them too."""

    def __init__(self, log: Log | None) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        text = ("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()
        if self._log is not None and self._log.writers:
            self._log.info(text)
        else:  # without a `Log` a closed pipe raises, as print does
            print(text, flush=True)


def setup_messages(world: World | None = None, log: Log | None = None) -> None:
    """Show the package's messages (its loggers from level INFO on) on standard output, on the main process only.

    Commands call it; programs that use the package as a library configure `logging` as they like. A later call replaces what an
    earlier one set up: commands call it before the processes have met, again with the `world`, and again with the run's `log`.
    """
    package = logging.getLogger(__name__.rpartition(".runtime.")[0])
    for handler in [handler for handler in package.handlers if isinstance(handler, (_Messages, logging.NullHandler))]:
        package.removeHandler(handler)
    is_main = world is None or world.is_main
    package.addHandler(_Messages(log) if is_main else logging.NullHandler())
    package.setLevel(logging.INFO)
    package.propagate = is_main


class Writer:
    """One output of a `Log`: `write` takes rows, `note` messages."""

    _file: Any

    def write(self, values: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Write a message; outputs for numbers alone ignore it."""

    def close(self) -> None:
        self._file.close()


class TextWriter(Writer):
    """Rows as tables, on a stream or appended to a file. Without a target: on `sys.stdout` as it is at the time of writing."""

    def __init__(self, target: str | os.PathLike[str] | TextIO | None = None) -> None:
        self._owns_file = isinstance(target, (str, os.PathLike))
        self._file = open(target, "a") if isinstance(target, (str, os.PathLike)) else target  # noqa: SIM115

    def write(self, values: Mapping[str, Any]) -> None:
        if values:
            self.note(table(values))

    def note(self, text: str) -> None:
        file = sys.stdout if self._file is None else self._file
        file.write(text + "\n")
        file.flush()

    def close(self) -> None:
        if self._owns_file:
            super().close()


class JsonWriter(Writer):
    """One JSON object per line, appended."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = _open_for_rows(path)

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(storage.to_json({name: _plain(value) for name, value in values.items()}, indent=None) + "\n")
        self._file.flush()


class CsvWriter(Writer):
    """One row per `write`, appended. A new name becomes a new last column, empty in the rows before: the file is rewritten."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file = _open_for_rows(path)
        self.columns = next(iter(_rows(path)), [])

    def write(self, values: Mapping[str, Any]) -> None:
        if new := [name for name in values if name not in self.columns]:
            self._rewrite([*self.columns, *new])
        csv.writer(self._file, lineterminator="\n").writerow([_plain(values.get(name, "")) for name in self.columns])
        self._file.flush()

    def _rewrite(self, columns: list[str]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(row + [""] * (len(columns) - len(row)) for row in _rows(self._path)[1:])
        temporary = Path(f"{os.fspath(self._path)}.tmp")
        temporary.write_text(text.getvalue(), newline="")
        os.replace(temporary, self._path)  # atomic: a crash leaves the old file or the new one, never half of one
        self._file.close()
        self._file, self.columns = _open_for_rows(self._path), columns


class TensorBoardWriter(Writer):
    """Scalars for TensorBoard, at the row's "step" (or the row's number where it has none)."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "the log format 'tensorboard' needs the package tensorboard: pip install tensorboard"
            ) from error
        self._file = SummaryWriter(str(folder))
        self._rows = 0

    def write(self, values: Mapping[str, Any]) -> None:
        self._rows += 1
        step = int(values.get("step", self._rows))
        for name, value in values.items():
            with suppress(TypeError, ValueError):  # words have no curve
                self._file.add_scalar(name, float(value), step)
        self._file.flush()


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "stdout": lambda folder: TextWriter(),
    "log": lambda folder: TextWriter(folder / "log.txt"),
    "csv": lambda folder: CsvWriter(folder / "progress.csv"),
    "json": lambda folder: JsonWriter(folder / "progress.json"),
    "tensorboard": lambda folder: TensorBoardWriter(folder / "tb"),
}


class Log:
    """Writes a row per `dump`, and messages.

    `directory`: a local folder, made if missing; None writes to stdout only. `continuing`: this run resumes the one in that folder;
    otherwise a message says how many earlier rows there are. `world`: with several ranks, `dump` is a collective if `mean` was called.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        *,
        writers: Sequence[str] = ("stdout", "csv", "json"),
        world: World | None = None,
        continuing: bool = False,
    ) -> None:
        self._world = World() if world is None else world
        self._sums: dict[str, Tensor] = {}  # name -> [sum, count], float64
        self._failing: set[Writer] = set()
        self.writers: list[Writer] = []
        """Empty on all ranks but rank 0, and after `close`."""
        self.reader_left = False
        """Whether the program that reads our output (`| tee`, `| head`) has ended: usually a sign that the job should end."""
        if unknown := [name for name in writers if name not in WRITERS]:
            raise ValueError(f"unknown log format {unknown[0]!r}; choose among {', '.join(WRITERS)}")
        if directory is not None and "://" in str(directory):
            raise ValueError(
                f"the log folder {str(directory)!r} must be local: rows are appended; only checkpoints may be remote"
            )
        if not self._world.is_main:
            return
        folder, earlier = Path(directory or "."), 0
        if directory is None:
            writers = [name for name in writers if name == "stdout"]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = 0 if continuing else len(_rows(folder / "progress.csv")) - 1
        self.writers = [WRITERS[name](folder) for name in writers]
        if earlier > 0:
            self.info(
                f"warning: {directory} already holds {earlier} rows of an earlier run in progress.csv; new rows follow them"
            )

    def mean(self, name: str, values: Tensor, where: Tensor) -> None:
        """Add the `values` where the mask `where` is true to the mean `name` over all ranks, which add the same names in the same order.

        Sums stay on the device of `values` and are read once, in `dump`. A mean of no values is not written.
        """
        # Sums of thousands of float32 losses lose digits; MPS has no float64.
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        added = torch.stack([torch.where(where, values.detach(), 0.0).sum().to(dtype), where.sum().to(dtype)])
        self._sums[name] = self._sums[name] + added if name in self._sums else added

    def dump(self, row: Mapping[str, Any]) -> None:
        """Write one row: the values of `row`, and the means of what `mean` was given since the last row."""
        if self._sums:
            pairs = self._world.all_reduce_sum_(torch.stack(list(self._sums.values())).cpu().double(), "log means")
            row = {**row, **{name: s / n for name, (s, n) in zip(self._sums, pairs.tolist()) if n}}
        row = {name: row[name] for name in (*FIRST_COLUMNS, *sorted(row)) if name in row}
        for writer in self.writers:
            self._attempt(writer, partial(writer.write, row))
        self._sums = {}

    def info(self, text: str) -> None:
        """Write a message, on rank 0."""
        for writer in self.writers:
            self._attempt(writer, partial(writer.note, text))

    def _attempt(self, writer: Writer, action: Callable[[], None]) -> None:
        """Write; an OSError (full disk, deleted folder) loses rows of the log but does not end the run, and is reported once per writer."""
        try:
            action()
        except OSError as error:
            self.reader_left |= isinstance(error, BrokenPipeError)
            silence_closed_streams()
            if writer not in self._failing:
                self._failing.add(writer)
                print(f"warning: the log cannot be written: {error}. Training goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the files; means not dumped are lost."""
        for writer in self.writers:
            self._attempt(writer, writer.close)
        self.writers = []


def table(values: Mapping[str, Any]) -> str:
    """`values` as a two-column table."""
    rows = []
    for name, value in values.items():
        number = _plain(value)
        cells = (name, f"{number:.3g}" if isinstance(number, float) else str(number))
        rows.append([cell if len(cell) <= 30 else cell[:27] + "..." for cell in cells])
    left, right = (max((len(row[k]) for row in rows), default=0) for k in (0, 1))
    rule = "-" * (left + right + 7)
    return "\n".join([rule, *(f"| {name.ljust(left)} | {value.ljust(right)} |" for name, value in rows), rule])


def _plain(value: Any) -> Any:
    """A tensor or numpy scalar as a Python number; any other value as it is."""
    return value.item() if hasattr(value, "item") else value


def _open_for_rows(path: str | os.PathLike[str]) -> TextIO:
    """Open `path` to append rows. If a killed run left an unfinished last line, end it first, so that the next row is a line of its own."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open(path, "a", newline="")


def _rows(path: str | os.PathLike[str]) -> list[list[str]]:
    """The lines of a csv file, its header first; none where it is missing."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.reader(file))
