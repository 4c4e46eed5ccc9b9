"""The variational bound of many images in bits per dimension, with an error bar and where the bits come from."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.listing import Records
from ..data.loader import make_batches, order
from ..data.sources import open_source
from ..diffusion import likelihood
from ..diffusion.denoiser import make_denoiser
from ..diffusion.samplers import NotFinite, check_finite
from ..runtime import storage
from ..runtime.streams import EVALUATE, Streams
from ..runtime.world import World
from ..weights.load import Loaded
from .pipeline import why_not_finite

log = logging.getLogger(__name__)


class Bounds(NamedTuple):
    """Bits per dimension. The step axis runs from T-1 down to 0, as the files of 2021."""

    total: np.ndarray  # [N], by image
    prior: np.ndarray  # [N]
    decoder: np.ndarray  # [N], step 0: the likelihood of the pixels
    vb: np.ndarray  # [T], mean over images
    mse: np.ndarray  # [T], error of the noise
    xstart_mse: np.ndarray  # [T], error of the clean image


def measure(
    model: Loaded,
    records: Records,
    count: int,
    *,
    batch_size: int,
    seed: int,
    clip: bool,
    world: World,
    workers: int = 0,
    on_error: str = "raise",
) -> Bounds:
    """The bounds of `count` images. Image k and its noise depend on (seed, k) alone, whatever the batch size.

    `batch_size` counts the images of each process; `clip` keeps predictions within [-1, 1]. Called on every rank.
    """
    if len(records) < world.size:
        raise ValueError(
            f"{records.root} has {len(records)} images for {world.size} processes; start no more than that"
        )
    per_step = min(batch_size * world.size, len(records) - len(records) % world.size)
    batches = make_batches(
        records,
        image_size=model.shape[1:],
        batch_size=per_step,
        rank=world.rank,
        size=world.size,
        seed=seed,
        flip=False,
        channels=model.shape[0],
        workers=workers,
        on_error=on_error,
    )
    values, steps = [], []
    with tqdm(total=count, unit="image", disable=not world.is_main) as bar:
        for batch in batches:
            done = batch.step * per_step
            if done >= count:
                break
            ids = (batch.positions + done).tolist()
            finished = batch.to_device(world.device)
            cond = {} if finished.labels is None else {"y": finished.labels}
            denoise = make_denoiser(model.net, model.process, cond, clip=clip, **model.reading)
            noise = Streams(seed, EVALUATE, ids=ids, device=world.device)
            bound = likelihood.bits_per_dim(denoise, model.process, finished.images, noise=noise.randn_like)
            terms = torch.stack([bound.vb, bound.eps_mse, bound.x0_mse], dim=1)
            # One row per image (number, total, prior, 3 x T terms), sorted, whichever rank computed it.
            numbers = torch.tensor(ids, dtype=torch.float64, device=world.device)  # makes all columns float64
            columns = [column[:, None] for column in (numbers, bound.total, bound.prior)]
            rows = world.all_gather_cat(torch.cat([*columns, terms.flatten(1)], dim=1), name="terms of the bound")
            rows = rows[rows[:, 0].argsort()]
            rows = rows[rows[:, 0] < count]
            terms = rows[:, 3:].unflatten(1, (3, -1))
            _require_finite(terms, done, records, seed, model)
            values.append(torch.cat([rows[:, 1:3], terms[:, 0, -1:]], dim=1).cpu())
            steps.append(terms.sum(dim=0).cpu())
            complete = min(count, done + per_step)
            bar.update(complete - done)
            log.info("done %d samples: bpd=%s", complete, torch.cat(values)[:, 0].mean().item())
    by_image = torch.cat(values).numpy()
    means = (torch.stack(steps).sum(dim=0) / count).float().numpy()
    return Bounds(*by_image.T, *means)


def _require_finite(terms: Tensor, done: int, records: Records, seed: int, model: Loaded) -> None:
    """ValueError naming the first image whose terms `[B, 3, T]` are not finite, and the step. Row 0 is image `done`."""
    try:
        check_finite(terms)
    except NotFinite as error:
        record = int(order(seed, 0, len(records))[done + error.row])
        image = open_source(records.kind, records.root).describe(records.paths[record])
        column = int(terms[error.row].isfinite().all(dim=0).long().argmin())  # first bad one, from step T-1 down to 0
        raise ValueError(
            f"the bound of image {image}: {error} at timestep {terms.shape[2] - 1 - column} of the process; "
            f"{why_not_finite([model])}"
        ) from None


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean over images; nan for a single image."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def breakdown(bounds: Bounds) -> dict[str, float]:
    """Where the bits come from: the prior, the steps by quarter of the process (the noisiest last), the pixels."""
    inner = bounds.vb[:-1][::-1]  # steps 1 .. T-1; step 0 is reported as the pixels
    parts = {"prior": float(bounds.prior.mean()), "pixels (step 0)": float(bounds.decoder.mean())}
    edges = np.linspace(0, len(inner), 5).round().astype(int)
    for k, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
        parts[f"steps, quarter {k + 1}"] = float(inner[low:high].sum())
    return parts


def summary(bounds: Bounds) -> str:
    """The number, its error bar, and the breakdown."""
    mean, error = bounds.total.mean(), standard_error(bounds.total)
    lines = [f"{mean:.5f} ± {error:.5f} bits per dimension ({len(bounds.total)} images; 1 standard error)"]
    lines += [f"  {value:9.5f}  {name}" for name, value in breakdown(bounds).items()]
    return "\n".join(lines)


def write(folder: str, bounds: Bounds, config: Mapping[str, Any]) -> None:
    """The three files of 2021 (`vb_terms.npz`, `mse_terms.npz`, `xstart_mse_terms.npz`, each `arr_0` [T]) and `likelihood.json`.

    The latter ends with the flags `config`, so that `--config likelihood.json` measures the same again.
    """
    storage.makedirs(folder)
    for name in ("vb", "mse", "xstart_mse"):
        with storage.atomic_write(storage.join(folder, f"{name}_terms.npz")) as file:
            np.savez(file, getattr(bounds, name))
    about = {
        "bits_per_dim": float(bounds.total.mean()),
        "standard_error": standard_error(bounds.total),
        "images": len(bounds.total),
        "breakdown": breakdown(bounds),
        "by_image": bounds.total.tolist(),
        "config": dict(config),
    }
    storage.write_json_atomic(storage.join(folder, "likelihood.json"), about)
