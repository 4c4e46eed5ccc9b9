"""Door: the 2021 logger on the writers of `runtime.log`. The process-wide "current logger" lives here.

Environment, as ever: OPENAI_LOGDIR (folder; else a dated one in the temporary folder), OPENAI_LOG_FORMAT ("stdout,log,csv"; also json and
tensorboard) and OPENAI_LOG_FORMAT_MPI ("log") for ranks above 0, whose files are called `...-rank001`. Existing files are appended to.
"""

from __future__ import annotations

import datetime
import json  # noqa: F401  the names that star imports of this module rely on
import os
import os.path as osp
import shutil  # noqa: F401  as above
import sys
import tempfile
import time
import warnings  # noqa: F401  as above
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from .runtime import launchers as _launchers
from .runtime import log as _room

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50


class KVWriter:
    """Writes rows of numbers."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        raise NotImplementedError


class SeqWriter:
    """Writes words."""

    def writeseq(self, seq: Iterable[str]) -> None:
        raise NotImplementedError


class _Format(KVWriter):
    """A room's writer with the old method names."""

    _writer: _room.Writer

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self._writer.write(dict(sorted(kvs.items())))

    def close(self) -> None:
        self._writer.close()


class HumanOutputFormat(_Format, SeqWriter):
    """A table; `filename_or_file` is a path or an open file."""

    def __init__(self, filename_or_file: Any) -> None:
        if not isinstance(filename_or_file, str) and not hasattr(filename_or_file, "write"):
            raise ValueError(f"expected a file or a path, got {filename_or_file!r}")
        # The screen is whatever `sys.stdout` is at the time of writing.
        self._writer = _room.TextWriter(None if filename_or_file is sys.stdout else filename_or_file)

    def writeseq(self, seq: Iterable[str]) -> None:
        self._writer.note(" ".join(seq))


class JSONOutputFormat(_Format):
    """One JSON object per line."""

    def __init__(self, filename: str) -> None:
        self._writer = _room.JsonWriter(filename)


class CSVOutputFormat(_Format):
    """A csv file whose header grows."""

    def __init__(self, filename: str) -> None:
        self._writer = _room.CsvWriter(filename)


class TensorBoardOutputFormat(_Format):
    """Event files in folder `dir`."""

    def __init__(self, dir: str) -> None:
        self._writer = _room.TensorBoardWriter(dir)


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> KVWriter:
    """The writer called `format` ("stdout", "log", "json", "csv", "tensorboard") in folder `ev_dir`."""
    os.makedirs(ev_dir, exist_ok=True)
    makers: dict[str, Callable[[], KVWriter]] = {
        "stdout": lambda: HumanOutputFormat(sys.stdout),
        "log": lambda: HumanOutputFormat(osp.join(ev_dir, f"log{log_suffix}.txt")),
        "json": lambda: JSONOutputFormat(osp.join(ev_dir, f"progress{log_suffix}.json")),
        "csv": lambda: CSVOutputFormat(osp.join(ev_dir, f"progress{log_suffix}.csv")),
        "tensorboard": lambda: TensorBoardOutputFormat(osp.join(ev_dir, f"tb{log_suffix}")),
    }
    if format not in makers:
        raise ValueError(f"unknown log format {format!r}; choose among {', '.join(makers)}")
    return makers[format]()


def logkv(key: str, val: Any) -> None:
    """Set `key` for the next row."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Add `val` to the mean of `key` for the next row."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """`logkv` each pair."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Write the row, forget and return it."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The values collected so far."""
    return get_current().name2val


def log(*args: Any, level: int = INFO) -> None:
    """Say `args`, if `level` is at least the logger's."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    log(*args, level=WARN)


def error(*args: Any) -> None:
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Say only what is at least this important."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Take means over the ranks of `comm` in `dumpkvs` (anything with `rank` and `gather`)."""
    get_current().set_comm(comm)


def get_dir() -> str | None:
    """The folder of the current logger."""
    return get_current().get_dir()


record_tabular = logkv
dump_tabular = dumpkvs


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the body's seconds to `wait_{scopename}`."""
    start = time.time()
    try:
        yield
    finally:
        get_current().name2val["wait_" + scopename] += time.time() - start


def profile(n: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `profile_kv(n)` around each call."""

    def decorate(func: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(func)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return func(*args, **kwargs)

        return timed

    return decorate


def get_current() -> Logger:
    """The current logger; the default one is configured at first use."""
    if Logger.CURRENT is None:
        _configure_default_logger()
    assert Logger.CURRENT is not None
    return Logger.CURRENT


class Logger:
    """Collects values (`name2val`, `name2cnt`) and hands rows and words to its `output_formats`."""

    DEFAULT: Logger | None = None
    CURRENT: Logger | None = None

    def __init__(self, dir: str | None, output_formats: Sequence[Any], comm: Any = None) -> None:
        self.name2val: defaultdict[str, Any] = defaultdict(float)
        self.name2cnt: defaultdict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key: str, val: Any) -> None:
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        count = self.name2cnt[key]
        self.name2val[key] = (self.name2val[key] * count + val) / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        row = dict(self.name2val)
        if self.comm is not None:
            row = mpi_weighted_mean(self.comm, {name: (val, self.name2cnt.get(name, 1)) for name, val in row.items()})
            if self.comm.rank != 0:
                row["dummy"] = 1  # 2021: "so we don't get a warning about an empty dict"; callers may count on the key
        for output in self.output_formats:
            if isinstance(output, KVWriter):
                output.writekvs(row)
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def log(self, *args: Any, level: int = INFO) -> None:
        if self.level <= level:
            self._do_log(args)

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Any) -> None:
        self.comm = comm

    def get_dir(self) -> str | None:
        return self.dir

    def close(self) -> None:
        for output in self.output_formats:
            output.close()

    def _do_log(self, args: Sequence[Any]) -> None:
        for output in self.output_formats:
            if isinstance(output, SeqWriter):
                output.writeseq([str(arg) for arg in args])


def get_rank_without_mpi_import() -> int:
    """This process's rank by the launcher's environment variables alone."""
    return _launchers.discover(os.environ).rank


def mpi_weighted_mean(comm: Any, local_name2valcount: Mapping[str, tuple[Any, float]]) -> dict[str, float]:
    """Means over the ranks of `{name: (value, count)}`, on rank 0; `{}` elsewhere. Values that are no numbers are left out, and named."""
    gathered = comm.gather(dict(local_name2valcount))
    if comm.rank != 0:
        return {}
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    for part in gathered:
        for name, (val, count) in part.items():
            number = _number(val)
            if number is None:
                print(f"warning: cannot average {name}={val!r}: not a number")
                continue
            sums[name] += number * count
            counts[name] += count
    return {name: sums[name] / counts[name] for name in counts}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None, log_suffix: str = ""
) -> None:
    """Make a new current logger in `dir`; with `comm`, numbers of all ranks are averaged before they are written."""
    if dir is None:
        dir = os.getenv("OPENAI_LOGDIR")
    if dir is None:
        dir = osp.join(tempfile.gettempdir(), datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f"))
    assert isinstance(dir, str)
    dir = os.path.expanduser(dir)
    os.makedirs(dir, exist_ok=True)
    rank = get_rank_without_mpi_import()
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None:
        name, default = ("OPENAI_LOG_FORMAT", "stdout,log,csv") if rank == 0 else ("OPENAI_LOG_FORMAT_MPI", "log")
        format_strs = os.getenv(name, default).split(",")
    outputs = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    Logger.CURRENT = Logger(dir=dir, output_formats=outputs, comm=comm)
    if outputs:
        log(f"Logging to {dir}")


def _configure_default_logger() -> None:
    configure()
    Logger.DEFAULT = Logger.CURRENT


def reset() -> None:
    """Back to the default logger; files of the present one are closed and stay as they are."""
    if Logger.CURRENT is not Logger.DEFAULT:
        if Logger.CURRENT is not None:
            Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT
        log("Reset logger")


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """`configure` for the body only."""
    before = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        assert Logger.CURRENT is not None
        Logger.CURRENT.close()
        Logger.CURRENT = before
