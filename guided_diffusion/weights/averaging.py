"""Averages of weights of any length, from the snapshots that a run kept: post-hoc EMA (`power_ema` has the formulas)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from ..build import build_empty
from ..config import UNET, RunConfig
from ..runtime import storage
from .files import load_weights, read_own_weights
from .power_ema import coefficients, gamma_of
from .runs import file_name, power_name, read_run_json, save_run, saves_in

_log = logging.getLogger(__name__)


def reconstruct(folder: str, sigma_rels: Iterable[float], out: str, *, step: int = 0) -> list[tuple[str, float]]:
    """Write averages of the lengths `sigma_rels` at `step` (0: the newest) of a run in `folder`, as files of weights in `out`.

    Returns (path, error as of `power_ema.coefficients`) of each. All snapshots up to that step count, also those of removed saves.
    ValueError if there are none, and where `out` is the run folder, whose files of such names are the snapshots themselves.
    """
    saves = saves_in(folder)
    found = {
        (number, float(name.removeprefix("rel"))): path
        for number, files in saves.items()
        for role, path in files.items()
        if (name := power_name(role))
    }
    steps = sorted({number for number, _ in found})
    runs = [files["run"] for files in saves.values() if "run" in files]
    if not found or not runs:
        raise ValueError(
            f"{folder} holds no snapshots of averages; train with --ema_sigma_rel 0.05,0.1 and save several times"
        )
    step = step or steps[-1]
    if step not in steps:
        raise ValueError(f"--step is {step}; {folder} has snapshots at {', '.join(map(str, steps))}")
    if storage.isdir(out) and storage.same_folder(out, folder):
        raise ValueError(
            f"--out is {out}, the run folder itself; give another, as the snapshots there have the same names"
        )
    used = {key: path for key, path in found.items() if key[0] <= step}
    about = read_run_json(runs[-1])
    assert about is not None
    config = RunConfig.from_dict(about["kind"], about["config"])
    net = build_empty(config.model, config.diffusion)
    read = read_own_weights if config.model.architecture != UNET else load_weights
    states = {key: read(path) for key, path in used.items()}  # mapped, not read, where the file allows it
    newest = next(state for key, state in reversed(states.items()) if key[0] == step)
    averaged = {name for name, _ in net.named_parameters()}
    ema, errors = {}, []
    for sigma_rel in sigma_rels:
        snapshots = [(number, gamma_of(own)) for number, own in used]
        weights, error = coefficients(snapshots, step, gamma_of(sigma_rel))
        mixed = {name: _mixed(weights, states.values(), name) for name in newest if name in averaged}
        ema[f"rel{sigma_rel}"] = {**newest, **mixed}
        errors.append(error)
    same = {"config": about["config"], "kind": about["kind"], "class_names": tuple(about["class_names"])}
    save_run(out, step=step, model=None, ema=ema, **same)
    _log.info("%d snapshots of %d steps, up to step %d", len(used), len({number for number, _ in used}), step)
    return [(storage.join(out, file_name(f"ema_{name}", step)), error) for name, error in zip(ema, errors)]


def _mixed(weights: np.ndarray, states: Iterable[Mapping[str, Tensor]], name: str) -> Tensor:
    """The weighted sum of one tensor, computed in float64, as float32."""
    first, *rest = (float(weight) * state[name].double() for weight, state in zip(weights, states))
    for term in rest:
        first += term
    return first.float()
