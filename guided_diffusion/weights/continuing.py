"""What a training run starts from (its own save, another run's, or a file of weights) and the configuration that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..build import build_empty
from ..config import UNET, DiffusionConfig, Network, RunConfig, changed, classes_of, flatten, laid_over
from ..runtime import storage
from ..runtime.world import World
from .files import load_weights_into
from .identify import FREE, contradictions, refuse
from .load import agree, read
from .runs import SavedRun, find_latest, parse_name

# Settings that may differ between two starts of one command: the last step, the number of processes, what is compiled.
_NOT_COMPARED = ("resume_checkpoint", "max_steps", "global_batch_size", "compile")
_SIZES = ("image_size", "image_width", "large_size", "small_size")
_CLASSES = ("class_cond", "num_classes")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """A start from another run's save or from a file.

    class_names  of the file; () where it has none
    old          configuration of the file's network, with the image size of this run and the classes of the file
    tensors      the weights to start from, at step 0; None where the whole save is continued
    new_classes  --new_classes: the network gets the classes of the data
    as_2021      whether this continues a run of the 2021 code, whose saves name no classes
    """

    path: str
    class_names: tuple[str, ...]
    old: Network
    tensors: dict[str, Tensor] | None
    new_classes: bool
    as_2021: bool


def started_from(
    saved: SavedRun | None, folder: str, kind: str, flags: Mapping[str, Any], typed: Mapping[str, Any]
) -> tuple[SavedRun | None, Origin | None]:
    """(`saved` with the configuration of this run in `folder`, its `Origin`: None if there is no save, or it is one of this run).

    A save of another run is continued. Only its weights are taken, at step 0, where --resume_from or --weights chooses among them or
    --new_classes is set; so are those of any file but a save's model*.pt. Network and process are configured as by `load`.
    ValueError if `typed` flags contradict the file; image sizes may, if the network allows others, and classes with --new_classes.
    """
    if saved is None or (saved.config and storage.same_folder(saved.directory, folder)):
        return saved, None
    weights, new_classes = flags["resume_from"] or flags["weights"], flags["new_classes"]
    path, which = _weights_file(saved, weights)
    names = {*RunConfig.sections(kind)["model"].names(), *DiffusionConfig.names()}
    sizes = {name: value for name, value in typed.items() if name in names.intersection(_SIZES)}
    classes = {name: value for name, value in typed.items() if name in names.intersection(_CLASSES)}
    fixed = {name: value for name, value in typed.items() if name in names.difference(_SIZES, _CLASSES)}
    found, tensors = read(path, kind=kind, flags=fixed, weights=which, sizes=sizes)
    assert found.config is not None
    resized = _resized(found.config, sizes, path)
    config = _with_classes(resized, classes, path, new_classes)
    whole = (parse_name(path) or ("",))[0] == "model" and not weights and not new_classes
    # Data and training settings of the other run apply only if its whole save is continued.
    training = saved.config or {} if whole else {}
    of_network = {"model": config.model.to_dict(), "diffusion": config.diffusion.to_dict()}
    stored = {"data": {}, "train": {}, **training, **of_network}
    as_2021 = whole and not saved.config
    origin = Origin(path, found.class_names, resized.model, None if whole else tensors, new_classes, as_2021)
    return replace(saved, config=stored, class_names=found.class_names), origin


def _weights_file(saved: SavedRun, weights: str) -> tuple[str, str]:
    """(file of weights of a save, the weights to choose in it where it holds both: "ema", "model" or "" for the default)."""
    assert saved.model is not None
    # Only the raw weights of a save have another file for the EMA; any other file is read as it is, and may hold both.
    if weights != "ema" or (parse_name(saved.model) or ("",))[0] != "model":
        return saved.model, weights
    if not saved.ema:
        raise ValueError(
            f"--resume_from is 'ema', but the save at step {saved.step} in {saved.directory} has no EMA weights"
        )
    return saved.ema[max(saved.ema, key=float)], ""


def _resized(config: RunConfig, sizes: Mapping[str, int], path: str) -> RunConfig:
    """The configuration for images of the typed sizes: the same levels, and attention on the same levels."""
    model = config.model
    wrong = contradictions(config, sizes)
    if not wrong:
        return config
    if getattr(model, "classifier_pool", "") == "attention":
        refuse(path, wrong, "Its attention pool fits no other size")
    height = sizes.get("large_size", sizes.get("image_size", model.sample_size))
    factors = [2**k for k in range(len(model.multipliers)) if 2**k in model.attention_downsamplings]
    attention = ",".join(str(height // ds) for ds in factors)
    levels = {
        f"{model.prefix}channel_mult": ",".join(f"{m:g}" for m in model.multipliers),
        f"{model.prefix}attention_resolutions": attention,
    }
    differs = "; ".join(text for _, text in wrong.values())
    _log.info("%s: %s: the levels stay, with attention at %s", path, differs, attention)
    return replace(config, model=replace(model, **sizes, **levels).validate())  # type: ignore[arg-type]


def _with_classes(config: RunConfig, typed: Mapping[str, Any], path: str, new_classes: bool) -> RunConfig:
    """The configuration with the typed classes; ValueError where they differ from the file's without --new_classes."""
    if not new_classes:
        remedy = "Leave these flags out, or give --new_classes True: the network gets the classes of the data"
        refuse(path, contradictions(config, typed), remedy)
        return replace(config, model=replace(config.model, num_classes=classes_of(config.model)))
    wanted = {"num_classes": 0, "class_cond": True, **typed}
    if not wanted["class_cond"]:
        wanted["null_row"] = False
    of_data = {name: value for name, value in wanted.items() if name in config.model.names()}
    return replace(config, model=replace(config.model, **of_data).validate())


def fill(net: nn.Module, start: Origin, class_names: Sequence[str], *, null_row: bool = False) -> None:
    """Load the weights of the file into `net`. With --new_classes, a class that the file has by name takes its rows (of the label
    embedding, or of a classifier's last layer) from the file; the rows of other classes stay as `net` was initialised. Without it,
    a null row that the file lacks begins as the mean of its rows."""
    assert start.tensors is not None
    tensors = dict(start.tensors)
    had_null_row = getattr(start.old, "null_row", False)
    if start.new_classes:
        old_row = {name: row for row, name in enumerate(start.class_names)}
        kept = {row: old_row[name] for row, name in enumerate(class_names) if name in old_row}  # new row -> old row
        kept |= {-1: -1} if had_null_row and null_row else {}
        fresh = net.state_dict()
        for name in _class_tensors(start.old):
            before = tensors.pop(name, None)
            if name in fresh:
                tensors[name] = fresh[name].clone()
                if before is not None:
                    tensors[name][list(kept)] = before[list(kept.values())]
        had = classes_of(start.old)
        _log.info(
            "%s has %d classes%s; %d of the %d of this run are among them by name and keep what was learned, the others start anew",
            start.path, had, "" if start.class_names or not had else " without names", len(kept.keys() - {-1}), len(class_names),
        )  # fmt: skip
    elif null_row and not had_null_row:
        for name in _class_tensors(start.old):
            tensors[name] = torch.cat([tensors[name], tensors[name].mean(dim=0, keepdim=True)])
        _log.info(
            "--class_dropout: the network gets a row for images without a class, which begins as the mean of the others"
        )
    load_weights_into(net, tensors, start.path)
    _log.info("starting from the weights of %s, at step 0", start.path)


def _class_tensors(model: Network) -> list[str]:
    """The names of the tensors with a row for each class: those whose shape depends on the number of classes."""
    more: dict[str, Any] = {"class_cond": True} if "class_cond" in model.names() else {}
    two, three = (build_empty(replace(model, num_classes=count, **more)).state_dict() for count in (2, 3))
    return [name for name, value in two.items() if value.shape != three[name].shape]


def configuration(
    kind: str, flags: Mapping[str, Any], typed: Mapping[str, Any], saved: SavedRun | None, *, default_bf16: bool
) -> RunConfig:
    """The configuration of a run: that of the save it continues, with `typed` flags on top, else `flags`; contradictions are refused.

    With `default_bf16` a new run of a U-Net computes in bfloat16 unless a flag says otherwise. The result does not hold
    --resume_checkpoint: a later start continues from the run's own saves.
    """
    config = (saved.config if saved is not None else None) or {}
    stored = flatten(config)
    architectures = {{**flags, **stored}.get(f"{prefix}architecture", UNET) for prefix in ("", "classifier_")}
    has_precision = any(name in typed for name in ("precision", "use_fp16", "classifier_use_fp16"))
    if default_bf16 and architectures == {UNET} and not has_precision and not config.get("train"):
        flags = {**flags, "precision": "bf16"}
    if saved is not None and config:
        agree(RunConfig.from_dict(kind, config), typed, saved.directory)
        # Network and process were just found to agree with the typed flags: keep the save's spelling of them.
        fixed = {
            name: stored[name] for section in ("model", "diffusion") for name in config[section] if name not in FREE
        }
        flags = {**flags, **fixed, **laid_over(stored, typed)}
        for sentence in changed(stored, typed, flags):
            _log.info(sentence)
    return RunConfig.from_flags(kind, {**flags, "resume_checkpoint": ""})


def require_same_rows(saved: SavedRun | None, config: RunConfig) -> None:
    """ValueError if the save that is continued whole has no null row, and --class_dropout asks for one."""
    of_save = (saved.config or {}).get("model", {}) if saved is not None else {}
    if saved is not None and getattr(config.model, "null_row", False) and of_save and not of_save.get("null_row"):
        raise ValueError(
            f"--class_dropout is {config.train.class_dropout:g}, but the network of {saved.directory} was begun without a row for images "
            f"without a class. Start from its weights (--resume_checkpoint {saved.directory} --resume_from ema, and another "
            "--out), or leave --class_dropout out"
        )


def already_begun(folder: str, config: RunConfig, world: World) -> SavedRun | None:
    """The save to continue although --resume_checkpoint is none: the newest in `folder`, if its run began so with the same settings.

    Then a scheduler has started the same command again, and beginning anew would repeat what is done.
    """
    saved = None
    if world.is_main and (latest := find_latest(folder)) is not None and latest.started_from == "none":
        before, now = ({**flatten(c), **dict.fromkeys(_NOT_COMPARED)} for c in (latest.config or {}, config.to_dict()))
        # Without --precision the saved one was chosen for a device; it is no setting, and this start may have another device.
        differing = {
            name for name in now if name in before and before[name] != now[name] and (name != "precision" or now[name])
        }
        saved = None if differing else latest
        if differing:
            _log.info(
                f"--resume_checkpoint none begins anew in {folder}: {', '.join(sorted(differing))} differ from the run there"
            )
    saved = world.broadcast_object(saved, name="was the run begun already?")
    if saved is not None:
        _log.info(
            f"--resume_checkpoint none has already begun a run in {folder} with these settings, which is continued. To begin anew, "
            "give another --out"
        )
    return saved


def with_classes(config: RunConfig, class_names: Sequence[str], where: str) -> RunConfig:
    """The configuration with the number of classes, from the data in `where` if it was not given."""
    if config.kind != "classifier" and not getattr(config.model, "class_cond", False):
        return config
    count = len(class_names)
    if config.model.num_classes and count > config.model.num_classes:
        raise ValueError(f"--num_classes is {config.model.num_classes}, but {where} has {count} classes")
    return replace(config, model=replace(config.model, num_classes=config.model.num_classes or count))


def with_global_batch(config: RunConfig, processes: int, *, before: SavedRun | None = None) -> RunConfig:
    """The configuration with the global batch size, that of the run `before` if there is one. It is stored so that the run continues
    with the same batches on another number of processes."""
    size = flatten(before.config or {}).get("global_batch_size", 0) if before is not None else 0
    size = size or config.train.global_batch_size or config.train.batch_size * processes
    if size % processes:
        raise ValueError(f"--global_batch_size is {size}; it must be a multiple of the {processes} processes")
    return replace(config, train=replace(config.train, global_batch_size=size))
