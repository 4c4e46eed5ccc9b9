"""Many small requests as few full batches. An image is that of its own (seed, number), whoever shares its batch.

A request of three images alone fills three places of a batch and pays for all. Here the images of all requests stand in one
queue, which is cut into batches of one size; only the last batch is filled up. So shapes never change: nothing is compiled
twice and recorded CUDA graphs stay valid.

`answers` keeps everything in memory, for programs that serve; `fulfil` writes what `generate` would have written for each
request alone, into a folder each, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime import storage
from ..runtime.streams import SAMPLE, Streams
from ..runtime.world import World
from . import generate as g

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Request:
    """What someone asks for: `num_samples` images, numbers 0 ... num_samples - 1 of `seed`, with the classes that `labels` deals out.

    `name` tells requests apart; `fulfil` makes it the name of a folder.
    """

    name: str
    num_samples: int
    seed: int = 0
    labels: g.LabelPlan = field(default_factory=g.LabelPlan)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"request {self.name!r} asks for {self.num_samples} images; it must be at least 1")


class Row(NamedTuple):
    """One place of a batch: image number `image` of `request`."""

    request: Request
    image: int


class Answer(NamedTuple):
    """A finished request: images uint8 `[num_samples, H, W, C]`, labels int64 `[num_samples]` or None."""

    request: Request
    images: np.ndarray
    labels: np.ndarray | None


class Saving(NamedTuple):
    """How many batches are computed together, and how many the same requests would need one by one."""

    requests: int
    images: int
    batches: int
    alone: int

    def __str__(self) -> str:
        return f"{self.requests} requests, {self.images} images in {self.batches} batches instead of {self.alone}"


def saving(counts: Iterable[int], batch_size: int) -> Saving:
    """What packing requests of `counts` images saves."""
    counts = list(counts)
    alone = sum(-(-count // batch_size) for count in counts)
    return Saving(len(counts), sum(counts), -(-sum(counts) // batch_size), alone)


def pack(rows: Iterable[Row], batch_size: int) -> Iterator[list[Row]]:
    """Cut a queue into batches; all but the last are full. Takes no more from `rows` than the next batch needs."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    queue = iter(rows)
    while batch := list(islice(queue, batch_size)):
        yield batch


def draw(
    sample: g.Sample,
    rows: Sequence[Row],
    *,
    batch_size: int,
    shape: Shape,
    to_uint8: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The images of up to `batch_size` rows, uint8 `[len(rows), H, W, C]`. The whole batch is computed: the last row fills the rest.

    ValueError where some requests have classes and others have none: a network hears classes always or never.
    """
    whole = [*rows, *[rows[-1]] * (batch_size - len(rows))]
    streams = Streams.of([(row.request.seed, SAMPLE, row.image) for row in whole], device)
    labels = [row.request.labels.of([row.image]) for row in whole]
    known = [label for label in labels if label is not None]
    if known and len(known) < len(whole):
        without = next(row.request.name for row, label in zip(whole, labels) if label is None)
        raise ValueError(f"request {without!r} names no classes and others of its batch do; give all of them classes")
    conditions = {"y": torch.from_numpy(np.concatenate(known)).to(device)} if known else {}
    images = g.finite(
        lambda: sample(streams.normal(shape), streams.randn_like, conditions),
        lambda row: f"request {whole[row].request.name!r}, image {whole[row].image}",
    )
    return to_uint8(images).cpu().numpy()[: len(rows)]


def answers(
    sample: g.Sample,
    requests: Iterable[Request],
    *,
    shape: Shape,
    batch_size: int,
    to_uint8: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
) -> Iterator[Answer]:
    """Make the images of all requests, in turn; each answer comes as soon as its last image is made.

    `requests` may be endless: no more are taken from it than the next batch needs, so a queue that blocks until someone asks
    holds up those who wait for a full batch. `shape` is channels, height, width; `to_uint8` as in `Job`. One process.
    """
    held: list[np.ndarray] = []
    for rows in pack((Row(request, i) for request in requests for i in range(request.num_samples)), batch_size):
        pixels = draw(sample, rows, batch_size=batch_size, shape=shape, to_uint8=to_uint8, device=device)
        for row, image in zip(rows, pixels):
            held.append(image)
            if row.image == row.request.num_samples - 1:
                yield Answer(row.request, np.stack(held), row.request.labels.of(range(row.request.num_samples)))
                held = []


def fulfil(
    sample: g.Sample,
    job: g.Job,
    requests: Sequence[Request],
    *,
    world: World | None = None,
    tell: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> Saving:
    """Make every request's images into the folder `job.out`/NAME, as `generate` would: npz, picture and receipt.

    `job` says what all requests share; its number of images, seed and labels are not used, further conditions are refused.
    What is there already is kept: a finished request is skipped, one begun (here or by `generate`) is completed. A request's
    files are written as soon as its last image is made. Called on every rank with the same requests; rank r computes every
    world.size-th batch, and all write to one storage. Raises Interrupted after the batch in which `should_stop` became true
    on any rank, and ValueError as `generate` does, or where two requests have one name.
    """
    assert job.conditions is None, "requests know no conditions but classes"
    world = world or World()
    jobs = {request.name: _job_of(request, job) for request in requests}
    if len(jobs) < len(requests):
        names = [request.name for request in requests]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two requests are called {twice!r}; each needs a name of its own")
    lock, todo = _open(job.out, jobs, tell) if world.is_main else (None, None)
    try:
        todo = world.broadcast_object(todo, name="what is left of the requests")
        if isinstance(todo, str):
            raise ValueError(todo)
        assert todo is not None
        return _make(sample, job, jobs, requests, todo, world, tell, should_stop, progress)
    finally:
        if lock is not None:
            lock.release()


def _job_of(request: Request, job: g.Job) -> g.Job:
    out = storage.join(job.out, request.name)
    dealt = request.labels
    asked = {
        "num_samples": request.num_samples,
        "seed": request.seed,
        "classes": ",".join(map(str, dealt.classes)),
        "labels": "balanced" if dealt.balanced else "random",
    }
    config = {**job.config, **asked} if job.config else {}
    return replace(job, out=out, num_samples=request.num_samples, seed=request.seed, labels=dealt, config=config)


def _open(
    folder: str, jobs: Mapping[str, g.Job], tell: Callable[[str], None]
) -> tuple[Any, dict[str, list[int]] | str]:
    """(lock of the folder, the images to make of each request that is not finished; or a complaint). On the main rank."""
    try:
        lock = storage.lock_folder(folder, g.LOCK)
    except ValueError as error:
        return None, str(error)
    todo: dict[str, list[int]] = {}
    for name, job in jobs.items():
        left = g.prepare(job, tell)
        if isinstance(left, str):
            return lock, left
        if left is not None:
            todo[name] = left
    return lock, todo


def _make(
    sample: g.Sample,
    job: g.Job,
    jobs: Mapping[str, g.Job],
    requests: Sequence[Request],
    todo: Mapping[str, list[int]],
    world: World,
    tell: Callable[[str], None],
    should_stop: Callable[[], bool],
    progress: bool,
) -> Saving:
    saved = saving([len(left) for left in todo.values() if left], job.batch_size)
    queue = (Row(request, i) for request in requests for i in todo.get(request.name, ()))
    batches = list(pack(queue, job.batch_size))
    bar = g.Progress(0, saved.images, shown=progress and world.is_main and bool(batches))
    if world.is_main:  # all images were there, only the npz was missing
        for name in (name for name, left in todo.items() if not left):
            g.assemble(jobs[name], lambda text: bar.aside(tell, text))
    finished = len(requests) - saved.requests
    for first in range(0, len(batches), world.size):
        round_ = batches[first : first + world.size]
        if world.rank < len(round_):
            rows = round_[world.rank]
            pixels = draw(
                sample,
                rows,
                batch_size=job.batch_size,
                shape=job.shape,
                to_uint8=job.to_uint8,
                device=world.device,
            )
            _keep(rows, pixels, jobs)
        bar.advance(sum(map(len, round_)))
        stop = world.any_true(should_stop(), name="stop sampling?")  # after this, all have written their images
        ready = [row.request.name for rows in round_ for row in rows if row.image == todo[row.request.name][-1]]
        finished += len(ready)
        if world.is_main:
            for name in ready:
                g.assemble(jobs[name], lambda text: bar.aside(tell, text))
        if stop and first + world.size < len(batches):
            bar.close()
            raise g.Interrupted(
                f"{finished} of {len(requests)} requests are in {job.out}; the same command goes on from there"
            )
    bar.close()
    world.barrier("all requests are written")
    return saved


def _keep(rows: Sequence[Row], pixels: np.ndarray, jobs: Mapping[str, g.Job]) -> None:
    """Write the images of a batch as parts of their jobs."""
    for name, group in groupby(range(len(rows)), key=lambda k: rows[k].request.name):
        places = list(group)
        g.keep(jobs[name], [rows[k].image for k in places], pixels[places])
