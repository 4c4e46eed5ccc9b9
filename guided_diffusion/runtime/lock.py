"""One job per folder of results: a second one is refused instead of mixing its files with the first one's."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from typing import Any

from . import storage

LOCK_NAME = "run.lock"
_PATIENCE_S = 10.0


class RunLock:
    """Holds the lock file `name` in a folder from construction to `release()`, or to the end of the process, however it ends.

    The lock is the operating system's (flock), so nothing stale can stay behind: a lock file without a living holder is
    simply taken over. Remote folders and file systems without locks are not guarded.
    """

    def __init__(self, directory: str, name: str = LOCK_NAME) -> None:
        self._file: Any = None
        if storage.is_remote(directory):
            return
        try:
            import fcntl
        except ImportError:  # Windows
            return
        storage.makedirs(directory)
        path = os.path.join(directory, name)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held open as long as the lock
        end = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    file.close()
                    return
                holder = _holder(path)
                # Loader workers of a killed job keep its lock until they notice, about a second later.
                if _is_gone(holder) and time.monotonic() < end:
                    time.sleep(0.2)
                    continue
                file.close()
                raise ValueError(
                    f"another job writes to {directory}: process {holder.get('pid', '?')} on {holder.get('host', '?')} "
                    f"since {holder.get('since', '?')}; choose another folder, or end that job first"
                ) from None
        file.seek(0)
        file.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(storage.to_json({"pid": os.getpid(), "host": platform.node(), "since": since}))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let other jobs in; harmless when called twice. The file stays: removing it would open a race."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _holder(path: str) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        found = json.load(file)
        return found if isinstance(found, dict) else {}
    return {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine and does no longer."""
    if holder.get("host") != platform.node() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
