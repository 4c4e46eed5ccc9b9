"""Saving (copied at the step, written by a thread while training goes on, errors raised in the loop) and resuming."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..runtime import storage
from ..runtime.world import World
from ..weights import runs as checkpoint
from ..weights.files import load_object, load_weights, load_weights_into, read_own_weights
from ..weights.runs import SavedRun
from ..weights.writing import copied_to_host, map_tensors
from .ema import EMA
from .optimizer import load_state

T = TypeVar("T")
_log = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A save could not be written, and that ends the run; the message names the last good save."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class Checkpoints:
    """The saves of one run in one folder. Make it on every process; only the main one touches files.

    `keep_last`: how many of the newest saves to keep, 0 = all. Saves at multiples of `keep_every` steps and the save
    `last_good` are always kept, and so are snapshots of averages (`weights.power_ema`).
    The state is copied to main memory and written from there by a thread, so one more copy must fit; not so the last state.
    """

    def __init__(
        self,
        directory: str,
        *,
        kind: str = "diffusion",
        config: Mapping[str, Any] | None = None,
        class_names: Sequence[str] = (),
        started_from: str = "",
        keep_last: int = 0,
        keep_every: int = 0,
        world: World | None = None,
    ) -> None:
        if keep_last < 0 or keep_every < 0:
            raise ValueError(f"keep_last {keep_last} and keep_every {keep_every} must not be negative; 0 keeps all")
        self.directory = directory = storage.expand(directory)
        self.last_good: str | None = None
        """Path of the JSON file of the newest whole save that did not follow a bad (non-finite) step; rank 0 only."""
        about = {"kind": kind, "config": dict(config or {}), "class_names": tuple(class_names)}
        self._about: dict[str, Any] = {**about, "started_from": started_from}
        self._keep_last, self._keep_every = keep_last, keep_every
        self.world = World() if world is None else world
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._lock: Any = None
        _on_main(self.world, self._open, "opening the run folder")

    def _open(self) -> None:
        self._lock = storage.lock_folder(self.directory)
        storage.remove_unfinished(self.directory)  # the lock is held, so no other job writes them

    def find(self, resume: str) -> SavedRun | None:
        """`find_save` in this folder, followed by `continue_from`."""
        saved = find_save(self.directory, resume, kind=self._about["kind"], world=self.world)
        self.continue_from(saved)
        return saved

    def continue_from(self, saved: SavedRun | None) -> None:
        """Find the `last_good` save of the resumed run and, in the same folder, what that run started from."""
        if not self.world.is_main or saved is None or saved.state is None:
            return
        same_run = storage.same_folder(saved.directory, self.directory)
        if same_run:
            self._about["started_from"] = saved.started_from
        good = checkpoint.last_before_bad_steps(saved.directory, saved.step)
        if good is not None:
            # One folder may have several spellings; `_remove_old` compares paths that begin with this one.
            folder = self.directory if same_run else saved.directory
            self.last_good = storage.join(folder, checkpoint.file_name("run", good))

    def set_aside(self) -> None:
        """Make room for a run that starts afresh: the saves of an earlier one move into a folder within this one, `before_DATE`."""
        saves = checkpoint.saves_in(self.directory) if self.world.is_main else {}
        if saves:
            aside = storage.join(self.directory, time.strftime("before_%Y%m%d-%H%M%S"))
            storage.makedirs(aside)
            for path in (path for files in saves.values() for path in files.values()):
                storage.move(path, storage.join(aside, os.path.basename(path)))
            _log.info(f"starting afresh: the saves that were in {self.directory} are in {aside} now")

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        ema: Mapping[str, Mapping[str, Tensor]],
        optimizer: Mapping[str, Any] | None,
        state: Mapping[str, Any],
        background: bool = True,
    ) -> None:
        """Copy everything now; a thread writes it. Waits first while the previous save is being written.

        Without `background` nothing is copied beforehand and all is written at the return, if not interrupted: change no
        tensor before `wait` has returned.
        """
        if not self.world.is_main:
            return
        self.wait()
        parts: dict[str, Any] = {"model": model, "ema": ema, "optimizer": optimizer, "state": state}
        if background:
            parts = map_tensors(parts, copied_to_host)
        # Not a daemon: the interpreter waits for the file to be complete before it ends. Nor does Ctrl-C stop it.
        self._thread = threading.Thread(target=self._write, args=(step, parts), name=f"save-{step}")
        self._thread.start()
        if not background:
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def raise_failure(self, last_step: int | None = None) -> bool:
        """Raise `SaveError` if the save at `last_step` failed; the failure of another save is a warning.

        Returns whether a save failed. A collective. With `last_step` it first waits for the save that is being written.
        """
        if last_step is not None:
            self.wait()
        failure, self._failure = self._failure, None  # None on all ranks but 0, which writes
        fatal = failure is not None and failure.step == last_step
        flags = torch.tensor([failure is not None, fatal], dtype=torch.float32, device=self.world.device)
        failed, fatal = (self.world.all_reduce_sum_(flags, name="did a save fail?") > 0).tolist()
        if fatal:
            raise failure or SaveError("the main process could not write a save; its message says why")
        if failure is not None:
            _log.warning(f"{failure}. Training goes on")
        return failed

    def close(self) -> None:
        """Wait for the writing thread and release the folder's lock; a failure not yet raised is a warning."""
        self.wait()
        if self._lock is not None:
            self._lock.release()
        if self._failure is not None:
            _log.warning(str(self._failure))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, step: int, parts: dict[str, Any]) -> None:
        try:
            path = checkpoint.save_run(self.directory, step=step, **parts, **self._about)
            if not parts["state"].get("bad_in_a_row"):
                self.last_good = path
            self._remove_old(step)
        except Exception as error:  # `raise_failure` raises it in the training loop
            good = self.last_good or "none yet"
            self._failure = SaveError(
                f"the save at step {step} could not be written: {error}. The last good save is {good}", step
            )

    def _remove_old(self, newest: int) -> None:
        if not self._keep_last:
            return
        saves = checkpoint.saves_in(self.directory)
        whole = [step for step, files in saves.items() if "run" in files and step <= newest]
        for step in whole[: -self._keep_last]:
            milestone = self._keep_every > 0 and step % self._keep_every == 0
            if not milestone and saves[step]["run"] != self.last_good:
                checkpoint.remove_save(saves[step]["run"])


def find_save(directory: str, resume: str, *, kind: str, world: World) -> SavedRun | None:
    """The save that a run in `directory` resumes from, the same on all ranks; None: start at step 0.

    The newest whole save in `directory` comes first, whatever the run was started from; else the file or folder `resume`,
    if that is a path. `resume` "auto" looks in `directory` only, "" or "none" nowhere. ValueError if `resume` does not
    exist, if the save is of another kind, or if `directory` has saves but no whole one.
    """
    if resume in ("", "none"):
        return None
    return _on_main(world, lambda: _find(directory, resume, kind), "choosing the save to resume from")


def _find(directory: str, resume: str, kind: str) -> SavedRun | None:
    newest = checkpoint.find_latest(directory)
    damaged = [files for files in checkpoint.saves_in(directory).values() if "run" in files]
    if newest is None and damaged:
        raise ValueError(
            f"{directory} holds {len(damaged)} saves and none of them is whole (the reasons are above); repair one, give another "
            "--out, or start afresh with --resume_checkpoint none"
        )
    saved = newest if newest is not None or resume == "auto" else checkpoint.load_run(resume)
    if saved is None and resume != "auto":
        raise ValueError(f"cannot resume from {resume}: there is no whole save in it")
    if saved is not None and saved.kind not in (None, kind):
        source, flag = (directory, "--out") if saved is newest else (resume, "--resume_checkpoint")
        raise ValueError(
            f"cannot resume from {source}: {saved.directory} holds a run of kind {saved.kind!r}, this one is {kind!r}; "
            f"give another {flag}"
        )
    if newest is not None and resume != "auto" and not _is_of(resume, newest):
        _log.info(
            f"{directory} has saves of its own, up to step {newest.step}: going on from there and not from {resume}, as the "
            "run's newest save always comes first. To start from that file again, give another --out"
        )
    return saved


def _is_of(path: str, saved: SavedRun) -> bool:
    """Whether `path` is the folder of `saved`, or one of the files of that save."""
    if (checkpoint.parse_name(path) or ("", None))[1] == saved.step:
        path = os.path.dirname(path) or "."
    return storage.same_folder(path, saved.directory)


def _on_main(world: World, make: Callable[[], T], name: str) -> T:
    """Call `make` on rank 0; all ranks return its result, or raise its ValueError or OSError as a ValueError."""
    made, problem = None, ""
    if world.is_main:
        try:
            made = make()
        except (ValueError, OSError) as error:
            problem = str(error)
    made, problem = world.broadcast_object((made, problem), name=name)
    if problem:
        raise ValueError(problem)
    return made  # type: ignore[return-value]


def load_tensors(
    saved: SavedRun, net: nn.Module, ema: EMA, optimizer: Optimizer, params: Sequence[nn.Parameter], *, world: World
) -> list[str]:
    """Fill `net`, `ema` and `optimizer` from `saved`; returns log lines. An EMA not saved starts from the weights.

    Every process of `world` reads the files itself, and all fail together if one cannot.
    """
    problem: ValueError | OSError | None = None
    lines: list[str] = []
    try:
        lines = _load(saved, net, ema, optimizer, params)
    except (ValueError, OSError) as error:
        problem = error
    if world.any_true(problem is not None, name="could all processes read the save?"):
        raise problem or ValueError(
            f"another process cannot read {saved.directory}; put it on storage that all machines see, or see its message"
        )
    return lines


def _load(saved: SavedRun, net: nn.Module, ema: EMA, optimizer: Optimizer, params: Sequence[nn.Parameter]) -> list[str]:
    if saved.model is None:
        raise ValueError(f"the save at step {saved.step} in {saved.directory} has no file of weights")
    read = load_weights if saved.is_unet else read_own_weights
    load_weights_into(net, read(saved.model), saved.model)
    lines = [f"resuming from {saved.directory} at step {saved.step}", f"weights: {saved.model}"]
    ema.reset()
    averages = {**saved.ema, **saved.power_ema}
    for name in ema.names:
        if name in averages:
            ema.load_state_dict_of(name, read(averages[name]))
        lines.append(f"EMA {name}: {averages.get(name, 'not saved, starts from the weights')}")
    lines += [f"EMA {name}: saved, but not kept by this run" for name in averages if name not in ema.names]
    if saved.optimizer is not None:
        load_state(optimizer, load_object(saved.optimizer), params)
    return [*lines, f"optimizer: {saved.optimizer or 'not saved, starts afresh'}"]
