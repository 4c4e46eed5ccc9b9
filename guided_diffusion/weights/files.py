"""Read files of weights without running code from them; an error names the file and what is wrong with it."""

from __future__ import annotations

import argparse
import io
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import storage

_log = logging.getLogger(__name__)

# Every U-Net or classifier of this package has this tensor: what stands before it in a name is the prefix of all its network's tensors.
_ANCHOR = "input_blocks.0.0.weight"
# The prefixes that DDP and torch.compile add to names.
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# Words in prefixes that tell EMA from raw weights. The last one that matches decides: "ema.online_model." holds raw weights.
_AVERAGED = re.compile(r"(?:^|_)ema(?:$|_|\d|model|net)|averag|shadow", re.I)
_RAW = re.compile(r"(?:^|_)(?:online|raw)(?:$|_)", re.I)
_NO_WEIGHTS = re.compile(r"^(?:opt(?:im(?:izers?)?)?(?:$|_)|(?:grad_)?scaler|(?:lr_)?scheduler)", re.I)
# The header of a safetensors file names its tensors; those of this family need some 100 kB.
_LARGEST_HEADER = 100 << 20


def load_weights(path: str) -> dict[str, Tensor]:
    """The tensors of `read_weights`."""
    return read_weights(path)[0]


def read_own_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a file that this package wrote, of any architecture, with its names unchanged. Errors as in `read_weights`."""
    return _checked(path, _named_tensors(path, _read(path)))


def read_weights(path: str, *, which: str = "") -> tuple[dict[str, Tensor], str]:
    """(state dict in a local or remote `.pt` or `.safetensors` file; "ema" or "model" if it holds both and one was chosen, else "").

    Local files are memory-mapped: reading costs no second copy in memory. The state dict may be nested
    (`{"state_dict": ...}`, a trainer's file with optimizer and counters) or have prefixed names ("module.", "_orig_mod.",
    "model."): it is found, and the log says which prefix was removed. Of EMA and raw weights in one file the EMA is taken
    unless `which` ("ema" or "model") says otherwise. Raises ValueError that names the file if it is missing, damaged, of
    another kind, or would run code.
    """
    content = _read(path)
    flat = dict(_flattened(content))
    prefixes = [name.removesuffix(_ANCHOR) for name in flat if f".{name}".endswith(f".{_ANCHOR}")]
    if not prefixes:
        return _checked(path, _any_network(path, content)), ""
    unread_ema = {name.split(".")[0] for name in flat if _AVERAGED.search(name.split(".")[0])}
    unread_ema -= {prefix.split(".")[0] for prefix in prefixes}
    if unread_ema:
        _log.info("%s: %s cannot be read as a network's EMA weights", path, ", ".join(sorted(unread_ema)))
    prefix, taken = _choose(path, prefixes, which)
    # Without the tensors of other networks nested below this prefix.
    deeper = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    names = [name for name in flat if name.startswith(prefix) and not name.startswith(deeper)]
    return _checked(path, {name.removeprefix(prefix): flat[name] for name in names}), taken


def _require_file(path: str) -> None:
    if not storage.exists(path):
        raise ValueError(f"{path} does not exist; give the path of a saved .pt or .safetensors file")
    if storage.isdir(path):
        raise ValueError(f"{path} is a folder; give the path of one file in it")


def _read(path: str) -> Any:
    return _load_safetensors(path) if path.endswith(".safetensors") else load_object(path)


def _checked(path: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`; ValueError if a tensor claims more numbers than its storage in the file holds (a crafted or damaged file)."""
    for name, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path} says that {name} has {value.numel():,} numbers, but holds fewer; it was not made by saving a network"
            )
    return state


def _flattened(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in nested containers, except in optimizers, schedulers and scalers; keys are joined by dots."""
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, (Mapping, list, tuple)):
        for name, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            if isinstance(value, Tensor) or not _NO_WEIGHTS.match(str(name)):
                yield from _flattened(value, f"{prefix}{name}.")


def _role(prefix: str) -> str:
    """ "ema" or "model", by the last part of the prefix that tells them apart; "model" if none does."""
    for word in reversed(prefix.split(".")):
        if _AVERAGED.search(word):
            return "ema"
        if _RAW.search(word):
            return "model"
    return "model"


def _choose(path: str, prefixes: Sequence[str], which: str) -> tuple[str, str]:
    """(prefix of the wanted network; its role if the file holds EMA and raw weights, else "")."""
    by_role: dict[str, list[str]] = {}
    for prefix in sorted(prefixes, key=lambda prefix: prefix.count(".")):
        by_role.setdefault(_role(prefix), []).append(prefix)
    names = {role: f"({', '.join(repr(p.removesuffix('.')) for p in held)})" for role, held in by_role.items()}
    role = which or ("ema" if "ema" in by_role else "model")
    other = "model" if role == "ema" else "ema"
    if role not in by_role:
        if by_role == {"model": [""]}:  # a plain state dict does not say which weights it holds
            _log.info("%s holds one set of weights, so there is nothing to choose for --weights %s", path, which)
            return "", ""
        raise ValueError(f"--weights is {which!r}, but {path} holds {_KINDS[other]} only {names[other]}")
    prefix = by_role[role][0]
    nearest = [repr(p.removesuffix(".")) for p in by_role[role] if p.count(".") == prefix.count(".")]
    if len(nearest) > 1:
        raise ValueError(
            f"{path} holds several networks, {', '.join(nearest)}; save the one you mean in a file of its own"
        )
    if len(by_role) > 1:
        rest = "" if which else f"; --weights {other} takes the others"
        held = f"{_KINDS[role]} {names[role]} and {_KINDS[other]} {names[other]}"
        _log.info("%s holds %s: taking the %s%s", path, held, _KINDS[role], rest)
        return prefix, role
    if role == "ema":
        _log.info("%s holds EMA weights only %s", path, names[role])
    elif prefix:
        _log.info("%s: the network's tensors are those below %r, which is left out of their names", path, prefix)
    return prefix, ""


_KINDS = {"ema": "EMA weights", "model": "raw weights"}


def _any_network(path: str, content: Any) -> dict[str, Tensor]:
    """The state dict of a network without the tensor _ANCHOR, at the top of the file or under a usual key, without wrapper prefixes."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return {WRAPPERS.sub("", str(name)): value for name, value in _named_tensors(path, content).items()}


def _named_tensors(path: str, content: Any) -> dict[str, Tensor]:
    """`content` as a state dict; ValueError for anything else."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        kind = f"a {type(content).__name__}"
        held = f"a mapping with keys {list(content)[:4]}" if isinstance(content, Mapping) else kind
        raise ValueError(
            f"{path} holds {held}, not weights by name; save the state dict itself (an optimizer's file, opt*.pt, has none)"
        )
    return dict(content)


def load_object(path: str) -> Any:
    """Whatever `torch.save` put into a file, as long as it is tensors and plain containers. Errors as in `load_weights`."""
    _require_file(path)
    remote = storage.read_bytes(path) if storage.is_remote(path) else None

    def source() -> Any:
        return path if remote is None else io.BytesIO(remote)

    zipped = zipfile.is_zipfile(source())
    if zipped:
        _refuse_bomb(path, source())
    try:
        # Training scripts often store their flags, an argparse.Namespace, beside the weights; it runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files of torch < 1.6 are not zip archives and cannot be mapped into memory.
            mapped = True if zipped and remote is None else None
            return torch.load(source(), map_location="cpu", weights_only=True, mmap=mapped)
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
    """ValueError for an archive whose members are compressed or larger than the file (a zip bomb): torch.save never writes these."""
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        return  # torch.load will report what is wrong with it
    size = storage.size(path)
    claimed = sum(member.file_size for member in members)
    if claimed > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(
            f"{path} is a compressed archive ({size:,} bytes that unpack to {claimed:,}), which torch.save never writes; "
            "it was not opened"
        )


def read_metadata(path: str) -> dict[str, str]:
    """The texts that a `.safetensors` file carries beside its tensors, by name. Reads only the header.

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
        texts = json.loads(text).get("__metadata__") or {}
        if not all(isinstance(value, str) for value in texts.values()):
            raise TypeError("metadata must be text")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: its header is no safetensors header ({_first_line(error)})"
        ) from error
    return dict(texts)


def _load_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file
    except ImportError as error:
        raise ValueError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    _require_file(path)
    try:
        return load(storage.read_bytes(path)) if storage.is_remote(path) else load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: damaged or not a safetensors file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _diagnosis(path: str) -> str:
    """Guess from its first bytes why a file is not one that `torch.save` wrote."""
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


def load_weights_into(
    net: nn.Module, weights: Mapping[str, Tensor], source: str = "the state", *, assign: bool = False
) -> None:
    """Strict `load_state_dict` whose error lists only the first few differences of each kind.

    With `assign` the network takes the tensors themselves, in their dtype and memory: for networks built on the meta device.
    """
    expected = net.state_dict()
    differences = {
        "tensors missing": [name for name in expected if name not in weights],
        "unknown tensors": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in weights and value.shape != weights[name].shape
        ],
    }
    complaints = [
        f"{len(names)} {what} (first: {', '.join(names[:3])})" for what, names in differences.items() if names
    ]
    if complaints:
        raise ValueError(f"{source} is of another network: {'; '.join(complaints)}; build the network with its flags")
    net.load_state_dict(dict(weights), assign=assign)
