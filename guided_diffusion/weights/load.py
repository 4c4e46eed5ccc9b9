"""Load a file of weights or a run folder: its configuration, its tensors, and the network with them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .. import build
from ..config import UNET, WEIGHTS, RunConfig, classes_of
from ..diffusion.process import Process
from ..runtime import storage
from ..runtime.devices import choose_precision, compute_in
from . import identify
from .files import load_weights_into, read_metadata, read_own_weights, read_weights
from .runs import find_latest, parse_name, read_run_json, save_run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A file of weights and what is known about it without reading its tensors; `certain` and `weights` as in `Loaded`."""

    path: str
    config: RunConfig | None
    class_names: tuple[str, ...] = ()
    step: int | None = None
    sha256: str = ""
    certain: bool = True
    weights: str = ""


def find(path: str, *, weights: str = "") -> Found:
    """The file of weights at `path`: the file itself, or in a run folder the newest EMA weights (`weights`: "ema" or "model")."""
    if weights not in WEIGHTS:
        raise ValueError(f"--weights is {weights!r}; it must be one of {', '.join(map(repr, WEIGHTS))}")
    path = storage.expand(path)
    if not path or not storage.exists(path):
        raise FileNotFoundError(f"{path!r}: no such file of weights or run folder")
    step = None
    if storage.isdir(path):
        path, step = _newest_in_run(path, weights)
    else:
        role = (parse_name(path) or (weights,))[0].partition("_")[0]
        if weights and role in ("ema", "model") and role != weights:
            raise ValueError(f"--weights is {weights!r}, but {path} holds the other kind; give the file you mean")
    run = (_embedded_run if path.endswith(".safetensors") else read_run_json)(path)
    if run is None:
        return Found(path, None, step=step)
    config = RunConfig.from_dict(run["kind"], run["config"]) if run["config"] else None
    sha256 = run.get("files", {}).get(os.path.basename(path), {}).get("sha256", "")
    # A network without classes has no class names, whatever the files of its images are called.
    names = tuple(run["class_names"]) if config is None or classes_of(config.model) else ()
    return Found(path, config, names, run["step"], sha256)


def _newest_in_run(folder: str, weights: str) -> tuple[str, int]:
    """(file of weights, step) of the newest save in a run folder."""
    saved = find_latest(folder, unread=("opt", "ema_rel"))
    if saved is None or saved.model is None:
        raise ValueError(f"{folder} holds no save of a run; give a folder that training wrote, or a .pt file")
    decay = None if weights == "model" else max(saved.ema, key=float, default=None)
    if decay is None and weights == "ema":
        raise ValueError(f"--weights is 'ema', but the newest save in {folder} kept no EMA weights")
    if decay is None:
        path, what = saved.model, "weights" if weights else "weights (no EMA was kept)"
    else:
        path, what = saved.ema[decay], f"EMA weights (decay {decay})"
    _log.info("taking the newest %s: %s", what, path)
    if decay is not None and saved.step < 1 / (1 - float(decay)):
        _log.info(
            "note: after %d steps an EMA of decay %s still holds much of the first, random weights", saved.step, decay
        )
    return path, saved.step


def _embedded_run(path: str) -> dict[str, Any] | None:
    """The metadata that `convert` wrote into a safetensors file; None in files that other programs wrote."""
    text = read_metadata(path).get("guided_diffusion")
    if text is None:
        return None
    try:
        run = json.loads(text)
        RunConfig.from_dict(run["kind"], run["config"])
        return {name: run[name] for name in ("kind", "config", "class_names", "step")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} carries a configuration that cannot be read ({error}); convert it again") from error


def fitted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the form of our networks: float32, and attention as 1x1 Conv1d where a file has 1x1 Conv2d. Copies only for float32."""
    ends = (".qkv.weight", ".proj_out.weight")
    squeezed = {name for name, value in weights.items() if name.endswith(ends) and value.shape[2:] == (1, 1)}
    return {name: (value.squeeze(-1) if name in squeezed else value).float() for name, value in weights.items()}


def network_of(config: RunConfig, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """The network of `config` that uses `tensors` themselves (no copies) as its weights: in eval mode, without gradients."""
    net = build.build_empty(config.model, config.diffusion)
    load_weights_into(net, tensors, source, assign=True)
    return net.eval().requires_grad_(False)


def read(
    path: str,
    *,
    kind: str | None = None,
    flags: Mapping[str, Any] | None = None,
    weights: str = "",
    sizes: Mapping[str, int] | None = None,
) -> tuple[Found, dict[str, Tensor]]:
    """(`Found` of `path` with its configuration; the tensors, float32). Arguments and errors as in `load`.

    `sizes`: flags of image sizes that the file may contradict; used only if neither the file nor a released model tells its size.
    """
    found, flags = find(path, weights=weights), dict(flags or {})
    if found.config is not None and found.config.model.architecture != UNET:
        tensors, taken = read_own_weights(found.path), ""
        tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    else:
        is_save = parse_name(found.path) is not None  # such a file holds one set of weights, so there is no choice
        tensors, taken = read_weights(found.path, which="" if is_save else weights)
        tensors = fitted(tensors)
    if found.config is None:
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        if sizes and identify.released_as(found.path, shapes) is None:
            flags |= sizes
        config = identify.identify(found.path, shapes, flags=flags, kind=kind)
    else:
        identify.require_kind(found.path, found.config.kind, kind)
        config = agree(found.config, flags, found.path)
    certain = found.config is not None or config.kind != "classifier"
    names = found.class_names if classes_of(config.model) else ()
    return replace(found, config=config, class_names=names, certain=certain, weights=taken), tensors


def agree(config: RunConfig, flags: Mapping[str, Any], path: str) -> RunConfig:
    """The file's configuration with the `flags` that concern only its use (`identify.FREE`); ValueError if others contradict it."""
    fixed = {name: value for name, value in flags.items() if name not in identify.FREE}
    identify.refuse(path, identify.contradictions(config, fixed))

    def with_free(values: Any) -> Any:
        names = identify.FREE & set(flags) & set(values.names())
        return replace(values, **{name: flags[name] for name in names}).validate()

    return replace(config, model=with_free(config.model), diffusion=with_free(config.diffusion))


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, its noise process and its configuration."""

    net: nn.Module
    process: Process
    config: RunConfig
    path: str
    class_names: tuple[str, ...] = ()
    step: int | None = None
    sha256: str = ""
    certain: bool = True
    """Whether the noise process is known; False for a classifier whose file stores no configuration."""
    weights: str = ""
    """ "ema" or "model" where the file holds both and one was chosen."""

    @property
    def kind(self) -> str:
        """diffusion, super_resolution or classifier."""
        return self.config.kind

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return (self.config.model.image_channels, *self.config.model.size)

    @property
    def small_size(self) -> int:
        """Side in pixels of the images that an upsampler enlarges; 0 for other networks."""
        return getattr(self.config.model, "small_size", 0)

    @property
    def num_classes(self) -> int:
        """How many classes the network knows; 0 = none. The null row is none of them."""
        return classes_of(self.config.model)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class (--class_dropout), which comes after those of the classes; None if there is none."""
        return self.num_classes if getattr(self.config.model, "null_row", False) else None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of a denoising network's inputs besides x and time: `y` (classes), `low_res` (images to enlarge)."""
        labels = ("y",) if getattr(self.config.model, "class_cond", False) else ()
        return (*labels, "low_res") if self.small_size else labels

    @property
    def reading(self) -> dict[str, Any]:
        """How to read the network's output: keyword arguments of `make_denoiser`."""
        return dict(self.config.diffusion.reading)


def load(
    path: str,
    *,
    kind: str | None = None,
    flags: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    weights: str = "",
) -> Loaded:
    """Load a network from a file or a run folder: on `device`, in eval mode, without gradients.

    Files written by this package store their configuration, released ones are recognised by their tensors; for others `flags`
    gives what tensors cannot tell, spelled as in 2021. A ValueError refuses flags that contradict the file, and a file of another
    `kind`; flags that do not concern the weights (--timestep_respacing, --use_fp16 ...) are applied. `precision` "" follows
    use_fp16. `weights`, "ema" or "model", chooses where a file or folder holds EMA and raw weights; by default the EMA is taken.
    On the CPU the network's weights may be the memory-mapped file: do not overwrite the file in place.
    """
    device = torch.device(device)
    found, tensors = read(path, kind=kind, flags=flags, weights=weights)
    config = found.config
    assert config is not None
    net = network_of(config, tensors, found.path).to(device)
    chosen = choose_precision(precision, config.model.fp16, device)
    compute_in(net, chosen, store=chosen != "fp32")
    process = build.build_process(config.diffusion).to(device)
    return Loaded(net, process, **vars(found))


def metadata_of(loaded: Loaded) -> dict[str, Any]:
    """The metadata that a converted file must store so that `load` needs no flags; `find` reads it."""
    is_file = not loaded.sha256 and os.path.isfile(loaded.path)
    return {
        "format": 1,
        "kind": loaded.kind,
        "step": loaded.step or 0,
        "config": loaded.config.to_dict(),
        "class_names": list(loaded.class_names),
        "source": os.path.basename(loaded.path),
        "source_sha256": storage.sha256_of(loaded.path) if is_file else loaded.sha256,
    }


def save(loaded: Loaded, folder: str) -> str:
    """Write a network with its configuration into `folder`; `load(folder)` reads it back. Returns the path of the JSON file."""
    return save_run(
        folder,
        step=loaded.step or 0,
        model=loaded.net.state_dict(),
        config=loaded.config.to_dict(),
        kind=loaded.kind,
        class_names=loaded.class_names,
    )


def check_pair(model: Loaded, classifier: Loaded) -> None:
    """ValueError that lists the differences if the classifier was not trained for the images and noise of the diffusion model."""
    ours, theirs = model.config, classifier.config
    pairs: dict[str, tuple[Any, Any]] = {"image size": (ours.model.size, theirs.model.size)}
    pairs["image channels"] = (ours.model.image_channels, theirs.model.image_channels)
    if model.num_classes:
        pairs["number of classes"] = (model.num_classes, classifier.num_classes)
    if model.certain and classifier.certain:
        for name in ("noise_schedule", "diffusion_steps", "rescale_timesteps", "zero_terminal_snr"):
            pairs[name] = (getattr(ours.diffusion, name), getattr(theirs.diffusion, name))
    wrong = [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    if model.class_names and classifier.class_names and model.class_names != classifier.class_names:
        longest = zip_longest(model.class_names, classifier.class_names, fillvalue="")
        number, (first, second) = next((k, pair) for k, pair in enumerate(longest) if pair[0] != pair[1])
        wrong.append(f"class names: class {number} is {first or 'none'!r} and {second or 'none'!r}")
    if wrong:
        raise ValueError(
            f"{model.path} (diffusion model) and {classifier.path} (classifier) do not belong together; they differ in {'; '.join(wrong)}"
        )
