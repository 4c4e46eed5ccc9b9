"""`nll`: the variational bound of images in bits per dimension, with an error bar and where the bits come from."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import PRECISIONS, WEIGHTS, WEIGHTS_HELP, DataConfig, DiffusionConfig, ModelConfig, Section, flag
from . import arguments, runs

if TYPE_CHECKING:
    import numpy as np

    from ..runtime.world import World
    from ..weights.load import Loaded


@dataclass(frozen=True)
class LikelihoodConfig(Section):
    """What is measured, on how many images."""

    model_path: str = flag("", "weights of the diffusion model: a file, or a run folder (its newest EMA is taken)")
    weights: str = flag("", WEIGHTS_HELP, choices=WEIGHTS)
    clip_denoised: bool = flag(True, "keep every predicted clean image within [-1, 1]")
    num_samples: int = flag(1000, "how many images", low=1)
    batch_size: int = flag(1, "images per pass and process", low=1)
    seed: int = flag(0, "seed of the choice of images and of the noise", low=0)
    precision: str = flag("", "arithmetic of the network; empty = by --use_fp16", choices=PRECISIONS)


EXTRA: dict[str, tuple[Any, str]] = {"out": ("", "folder for the files of terms and the summary")}
_CONFIGS = (LikelihoodConfig, ModelConfig, DiffusionConfig, DataConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion nll`."""
    return run(argv, program="guided-diffusion nll")


def image_nll(argv: Sequence[str] | None = None) -> int:
    """`scripts/image_nll.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, program="image_nll.py", script=True), argv)


def run(argv: Sequence[str] | None, *, program: str, script: bool = False) -> int:
    """Measure as the flags say; returns the exit code."""
    defaults = {"out": runs.script_folder()} if script else {}
    parsed = arguments.parse(
        argv, _CONFIGS, program=program, description="Bits per dimension of images.", extra=EXTRA, defaults=defaults
    )
    config = LikelihoodConfig.from_flags(parsed.flags)
    for name in ("model_path", "data_dir"):
        if not parsed.flags[name]:
            raise ValueError(f"--{name} is empty; give --model_path WEIGHTS and --data_dir FOLDER_OF_IMAGES")

    with runs.session(parsed.flags, timeout_s=3600.0) as here:
        return _run(parsed, config, here)


def _run(parsed: arguments.Parsed, config: LikelihoodConfig, world: World) -> int:
    from ..config import classes_of
    from ..data.classes import renumber
    from ..data.listing import list_records
    from ..weights.load import load

    tell = print if world.is_main else _silent
    own = {*ModelConfig.names(), *DiffusionConfig.names()}
    typed = {name: value for name, value in parsed.typed.items() if name in own}
    model = load(
        config.model_path,
        kind="diffusion",
        flags=typed,
        device=world.device,
        precision=config.precision,
        weights=config.weights,
    )
    data = DataConfig.from_flags({**parsed.flags, "random_flip": False, "random_crop": False})
    classes = classes_of(model.config.model)
    records = list_records(data.data_dir, labels=data.labels if classes else "none")
    if classes:
        records, note = renumber(records, model.class_names, classes, model.path)
        records.require_labels()
        if note:
            tell(note)
    count = min(config.num_samples, len(records))
    if count < config.num_samples:
        tell(f"--num_samples is {config.num_samples}, but {data.data_dir} has {count} images: each is used once")
    folder, chosen = world.broadcast_object(runs.run_folder(parsed.flags["out"], "nll"), name="folder of results")
    tell(f"{count} images, {len(model.process)} steps each, into {folder} ({chosen})")
    found = measure(model, records, data, config, count, world, tell)
    if world.is_main:
        write(folder, found, {**config.to_dict(), **data.to_dict(), **typed})
        tell(summary(found))
    return 0


def _silent(*_: object) -> None:
    return None


class Found(NamedTuple):
    """Bits per dimension. The step axis runs from T-1 down to 0, as the files of 2021."""

    total: np.ndarray  # [N], by image
    prior: np.ndarray  # [N]
    decoder: np.ndarray  # [N], step 0: the likelihood of the pixels
    vb: np.ndarray  # [T], mean over images
    mse: np.ndarray  # [T], error of the noise
    xstart_mse: np.ndarray  # [T], error of the clean image


def measure(
    model: Loaded, records: Any, data: DataConfig, config: LikelihoodConfig, count: int, world: World, tell: Any
) -> Found:
    """Walk the bound of `count` images; image k and its noise are a function of (seed, k), whatever the batch size."""
    import torch
    from tqdm import tqdm

    from .. import build
    from ..data.images import to_float
    from ..diffusion.denoiser import make_denoiser
    from ..diffusion.likelihood import bits_per_dim
    from ..runtime.streams import EVALUATE, Streams

    if len(records) < world.size:
        raise ValueError(
            f"{data.data_dir} has {len(records)} images for {world.size} processes; start no more than that"
        )
    per_step = min(config.batch_size * world.size, len(records) - len(records) % world.size)
    batches = build.build_batches(
        records, data, model.config.model, batch_size=per_step, rank=world.rank, size=world.size, seed=config.seed
    )
    reading: dict[str, Any] = dict(model.config.diffusion.reading)
    rows, steps = [], []
    bar = tqdm(total=count, unit="image", disable=not world.is_main)
    for batch in batches:
        done = batch.step * per_step
        if done >= count:
            break
        ids = (batch.positions + done).tolist()
        x0 = to_float(batch.images.to(world.device))
        cond = {}
        if batch.labels is not None:
            cond["y"] = batch.labels.to(world.device)
        denoise = make_denoiser(model.net, model.process, cond, clip=config.clip_denoised, **reading)
        noise = Streams(config.seed, EVALUATE, ids=ids, device=world.device)
        bound = bits_per_dim(denoise, model.process, x0, noise=noise.randn_like)
        row = torch.stack([bound.total, bound.prior, bound.vb[:, -1]], dim=1).double()
        rows.append(world.all_gather_cat(_ordered(row, ids), name="bits per dimension").cpu())
        terms = torch.stack([bound.vb, bound.eps_mse, bound.x0_mse], dim=1).double()
        kept = _kept(world.all_gather_cat(_ordered(terms, ids), name="terms of the bound"), count)
        _require_finite(kept, done, records, config.seed, model)
        steps.append(kept.sum(dim=0).cpu())
        complete = min(count, done + per_step)
        bar.update(complete - done)
        so_far = _values(rows, count)[:, 0]
        tell(f"done {complete} samples: bpd={so_far.mean().item()}")
    bar.close()
    values = _values(rows, count).numpy()
    means = (torch.stack(steps).sum(dim=0) / count).float().numpy()
    return Found(values[:, 0], values[:, 1], values[:, 2], means[0], means[1], means[2])


def _ordered(values: Any, ids: Sequence[int]) -> Any:
    """Values with their image numbers in front, flattened to `[B, 1 + …]`, so that any rank can sort them."""
    import torch

    numbers = torch.tensor(ids, dtype=values.dtype, device=values.device)[:, None]
    return torch.cat([numbers, values.flatten(1)], dim=1)


def _kept(gathered: Any, count: int) -> Any:
    """Rows of images below `count`, in their order, as `[B, 3, T]`."""
    rows = gathered[gathered[:, 0].argsort()]
    return rows[rows[:, 0] < count][:, 1:].unflatten(1, (3, -1))


def _require_finite(terms: Any, done: int, records: Any, seed: int, model: Loaded) -> None:
    """ValueError naming the first image whose terms `[B, 3, T]` are not finite, and the step; `terms` begins with image `done`."""
    from ..data.loader import order
    from ..data.sources import open_source
    from ..diffusion.samplers import NotFinite, check_finite
    from ..sampling.pipeline import why_not_finite

    try:
        check_finite(terms)
    except NotFinite as error:
        record = int(order(seed, 0, len(records))[done + error.row])
        image = open_source(records.kind, records.root).describe(records.paths[record])
        walked = int(terms[error.row].isfinite().all(dim=0).long().argmin())
        raise ValueError(
            f"the bound of image {image}: {error} at timestep {terms.shape[2] - 1 - walked} of the process; "
            f"{why_not_finite([model])}"
        ) from None


def _values(rows: Sequence[Any], count: int) -> Any:
    import torch

    joined = torch.cat(list(rows))
    joined = joined[joined[:, 0].argsort()]
    return joined[joined[:, 0] < count][:, 1:]


def standard_error(values: np.ndarray) -> float:
    """Of the mean over images; nan for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def breakdown(found: Found) -> dict[str, float]:
    """Where the bits come from: the prior, the steps by quarter of the process (the noisiest last), the pixels."""
    import numpy as np

    inner = found.vb[:-1][::-1]  # steps 1 .. T-1, step 0 being the pixels
    parts = {"prior": float(found.prior.mean()), "pixels (step 0)": float(found.decoder.mean())}
    edges = np.linspace(0, len(inner), 5).round().astype(int)
    for k, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
        parts[f"steps, quarter {k + 1}"] = float(inner[low:high].sum())
    return parts


def summary(found: Found) -> str:
    """The number, its error bar, and the breakdown."""
    lines = [
        f"{found.total.mean():.5f} ± {standard_error(found.total):.5f} bits per dimension ({len(found.total)} images; 1 standard error)"
    ]
    lines += [f"  {value:9.5f}  {name}" for name, value in breakdown(found).items()]
    return "\n".join(lines)


def write(folder: str, found: Found, flags: Mapping[str, Any]) -> None:
    """The three files of 2021 (`vb_terms.npz`, `mse_terms.npz`, `xstart_mse_terms.npz`, each `arr_0` [T]) and `likelihood.json`.

    The latter ends with the flags, so that `--config likelihood.json` measures the same again.
    """
    import numpy as np

    from ..runtime import storage

    storage.makedirs(folder)
    for name, values in (("vb", found.vb), ("mse", found.mse), ("xstart_mse", found.xstart_mse)):
        buffer = io.BytesIO()
        np.savez(buffer, values)
        storage.write_bytes_atomic(storage.join(folder, f"{name}_terms.npz"), buffer.getvalue())
    about = {
        "bits_per_dim": float(found.total.mean()),
        "standard_error": standard_error(found.total),
        "images": len(found.total),
        "breakdown": breakdown(found),
        "by_image": found.total.tolist(),
        "config": dict(flags),
    }
    storage.write_json_atomic(storage.join(folder, "likelihood.json"), about)
