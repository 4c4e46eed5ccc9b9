"""Reading files of tensors: never running code from them, and saying plainly what is wrong with a file that cannot be read."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..runtime import storage

_WRAPPER_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model")
# The header of a safetensors file names its tensors; those of this family need some 100 kB.
_LARGEST_HEADER = 100 << 20


def load_weights(path: str, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The state dict in a `.pt` or `.safetensors` file, local or remote, by tensor name and in file order.

    Local files are memory-mapped: reading costs no second copy in memory. Name prefixes left by DistributedDataParallel
    ("module.") and torch.compile ("_orig_mod.") are removed, and one wrapping level such as `{"state_dict": ...}` is
    opened. Raises ValueError that names the file if it is missing, damaged, of another kind, or would run code.
    """
    if path.endswith(".safetensors"):
        found: Any = _load_safetensors(path)
    else:
        found = load_object(path, device=device)
    for key in _WRAPPER_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        held = f"a mapping with keys {list(found)[:4]}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise ValueError(f"{path} holds {held}, not weights by name; was this an optimizer file (opt*.pt)?")
    for name, value in found.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path} says that {name} has {value.numel():,} numbers, but holds fewer; it was not made by saving a network"
            )
    return {_WRAPPER_PREFIXES.sub("", str(name)): value.to(device) for name, value in found.items()}


def load_object(path: str, *, device: torch.device | str = "cpu") -> Any:
    """Whatever `torch.save` put into a file, as long as it is tensors and plain containers. Errors as `load_weights`."""
    if not storage.exists(path):
        raise ValueError(f"{path} does not exist; give the path of a saved .pt file")
    if storage.isdir(path):
        raise ValueError(f"{path} is a folder; give the path of one .pt file in it")
    remote = storage.is_remote(path)
    source: Any = io.BytesIO(storage.read_bytes(path)) if remote else path
    zipped = zipfile.is_zipfile(source)
    if remote:
        source.seek(0)
    if zipped:
        _refuse_bomb(path, source)
    try:
        # Files of torch < 1.6 are not zip archives and cannot be mapped into memory.
        return torch.load(source, map_location=device, weights_only=True, mmap=True if zipped and not remote else None)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        if any(word in reason for word in ("lobal", "class", "reduce", "function")):
            raise ValueError(
                f"{path} holds more than tensors and would run code when opened, so it was not opened ({reason}); "
                "only load such a file with torch.load yourself if you trust whoever made it, then save its state_dict()"
            ) from error
        raise ValueError(f"{path} cannot be read: {_diagnosis(path)}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {_diagnosis(path)} ({_first_line(error)})") from error


def _refuse_bomb(path: str, source: Any) -> None:
    """ValueError for an archive that would unpack to more than it is: torch.save compresses nothing and shares no bytes."""
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        return  # torch says what is wrong with it
    finally:
        if not isinstance(source, str):
            source.seek(0)
    size = len(source.getbuffer()) if isinstance(source, io.BytesIO) else storage.size(path)
    claimed = sum(member.file_size for member in members)
    if claimed > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(
            f"{path} is a compressed archive ({size:,} bytes that unpack to {claimed:,}), which torch.save never writes; "
            "it was not opened"
        )


def read_metadata(path: str) -> dict[str, str]:
    """The texts that a `.safetensors` file carries beside its tensors, by name. Reads its header only.

    Raises ValueError that names the file where the header is cut short, larger than the file, or no JSON of that format.
    """
    size = storage.size(path)
    with storage.open_file(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(
                f"{path} cannot be read: its header of {length:,} bytes is larger than the file ({size:,})"
            )
        text = file.read(length)
    try:
        told = json.loads(text).get("__metadata__") or {}
        if not all(isinstance(value, str) for value in told.values()):
            raise TypeError("metadata must be text")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: its header is no safetensors header ({_first_line(error)})"
        ) from error
    return dict(told)


def _load_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file
    except ImportError as error:
        raise ValueError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    if not storage.exists(path):
        raise ValueError(f"{path} does not exist; give the path of a saved .safetensors file")
    try:
        return load(storage.read_bytes(path)) if storage.is_remote(path) else load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: damaged or not a safetensors file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _diagnosis(path: str) -> str:
    """Why a file is not what `torch.save` writes, from its first bytes."""
    with storage.open_file(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "the file is empty"
    if start.startswith(b"PK"):
        return "the file is cut short or damaged; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the file itself; run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not weights; the download went to an error page"
    if start.startswith(b"\x80"):
        return "it is a Python pickle that torch.save did not write, or a damaged file; pickles can run code and are not opened"
    return "it is not a file of weights written by torch.save, or it is damaged"
