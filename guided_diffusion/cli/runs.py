"""What all commands share: the choice of the run folder, the handling of errors, exit codes, the session of processes."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..runtime import launchers, storage

if TYPE_CHECKING:
    from ..runtime.world import World

REQUEUE = 85  # exit code of a command that saved everything and stopped on request: the scheduler may start it again
USER_ERROR = 2
USER_ERRORS = (ValueError, OSError, ImportError, NotImplementedError)
PATIENCE_S = 3600.0  # how long a process waits for the others; a batch of large images can take long


def guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's error becomes one line and exit code 2, with --debug its traceback as well."""
    words = storage.command_words(sys.argv[1:] if argv is None else argv)
    # Let torch's threads sleep while they wait for each other, unless the user has set another policy. By default they spin. That saves
    # microseconds on an idle machine but costs much on a shared one, where a thread that others wait for may not get a core (small
    # networks trained 2 to 30 times slower beside one busy process). The variable is read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    storage.keep_compiled_code()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal's encoding cannot show
    try:
        return command(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except SystemExit as leaving:
        if leaving.code != REQUEUE:  # argparse exits after --help
            raise
        return REQUEUE
    except Exception as error:
        # Subclasses of RuntimeError have a message for users (SaveError ...); a plain RuntimeError may be a bug: show its traceback.
        derived = isinstance(error, RuntimeError) and type(error) is not RuntimeError
        remote = type(error).__module__.split(".")[0] == "blobfile"  # a remote path that cannot be reached
        if not (isinstance(error, USER_ERRORS) or derived or remote):
            raise
        # Every process meets the same mistake in a command line, so only local rank 0 prints it.
        reported = getattr(error, "reported_elsewhere", False)
        if not reported and (isinstance(error, RuntimeError) or not launchers.wait_for_local_main(os.environ)):
            if any(word.startswith("--debug") for word in words):
                traceback.print_exc()
            print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
        return USER_ERROR


def run_folder(out: str, kind: str) -> tuple[str, str]:
    """(folder, how it was chosen): --out, else OPENAI_LOGDIR, else `runs/KIND-DATE` below the working directory."""
    if out:
        return out, "--out"
    if os.environ.get("OPENAI_LOGDIR"):
        return os.path.expanduser(os.environ["OPENAI_LOGDIR"]), "OPENAI_LOGDIR"
    return os.path.join("runs", time.strftime(f"{kind}-%Y%m%d-%H%M%S")), "give --out to choose it"


def script_folder() -> str:
    """The default --out of the scripts, as in 2021: a new folder in the temporary directory, named by the time."""
    if os.environ.get("OPENAI_LOGDIR"):
        return ""
    name = time.strftime("openai-%Y-%m-%d-%H-%M-%S") + f"-{time.time_ns() // 1000 % 1000000:06d}"
    return os.path.join(tempfile.gettempdir(), name)


@contextmanager
def session(
    device: str, *, debug: bool = False, timeout_s: float = PATIENCE_S, tf32: bool = True, deterministic: bool = False
) -> Iterator[World]:
    """`runtime.world.session` for a command: only the main process prints messages, and the arithmetic is the one that flags say.

    With several processes, a user's error ends the job with one line instead of a traceback from each, unless `debug`. A command
    that stopped on request and can continue later ends with exit code 85.
    """
    from ..runtime import watch, world
    from ..runtime.devices import float32_products
    from ..runtime.log import setup_messages, silence_closed_streams
    from ..sampling.queue import Interrupted
    from ..training.incident import TrainingDiverged
    from ..training.saver import SaveError

    setup_messages()
    arithmetic = float32_products(tf32=tf32, deterministic=deterministic)
    with arithmetic, world.session(device, timeout_s=timeout_s) as processes:
        setup_messages(processes)
        try:
            yield processes
        except Interrupted as stopped:
            silence_closed_streams()
            if processes.is_main:
                print(f"stopped on request: {stopped}")
            raise SystemExit(REQUEUE) from None
        except (*USER_ERRORS, SaveError, TrainingDiverged, world.CollectiveError) as error:
            if processes.size == 1 or debug:
                raise
            # Another process may have reported the same error already; then this one ends without a message.
            earlier = watch.post_note(processes.context, f"{processes.context.where()} failed: {error}")
            same = earlier is not None and earlier.endswith(f" failed: {error}")
            mark = "" if str(error).startswith("[") else f"[{processes.context.where()}] "
            code = 1 if isinstance(error, world.CollectiveError) else USER_ERROR
            watch.leave("" if same else f"{mark}error: {error}\n", code, after=processes.context)
