"""What a training run starts from where that is not a save of its own: the file's configuration, classes and weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..build import build_empty
from ..config import ClassifierConfig, DiffusionConfig, Network, RunConfig, classes_of
from . import identify
from .files import load_weights_into
from .load import read
from .runs import SavedRun, parse_name

_log = logging.getLogger(__name__)
_SIZES = ("image_size", "image_width", "large_size", "small_size")
_CLASSES = ("class_cond", "num_classes")


@dataclass(frozen=True)
class Origin:
    """A start from another run's save or from a file.

    config       of network and process to train: the file's, with what may change
    class_names  of the file; () where it has none
    old          the file's own network, before its classes changed
    tensors      the weights to begin with, at step 0; None where the whole save is continued
    new_classes  whether the classes are those of the data
    as_2021      whether a run of the 2021 code goes on, which names no classes
    """

    path: str
    config: RunConfig
    class_names: tuple[str, ...]
    old: Network
    tensors: dict[str, Tensor] | None
    new_classes: bool
    as_2021: bool


def origin(
    saved: SavedRun,
    kind: str,
    typed: Mapping[str, Any],
    *,
    weights: str = "",
    new_classes: bool = False,
) -> Origin:
    """What starting from `saved` means: a save is continued; of any other file, and of a save where `weights` ("ema" or "model")
    says which or `new_classes` asks for other classes, the weights alone are taken, at step 0.

    The configuration of network and process is the file's, found as `load` finds it. `typed` flags that deny it are a
    ValueError, but for the size of the images, where the network allows another, and for classes, with `new_classes`.
    """
    path, which = _file(saved, weights)
    plain = (parse_name(path) or ("",))[0] != "model"
    asked = _asked(kind, typed)
    fixed = {name: value for name, value in asked.items() if name not in (*_SIZES, *_CLASSES)}
    sizes = {name: value for name, value in asked.items() if name in _SIZES}
    found, tensors = read(path, kind=kind, flags=fixed, weights=which, sizes=sizes)
    assert found.config is not None
    config = _resized(found.config, sizes, path)
    old = config.model
    config = _with_classes(config, asked, path, new_classes)
    whole = not (plain or weights or new_classes)
    as_2021 = whole and not saved.config
    return Origin(path, config, found.class_names, old, None if whole else tensors, new_classes, as_2021)


def _file(saved: SavedRun, weights: str) -> tuple[str, str]:
    """(file of weights, which of those in it) of a save."""
    assert saved.model is not None
    role = parse_name(saved.model)
    if (
        weights != "ema" or role is None or role[0] != "model"
    ):  # a plain file may hold both, one of EMA weights is these
        return saved.model, weights
    if not saved.ema:
        raise ValueError(
            f"--resume_from is 'ema', but the save at step {saved.step} in {saved.directory} has no EMA weights"
        )
    return saved.ema[max(saved.ema, key=float)], ""


def _asked(kind: str, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Of the typed flags those that say what the network or its process is."""
    own = {*RunConfig.sections(kind)["model"].names(), *DiffusionConfig.names()}
    return {name: value for name, value in typed.items() if name in own}


def _resized(config: RunConfig, sizes: Mapping[str, int], path: str) -> RunConfig:
    """The configuration for images of another size: the same levels, with attention at the same ones."""
    model = config.model
    sizes = {name: size for name, size in sizes.items() if name in model.names() and size != getattr(model, name)}
    if not sizes:
        return config
    differs = ", ".join(f"{name} {getattr(model, name)}; you asked for {size}" for name, size in sizes.items())
    prefix = ""
    if isinstance(model, ClassifierConfig):
        prefix = "classifier_"
        if model.classifier_pool == "attention":
            raise ValueError(
                f"{path} is another network than the flags say: the file has {differs}. Its attention pool fits no other size"
            )
    height = sizes.get("large_size", sizes.get("image_size", model.sample_size))
    reached = [2**k for k in range(len(model.multipliers)) if 2**k in model.attention_downsamplings]
    changed: dict[str, Any] = {
        **sizes,
        f"{prefix}channel_mult": ",".join(f"{m:g}" for m in model.multipliers),
        f"{prefix}attention_resolutions": ",".join(str(height // ds) for ds in reached),
    }
    attention = changed[f"{prefix}attention_resolutions"]
    _log.info("%s: the file has %s: the levels stay, with attention at %s", path, differs, attention)
    return replace(config, model=replace(model, **changed).validate())


def _with_classes(config: RunConfig, asked: Mapping[str, Any], path: str, new_classes: bool) -> RunConfig:
    """The configuration with the classes that are asked for; ValueError where they are others than the file's for no reason."""
    wanted = {name: value for name, value in asked.items() if name in _CLASSES}
    if not new_classes:
        remedy = "Leave these flags out, or give --new_classes True: the network gets the classes of the data"
        identify.refuse(path, identify.contradictions(config, wanted), remedy)
        return replace(config, model=replace(config.model, num_classes=classes_of(config.model)))
    changed: dict[str, Any] = {"num_classes": wanted.get("num_classes", 0)}
    if "class_cond" in config.model.names():
        changed["class_cond"] = wanted.get("class_cond", True)
    return replace(config, model=replace(config.model, **changed).validate())


def fill(net: nn.Module, start: Origin, class_names: Sequence[str]) -> None:
    """Give `net`, just built for `start.config`, the weights of the file. Of new classes those that the file has by name keep
    their rows of the label embedding (of a classifier: of its last layer), the others those that `net` has."""
    assert start.tensors is not None
    tensors = dict(start.tensors)
    if start.new_classes:
        known = {name: k for k, name in enumerate(start.class_names)}
        kept = [(k, known[name]) for k, name in enumerate(class_names) if name in known]
        fresh = net.state_dict()
        for name in _of_classes(start.old):
            before = tensors.pop(name, None)
            if name in fresh:
                tensors[name] = fresh[name].clone()
                if before is not None:
                    for row, source in kept:
                        tensors[name][row] = before[source]
        had = classes_of(start.old)
        _log.info(
            "%s has %d classes%s; %d of the %d of this run are among them by name and keep what was learned, the others start anew",
            start.path, had, "" if start.class_names or not had else " without names", len(kept), len(class_names),
        )  # fmt: skip
    load_weights_into(net, tensors, start.path)
    _log.info("starting from the weights of %s, at step 0", start.path)


def _of_classes(model: Network) -> list[str]:
    """The names of the tensors that have a row for each class."""
    more: dict[str, Any] = {"class_cond": True} if "class_cond" in model.names() else {}
    two, three = (build_empty(replace(model, num_classes=count, **more)).state_dict() for count in (2, 3))
    return [name for name, value in two.items() if value.shape != three[name].shape]
