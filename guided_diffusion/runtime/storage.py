"""Local and remote files: local paths by the standard library, `gs://`, `az://` and `https://` (Azure blobs) through blobfile.

blobfile is imported when, and only when, a path is remote; a machine without it works on local files. Paths are plain strings with `/`
between their parts (local ones may be anything `os.fspath` takes).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import IO, Any

_REMOTE_SCHEMES = ("gs://", "az://", "https://")
# Tries of one request, with growing pauses between them: about half a minute.
_RETRIES = 10
# How long a folder's lock is waited for. Loader workers of a killed job keep its lock until they notice, within 5 s.
_LOCK_WAIT_S = 6.0
_CANNOT_LOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# The hidden names that `atomic_write` gives to files as we write them.
_UNFINISHED = re.compile(r"^\..*\.(pt|safetensors|json|png|npz|npy)\.[0-9a-f]{8}\.tmp$")

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Whether `path` is reached through blobfile. ValueError for a scheme that nothing here can reach."""
    text = os.fspath(path)
    if "://" in text and not text.startswith(_REMOTE_SCHEMES) and re.match(r"[a-z][a-z0-9+.-]*://", text):
        raise ValueError(
            f"{text}: only {', '.join(_REMOTE_SCHEMES)} and local paths can be reached; copy the files or mount the bucket"
        )
    return text.startswith(_REMOTE_SCHEMES)


def expand(path: PathLike) -> str:
    """`path` with a leading `~` expanded to the home folder: no shell does it in files of flags, environment variables and notebooks."""
    return os.path.expanduser(os.fspath(path))


def command_words(argv: Sequence[str]) -> list[str]:
    """A command line with each leading `~` expanded (`~/data`, `--data_dir=~/data`), without the `--local_rank` that old launchers add.

    Processes read their rank from the environment, where those launchers put it too.
    """
    words: list[str] = []
    previous = ""
    for word in argv:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        is_local_rank = name.replace("-", "_") == "__local_rank" or (previous == "__local_rank" and word.isdecimal())
        previous = word.replace("-", "_")
        if not is_local_rank:
            words.append(name + equals + (expand(value) if value.startswith("~") else value))
    return words


def _blobfile(path: PathLike) -> Any:
    try:
        import blobfile
    except ImportError as error:
        raise ImportError(f"{os.fspath(path)!r} is a remote path and needs blobfile: pip install blobfile") from error
    # By default blobfile retries for ever: without a network a command would hang instead of failing.
    return _with_retry_limit(blobfile.create_context) if hasattr(blobfile, "create_context") else blobfile


@functools.cache
def _with_retry_limit(create_context: Callable[..., Any]) -> Any:
    """blobfile with a limit on retries; made once, as it holds connections and credentials."""
    return create_context(retry_limit=_RETRIES)


def open_file(path: PathLike, mode: str = "rb") -> IO[Any]:
    """Open `path` like the built-in `open`; text modes are UTF-8. For output that must never be seen half written: `atomic_write`."""
    if is_remote(path):
        return _blobfile(path).BlobFile(os.fspath(path), mode)
    return open(expand(path), mode, encoding=None if "b" in mode else "utf-8")


def exists(path: PathLike) -> bool:
    """Whether there is a file or folder at `path`."""
    return _blobfile(path).exists(os.fspath(path)) if is_remote(path) else os.path.exists(expand(path))


def isdir(path: PathLike) -> bool:
    """Whether `path` is a folder (links are followed)."""
    return _blobfile(path).isdir(os.fspath(path)) if is_remote(path) else os.path.isdir(expand(path))


def size(path: PathLike) -> int:
    """Length of a file in bytes."""
    return int(_blobfile(path).stat(os.fspath(path)).size) if is_remote(path) else os.path.getsize(expand(path))


def join(path: PathLike, *parts: str) -> str:
    """Join path parts; `..` in a remote path is resolved by blobfile."""
    return _blobfile(path).join(os.fspath(path), *parts) if is_remote(path) else os.path.join(expand(path), *parts)


def same_folder(one: PathLike, other: PathLike) -> bool:
    """Whether two spellings name one folder: links, dots and slashes do not matter (of remote ones, slashes at the end)."""
    if is_remote(one) or is_remote(other):
        return str(one).rstrip("/") == str(other).rstrip("/")
    return os.path.realpath(expand(one)) == os.path.realpath(expand(other))


def listdir(path: PathLike) -> list[str]:
    """Names in a folder, sorted, folders without a trailing slash."""
    names = _blobfile(path).listdir(os.fspath(path)) if is_remote(path) else os.listdir(expand(path))
    return sorted(name.rstrip("/") for name in names)


def walk_files(path: PathLike) -> Iterator[str]:
    """Every file below a folder, as `join(path, relative)`, in the order of a walk that sorts the names of each folder.

    A folder stands where its name sorts among the names beside it, so the order is that of the lists of path parts. Links to folders
    are followed; one that leads back to a folder above itself, or above the root, is not.
    """
    if is_remote(path):
        root = os.fspath(path).rstrip("/")
        files = [f"{folder.rstrip('/')}/{name}" for folder, _, names in _blobfile(path).walk(root) for name in names]
        yield from sorted(files, key=lambda name: name.split("/"))
    else:
        yield from _walk_local(expand(path), ())


def _walk_local(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above or (above and f"{above[-1]}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}")):
        return
    with os.scandir(folder) as entries:
        # os.path.isdir answers for a link to itself too, where is_dir() raises.
        listed = sorted((e.name, os.path.isdir(e.path) if e.is_symlink() else e.is_dir()) for e in entries)
    for name, is_folder in listed:
        full = os.path.join(folder, name)
        if is_folder:
            yield from _walk_local(full, (*above, real))
        else:
            yield full


def makedirs(path: PathLike) -> None:
    """Make a folder and those above it; no error where it exists."""
    if is_remote(path):
        _blobfile(path).makedirs(os.fspath(path))
        return
    try:
        os.makedirs(expand(path), exist_ok=True)
    except OSError as error:
        raise _explained(error, path, "make the folder") from error


def remove(path: PathLike) -> None:
    """Remove one file; no error where there is none."""
    with contextlib.suppress(FileNotFoundError):
        _blobfile(path).remove(os.fspath(path)) if is_remote(path) else os.remove(expand(path))


def move(source: PathLike, target: PathLike) -> None:
    """Give a file another name in the same file system or bucket."""
    if is_remote(source):
        _blobfile(source).copy(os.fspath(source), os.fspath(target), overwrite=True)
        remove(source)
    else:
        os.replace(expand(source), expand(target))


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` complete or not at all.

    The bytes go to a hidden file in the same folder (`.name.<random>.tmp`), reach the disk (fsync), and take the name in one rename; a
    reader, or a power cut, sees the old file or the new one. An error inside the `with` removes the hidden file and leaves the old
    one. `OSError` for a full disk or a forbidden folder keeps its errno and class and names the path. Remote files are written locally
    and uploaded once complete.
    """
    if is_remote(path):
        blobfile = _blobfile(path)
        # Closing a remote file publishes whatever was written so far, even after an error; hence the detour over a local file.
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "upload")
            with open(local, "xb") as file:
                yield file
            blobfile.copy(local, os.fspath(path), overwrite=True)
        return
    # Through a link to the file it stands for: a rename would replace the link itself.
    target = os.path.realpath(expand(path))
    folder, name = os.path.split(target)
    # 255 bytes is the longest name common file systems take.
    temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        if not os.path.isdir(folder):
            makedirs(folder)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        # Errors of a connection, or that name another file, belong to the caller's code.
        network = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, OSError) and not network and error.filename in (None, temporary, folder):
            raise _explained(error, path, "write") from error
        raise


def remove_unfinished(folder: PathLike, names: Collection[str] | None = None) -> int:
    """Delete the temporary files that killed writers of `names` (None: of any file) left in a local folder; returns how many.

    Call it only while no other process writes these files.
    """
    if is_remote(folder) or not os.path.isdir(folder):
        return 0
    unfinished = [name for name in os.listdir(folder) if _UNFINISHED.match(name)]
    stale = [name for name in unfinished if names is None or name[1:].rsplit(".", 2)[0] in names]
    for name in stale:
        remove(join(folder, name))
    return len(stale)


def _sync_folder(folder: str) -> None:
    """Make a rename durable. Windows and some network file systems cannot sync a folder; the rename is atomic there all the same."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explained(error: OSError, path: PathLike, action: str) -> OSError:
    """The same error, of the same class, saying what was tried, where, and what would help."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # Windows has no EDQUOT
        reason += (
            f" ({_free_space(path)}); free some space or choose another folder; nothing half written was left behind"
        )
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason += "; choose a folder you may write to"
    message = f"cannot {action}: {reason}"
    return OSError(error.errno, message, os.fspath(path)) if error.errno else OSError(f"{message}: {os.fspath(path)!r}")


def _free_space(path: PathLike) -> str:
    folder = os.path.abspath(os.path.dirname(os.path.realpath(path)))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free in {folder}"


def read_bytes(path: PathLike) -> bytes:
    """All bytes of a file."""
    with open_file(path, "rb") as file:
        return file.read()


def write_bytes_atomic(path: PathLike, data: bytes) -> None:
    """Replace a file's content in one step; see `atomic_write`."""
    with atomic_write(path) as file:
        file.write(data)


def to_json(values: Any, *, indent: int | None = 1) -> str:
    """`values` as JSON that every reader takes: numbers that are not finite become null, as JSON has no notation for them."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_json_atomic(path: PathLike, values: Any) -> None:
    """Replace a file's content with `values` as JSON in one step; see `to_json` and `atomic_write`."""
    write_bytes_atomic(path, f"{to_json(values)}\n".encode())


def sha256_of(path: PathLike) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open_file(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_folder() -> str:
    """Where downloads are kept: $GUIDED_DIFFUSION_CACHE, else ~/.cache/guided_diffusion."""
    return expand(os.environ.get("GUIDED_DIFFUSION_CACHE") or os.path.join("~", ".cache", "guided_diffusion"))


def keep_compiled_code() -> str:
    """The folder where code of torch.compile outlives the process: $TORCHINDUCTOR_CACHE_DIR, which is set here if it is not.

    Parts of torch set it to a temporary folder when they are loaded.
    """
    return os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", join(cache_folder(), "compiled"))


def download(
    url: str, path: str, *, check: Callable[[str], Any], size: int = 0, progress: bool = True, timeout_s: float = 30.0
) -> None:
    """Download `url` to the local file `path` with a progress bar; the file appears complete and checked, or not at all.

    `size`: the expected number of bytes (0: as the server announces). `check` is called with the name of the complete temporary file
    and raises if its content is wrong. OSError when the connection fails or another number of bytes comes.
    """
    import http.client
    import urllib.request

    from tqdm import tqdm

    makedirs(os.path.dirname(path))
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer, atomic_write(path) as file:
            total = size or int(answer.headers.get("Content-Length") or 0)
            with tqdm(
                total=total or None, unit="B", unit_scale=True, desc=os.path.basename(path), disable=not progress
            ) as bar:
                while (block := answer.read(1 << 20)) and not 0 < total < received:
                    file.write(block)
                    received += len(block)
                    bar.update(len(block))
            if total and received != total:
                raise http.client.HTTPException(f"{received} of {total} bytes came")
            file.flush()
            check(file.name)
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error


def lock_folder(folder: PathLike, name: str = "run.lock") -> Any:
    """Lock `folder` for this job until the returned lock's `release()` or the end of the process; ValueError if another job holds it.

    The operating system holds the lock, on the file `name` in the folder, so a killed job leaves no lock behind, only the file. Returns
    None for remote folders and on file systems without locks: these are not locked.
    """
    if is_remote(folder):
        return None
    import filelock

    makedirs(folder)
    path = join(folder, name)
    lock = filelock.FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=_LOCK_WAIT_S)
    except filelock.Timeout:
        holder = ""  # the file names the holder where it could be written and read
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            held = json.loads(read_bytes(path))
            holder = f": process {held['pid']} on {held['host']} since {held['since']}"
        raise ValueError(
            f"another job writes to {os.fspath(folder)}{holder}; choose another folder, or end that job first"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _CANNOT_LOCK:
            raise
        return None
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # Windows locks the bytes as well
        file.write(to_json({"pid": os.getpid(), "host": platform.node(), "since": since}))
    return lock
