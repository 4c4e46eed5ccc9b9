"""Saves of a training run: files with the names of 2021, plus one JSON file per save with all that they lack.

A save at step 10000 ("step" = updates completed) is, in this order of writing,

    ema_0.9999_010000.pt   opt010000.pt   model010000.pt   run010000.json

and, with --ema_sigma_rel 0.05, ema_rel0.05_010000.pt, a snapshot of an average for `averaging`,
each written under a temporary name and renamed when complete. The JSON comes last: a save without it was interrupted. It holds
the configuration, the counters, and size and SHA-256 of the other files. The `.pt` files are what 2021 code writes and
reads: plain state dicts, float32.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime import storage
from ..runtime.devices import versions
from .files import load_weights
from .writing import begun, map_tensors, on_host, write_tensors

_log = logging.getLogger(__name__)
FORMAT = 1
_NAME = re.compile(r"^(?:(model|opt|run)|ema_([^_/]+)_)(\d+)\.(pt|json)$")


def file_name(role: str, step: int) -> str:
    """The name of one file of a save; `role` is "model", "opt", "run" or "ema_RATE". `parse_name` is the inverse."""
    return f"{role}{'_' * role.startswith('ema_')}{step:06d}.{'json' if role == 'run' else 'pt'}"


def parse_name(path: str) -> tuple[str, int] | None:
    """What a file of a run is: `("model" | "opt" | "run" | "ema_RATE", step)`, or None for any other file name."""
    match = _NAME.match(os.path.basename(path))
    if match is None or (match[1] == "run") != (match[4] == "json"):
        return None
    return match[1] or f"ema_{match[2]}", int(match[3])


def power_name(role: str) -> str:
    """The name "rel0.05" of the average in a file of the role "ema_rel0.05", which `averaging` reads; "" for any other role."""
    name = role.removeprefix("ema_")
    return name if role.startswith("ema_rel") and _is_decay(name.removeprefix("rel")) else ""


@dataclass(frozen=True)
class SavedRun:
    """One save of a run on disk: the paths of its large files, and the content of its JSON file."""

    directory: str
    step: int
    model: str | None
    """Path of the weights: the raw ones, unless a file of EMA weights was given. `ema` maps decays to paths, `optimizer` is a path."""
    ema: dict[str, str] = field(default_factory=dict)
    optimizer: str | None = None
    kind: str | None = None
    config: dict[str, Any] | None = None
    class_names: tuple[str, ...] = ()
    state: dict[str, Any] | None = None
    """Counters, loss scale and the like; None or empty for saves of 2021 and of `load.save`, which have none."""
    started_from: str = ""
    """What --resume_checkpoint was when the run began: empty, none, or another run's file. A record: no later start reads that file."""
    power_ema: dict[str, str] = field(default_factory=dict)
    """Snapshots of averages: names like "rel0.05" to paths."""

    @property
    def is_unet(self) -> bool:
        """Whether the network is this package's U-Net: only its tensor names may have the prefixes of DDP and torch.compile."""
        return not any(name.endswith("architecture") for name in (self.config or {}).get("model", {}))


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_run(
    directory: str,
    *,
    step: int,
    model: Mapping[str, Tensor] | None,
    ema: Mapping[str, Mapping[str, Tensor]] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    kind: str = "diffusion",
    class_names: Sequence[str] = (),
    started_from: str = "",
) -> str:
    """Write one save and return the path of its JSON file. Call it on one process only. Raises OSError if it cannot write.

    Tensors of a GPU are copied to main memory; others are written from where they lie.
    `ema` maps decays and names like "rel0.05", spelled as in the file name, to state dicts. Without `model` no run can continue from it.
    `state` may hold numbers, strings, lists, dicts, tensors and arrays; all are restored exactly.
    """
    storage.makedirs(directory)
    ema_parts = {f"ema_{rate}": weights for rate, weights in (ema or {}).items()}
    others = {"opt": optimizer, "model": model}
    parts = {**ema_parts, **{role: part for role, part in others.items() if part is not None}}
    checksums = {}  # of the files that are complete; the JSON with all of them comes last
    copies = (begun(map_tensors, dict(content), on_host) for content in parts.values())
    coming = next(copies)
    for role in parts:
        content = coming.result()
        coming = next(copies, coming)  # from a GPU, the next file while this one is written
        name = file_name(role, step)
        size, sha256 = write_tensors(storage.join(directory, name), content)
        checksums[name] = {"bytes": size, "sha256": sha256}

    run = {
        "format": FORMAT,
        "kind": kind,
        "step": step,
        "config": dict(config or {}),
        "class_names": list(class_names),
        "started_from": started_from,
        "state": _encode(dict(state or {})),
        "files": checksums,
        "versions": versions(),
    }
    path = storage.join(directory, file_name("run", step))
    storage.write_json_atomic(path, run)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def saves_in(directory: str) -> dict[int, dict[str, str]]:
    """The saves in a folder by step, the oldest first: the path of each file by its role. {} if the folder does not exist."""
    saves: dict[int, dict[str, str]] = {}
    for name in storage.listdir(directory) if storage.isdir(directory) else ():
        # Skip names that `file_name` never gives, such as "model2.pt": a save is looked up by its exact file names.
        if (parsed := parse_name(name)) is not None and file_name(*parsed) == name:
            saves.setdefault(parsed[1], {})[parsed[0]] = storage.join(directory, name)
    return dict(sorted(saves.items()))


def read_run_json(path: str) -> dict[str, Any] | None:
    """The JSON of the save that the file `path` belongs to; None if there is none."""
    parsed = parse_name(path)
    if parsed is None:
        return None
    beside = storage.join(os.path.dirname(path), file_name("run", parsed[1]))
    return _read_json(beside) if storage.exists(beside) else None


def remove_save(path: str) -> None:
    """Delete the JSON file `path` of a save and the files that it lists: first the JSON, so that a half-deleted save never looks whole.

    Snapshots of averages (`power_name`) stay, as later reconstructions need them.
    If the JSON is damaged nothing is deleted, since the files of the save are unknown.
    """
    try:
        names = list(_read_json(path)["files"])
    except ValueError as error:
        _log.warning("not removed: %s", error)
        return
    storage.remove(path)
    for name in names:
        if (parsed := parse_name(name)) is not None and not power_name(parsed[0]):
            storage.remove(storage.join(os.path.dirname(path), name))


def last_before_bad_steps(directory: str, step: int) -> int | None:
    """The step of the newest save up to `step` in a folder that was not made within a run of bad steps; None if there is none.

    Only the JSON files are read; the other files are not checked.
    """
    for earlier, files in reversed(saves_in(directory).items()):
        if earlier <= step and "run" in files:
            with contextlib.suppress(ValueError):
                if not _read_json(files["run"])["state"].get("bad_in_a_row"):
                    return earlier
    return None


def find_latest(directory: str, *, unread: Collection[str] = ()) -> SavedRun | None:
    """The newest complete save in a folder, or None. Damaged and interrupted saves are skipped; the log says why.

    `unread`: how the roles begin ("opt", "ema_rel") of files that the caller will not read; of these only the size is checked, as
    hashing takes seconds.
    Folders written by 2021 code have no JSON; there it is the newest `model*.pt` that can be read.
    """
    saves = saves_in(directory)
    of_2021 = not any("run" in files for files in saves.values())
    for step, files in reversed(saves.items()):
        try:
            if "run" in files:
                return _open_complete(directory, step, unread)
            if "model" in files:
                if not of_2021:
                    raise ValueError(f"it was interrupted (no {file_name('run', step)})")
                load_weights(files["model"])  # without sizes and hashes, reading it is the only check
                return _saved_run(directory, step, files)
        except ValueError as error:  # noqa: PERF203 - a loop over few saves
            _log.warning("passing over the save at step %d in %s: %s", step, directory, error)
    return None


def load_run(resume: str) -> SavedRun | None:
    """The save at `resume`: in a folder the newest complete one (None if it has none), else the one that the file belongs to.

    A file of EMA weights, or one that belongs to no save (a released checkpoint), gives a save of its weights alone, at step 0.
    """
    resume = storage.expand(resume)
    if storage.isdir(resume):
        return find_latest(resume)
    if not storage.exists(resume):
        raise ValueError(
            f"cannot resume from {resume}: it does not exist; give a folder or a file of a save, or 'auto'"
        )
    directory, (role, step) = os.path.dirname(resume) or ".", parse_name(resume) or ("", 0)
    is_ema = role.startswith("ema_")
    files = saves_in(directory).get(step, {}) if role and not is_ema else {}
    if "run" in files:
        return _open_complete(directory, step)
    if "model" in files:
        return _saved_run(directory, step, files)
    if role == "opt":
        raise ValueError(f"cannot resume from {resume}: {file_name('model', step)} is not beside it")
    what = "holds EMA weights: taking them" if is_ema else "belongs to no save: taking its weights"
    _log.info("%s %s, at step 0", resume, what)
    return SavedRun(directory=directory, step=0, model=resume)


def _open_complete(directory: str, step: int, unread: Collection[str] = ()) -> SavedRun:
    """A save with its JSON, every file checked for size and, unless `unread`, SHA-256. ValueError names the first that fails."""
    run = _read_json(storage.join(directory, file_name("run", step)))
    paths = {name: storage.join(directory, name) for name in run["files"]}
    for name, path in paths.items():
        if not storage.exists(path):
            raise ValueError(f"{path} is missing")
        if storage.size(path) != (noted := run["files"][name]["bytes"]):
            raise ValueError(f"{path} has {storage.size(path)} bytes instead of {noted}")
    files = {(parse_name(name) or (name,))[0]: path for name, path in paths.items()}
    hashed = [name for name in paths if not name.startswith(tuple(unread))]
    with ThreadPoolExecutor(4) as threads:  # gigabytes take seconds
        for name, found in zip(hashed, threads.map(storage.sha256_of, [paths[name] for name in hashed])):
            if found != run["files"][name]["sha256"]:
                raise ValueError(f"{paths[name]} is damaged: its SHA-256 is not the one noted when it was written")
    try:
        state = _decode(run["state"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the state in {file_name('run', step)} cannot be read ({error})") from error
    return _saved_run(
        directory,
        run["step"],
        files,
        kind=run["kind"],
        config=run["config"],
        class_names=tuple(run["class_names"]),
        state=state,
        started_from=run.get("started_from", ""),
    )


def _saved_run(directory: str, step: int, files: Mapping[str, str], **about: Any) -> SavedRun:
    """The `SavedRun` of these files, {role: path}; `about`: its other fields, which saves of 2021 lack."""
    decays = {role.removeprefix("ema_"): path for role, path in files.items() if role.startswith("ema_")}
    ema = {decay: path for decay, path in decays.items() if _is_decay(decay)}  # ema_mine_000010.pt is not of training
    power_ema = {name: path for role, path in files.items() if (name := power_name(role))}
    return SavedRun(directory, step, files.get("model"), ema, files.get("opt"), power_ema=power_ema, **about)


def _is_decay(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return 0 <= float(text) < 1
    return False


def _read_json(path: str) -> dict[str, Any]:
    try:
        run = json.loads(storage.read_bytes(path))
        version = run["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: cut short or not the JSON file of a run ({error})") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version of the package reads format {FORMAT}")
    absent = {"kind", "step", "config", "class_names", "state", "files"} - set(run)
    if absent:
        raise ValueError(f"{path} lacks {', '.join(sorted(absent))}")
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and arrays inside JSON. Python prints floats so that they read back exactly.


def _encode(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "__tensor__" if isinstance(value, Tensor) else "__array__"
        dtype = str(value.dtype).removeprefix("torch.")
        return {kind: dtype, "shape": list(value.shape), "data": _encode(value.flatten().tolist())}
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    return value


def _decode(value: Any) -> Any:
    """The inverse of `_encode`."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return torch.tensor(_decode(value["data"]), dtype=getattr(torch, value["__tensor__"])).reshape(value["shape"])
    if "__array__" in value:
        return np.array(_decode(value["data"]), dtype=value["__array__"]).reshape(value["shape"])
    return float(value["__float__"]) if "__float__" in value else {key: _decode(item) for key, item in value.items()}
