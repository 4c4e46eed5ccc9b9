"""Requests -> full batches -> images. Image `i` depends on (seed, i); batches, processes and other requests change it by rounding only.

The images of all requests form one queue, which is cut into batches of one size; the last batch is padded. So shapes never
change: nothing is compiled twice, and recorded CUDA graphs stay valid.

`generate` and `generate_all` write folders, on any number of processes; `answers` keeps images in memory, for servers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.images import to_uint8
from ..diffusion.samplers import NotFinite, check_finite
from ..diffusion.updates import Noise
from ..runtime import storage
from ..runtime.streams import SAMPLE, Streams
from ..runtime.world import World
from .jobs import LOCK, Job, Request, Shape, assemble, keep, prepare

# (noise [B, C, H, W], source of further noise, conditioning of the network) -> images in [-1, 1], [B, C, H, W]
Pipeline = Callable[[Tensor, Noise, dict[str, Tensor]], Tensor]


class Interrupted(Exception):
    """Stopped on request; finished images are on disk, and the same command makes the rest."""


class Place(NamedTuple):
    """One slot of a batch: image number `image` of `request`; not `wanted` if it is padding."""

    request: Request
    image: int
    wanted: bool = True

    def __str__(self) -> str:
        return f"request {self.request.name!r}, image {self.image}" if self.request.name else f"image {self.image}"


class Answer(NamedTuple):
    """A finished request: images uint8 `[num_samples, H, W, C]`, labels int64 `[num_samples]` or None."""

    request: Request
    images: np.ndarray
    labels: np.ndarray | None


class Saving(NamedTuple):
    """How many `batches` the requests need together, and how many if each were sampled `alone`."""

    requests: int
    images: int
    batches: int
    alone: int

    def __str__(self) -> str:
        return f"{self.requests} requests, {self.images} images in {self.batches} batches instead of {self.alone}"


def pack(queue: Iterable[Place], batch_size: int) -> Iterator[list[Place]]:
    """Cut a queue into batches; pads the last one with its last image. Takes from `queue` only what a batch needs."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rest = iter(queue)
    while batch := list(islice(rest, batch_size)):
        yield batch + [batch[-1]._replace(wanted=False)] * (batch_size - len(batch))


def in_place(request: Request, missing: Sequence[int], batch_size: int) -> Iterator[list[Place]]:
    """The batches of one request with `missing` images: image `i` is row `i % batch_size` of batch `i // batch_size`.

    So each image is the same to the last bit, wherever the job was interrupted.
    """
    wanted = set(missing)
    for batch in sorted({i // batch_size for i in missing}):
        numbers = range(batch * batch_size, (batch + 1) * batch_size)
        yield [Place(request, min(i, request.num_samples - 1), i in wanted) for i in numbers]


def draw(pipeline: Pipeline, batch: Sequence[Place], *, shape: Shape, device: torch.device | str = "cpu") -> np.ndarray:
    """The images of a batch, uint8 `[len(batch), H, W, C]`.

    ValueError if some requests have classes and others none; NotFinite (a ValueError) for an image that is not finite.
    """
    streams = Streams.of([(place.request.seed, SAMPLE, place.image) for place in batch], device)
    inputs = [place.request.inputs(place.image) for place in batch]
    # Rows differ in the number of inputs only if some have classes and others do not.
    fewest = min(range(len(batch)), key=lambda k: len(inputs[k]))
    if any(len(each) > len(inputs[fewest]) for each in inputs):
        name = batch[fewest].request.name
        raise ValueError(f"request {name!r} names no classes and others of its batch do; give all of them classes")
    cond = {name: torch.cat([each[name] for each in inputs]).to(device) for name in inputs[0]}
    try:
        images = pipeline(streams.normal(shape), streams.noise, cond)
        check_finite(images)
    except NotFinite as error:
        raise NotFinite(error.row, f"{batch[error.row]}: {error}") from None
    return to_uint8(images).cpu().numpy()


def answers(
    pipeline: Pipeline,
    requests: Iterable[Request],
    *,
    shape: Shape,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[Answer]:
    """Make the images of all requests, in turn; yields each answer as soon as its last image is made. On one process.

    `requests` may be endless: only as many are taken as the next batch needs. If taking one blocks until a new request
    arrives, earlier requests wait for it in the unfinished batch. `shape` is channels, height, width.
    """
    made: list[np.ndarray] = []
    queue = (Place(request, i) for request in requests for i in range(request.num_samples))
    for batch in pack(queue, batch_size):
        for place, image in zip(batch, draw(pipeline, batch, shape=shape, device=device)):
            if place.wanted:
                made.append(image)
                if place.image == place.request.num_samples - 1:
                    yield Answer(place.request, np.stack(made), place.request.labels.of(range(len(made))))
                    made = []


def generate(pipeline: Pipeline, job: Job, **options: Any) -> str:
    """Make the images of one job and return the path of their npz (`arr_0` uint8 `[N, H, W, C]`, `arr_1` labels).

    Options and errors are those of `generate_all`.
    """
    generate_all(pipeline, [job], job.out, **options)
    return job.npz


def generate_all(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    folder: str,
    *,
    world: World | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
    share: bool = True,
    after_batch: Callable[[float, int], None] = lambda seconds, left: None,
) -> Saving:
    """Make the images of all jobs in shared batches; each job's npz, picture and receipt follow its last image.

    The jobs differ in request, folder and flags only. Images on disk are kept: a finished job is skipped, a begun one
    completed. `folder` is locked meanwhile. Called on every rank with the same jobs; rank r computes every world.size-th
    batch, and all write to one storage. `share`: several requests may be in one batch. `after_batch` is called with the
    seconds that a batch took and the number of batches that this process still makes. Raises Interrupted after the batch in
    which `should_stop` became true on any rank, and ValueError if a folder holds images with other settings, another job is
    at work in it, or two requests have one name.
    """
    world, size = world or World(), jobs[0].batch_size
    names = [job.request.name for job in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two requests are called {twice[0]!r}; each needs a name of its own")
    by_name = dict(zip(names, jobs))
    with _locked(jobs, folder, world) as missing:
        if len(jobs) == 1 or not share:
            batches = [
                batch for job in jobs for batch in in_place(job.request, missing.get(job.request.name, ()), size)
            ]
        else:
            batches = list(pack((Place(by_name[name].request, i) for name, ids in missing.items() for i in ids), size))
        to_make = {name: len(images) for name, images in missing.items() if images}
        alone = sum(-(-count // size) for count in to_make.values())
        saving = Saving(len(to_make), sum(to_make.values()), len(batches), alone)
        if world.is_main:  # jobs with all images but no npz
            for name in missing.keys() - to_make.keys():
                assemble(by_name[name])

        total = sum(by_name[name].request.num_samples for name in to_make)
        made, finished = total - saving.images, len(jobs) - len(to_make)
        shown = progress and world.is_main and bool(batches)
        with tqdm(
            total=total, initial=made, unit="image", mininterval=1.0, dynamic_ncols=True, disable=not shown
        ) as bar:
            for first in range(0, len(batches), world.size):
                round_ = batches[first : first + world.size]  # one batch per rank, fewer in the last round
                if world.rank < len(round_):
                    batch, begin = round_[world.rank], time.perf_counter()
                    pixels = draw(pipeline, batch, shape=jobs[0].shape, device=world.device)
                    after_batch(
                        time.perf_counter() - begin, len(batches[first + world.rank + world.size :: world.size])
                    )
                    _keep(batch, pixels, by_name)
                places = [place for batch in round_ for place in batch if place.wanted]
                made += len(places)
                bar.update(len(places))
                stop = world.any_true(should_stop(), name="stop sampling?")  # a collective: now all ranks have written
                completed = [place.request.name for place in places if place.image == missing[place.request.name][-1]]
                finished += len(completed)
                if world.is_main and completed:
                    bar.clear()  # messages get lines of their own
                    for name in completed:
                        assemble(by_name[name])
                if stop and first + world.size < len(batches):
                    done = f"{made} of {total} images" if len(jobs) == 1 else f"{finished} of {len(jobs)} requests"
                    raise Interrupted(f"{done} are in {folder}; the same command goes on from there")
        world.barrier("all images are written")
        return saving


@contextmanager
def _locked(jobs: Sequence[Job], folder: str, world: World) -> Iterator[dict[str, list[int]]]:
    """Hold the folder's lock; yields the images to make of each unfinished job. A ValueError is raised on all ranks."""
    lock = None
    missing: dict[str, list[int]] | str = {}
    try:
        if world.is_main:
            try:
                lock = storage.lock_folder(folder, LOCK)
                prepared = {job.request.name: prepare(job) for job in jobs}
                missing = {name: images for name, images in prepared.items() if images is not None}
            except ValueError as error:
                missing = str(error)  # sent in place of the images, so that no rank waits for them
        missing = world.broadcast_object(missing, name="what is left to sample")
        if isinstance(missing, str):
            raise ValueError(missing)
        yield missing
    finally:
        if lock is not None:
            lock.release()


def _keep(batch: Sequence[Place], pixels: np.ndarray, jobs: Mapping[str, Job]) -> None:
    """Write the wanted images of a batch: one part per run of consecutive images (constant `image - row`) of a request."""
    runs = groupby(range(len(batch)), key=lambda k: (batch[k].wanted, batch[k].request.name, batch[k].image - k))
    for (wanted, name, _), group in runs:
        if wanted:
            rows = list(group)
            keep(jobs[name], batch[rows[0]].image, pixels[rows])
