"""`sample`: weights -> images, guided by a classifier if one is given; `--requests` makes many small requests in shared batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..config import flag
from . import making, requests

if TYPE_CHECKING:
    from ..runtime.signals import Stop
    from ..runtime.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling(making.Making):
    """Make images from weights."""

    requests: str = flag(
        "", f"JSON file of many small requests, made in shared batches; fields: {', '.join(requests.FIELDS)}"
    )


def main(
    argv: Sequence[str] | None = None,
    program: str = "guided-diffusion sample",
    *,
    script: bool = False,
    guided: bool = False,
) -> int:
    """Sample as the flags say, `guided` by a classifier in any case; returns the exit code."""
    options = Sampling.of(Sampling.flags(argv, program, script=script))
    if not options.model_path:
        raise ValueError("--model_path is empty; give the weights of a diffusion model, or the folder of a run")
    if guided and options.classifier_scale and not options.classifier_path:
        raise ValueError(
            "--classifier_path is empty; give the weights of a classifier, or --classifier_scale 0 for none"
        )
    run(options)
    return 0


def run(options: Sampling) -> None:
    """Sample in a session of its own."""
    entries = requests.read(options.requests, options) if options.requests else ()
    with making.session(options) as (world, stop):
        if entries:
            make_all(entries, options, world, stop)
        else:
            make(options, world, stop)


def make(options: making.Making, world: World, stop: Stop) -> str:
    """Sample and return the path of the npz. Called on every process."""
    from ..sampling.jobs import Request

    setup = making.Setup.read(options, world)
    request = Request("", options.num_samples, options.seed, setup.labels())
    return setup.make(setup.job(request, "samples"), stop)


def make_all(entries: Sequence[requests.Entry], options: Sampling, world: World, stop: Stop) -> None:
    """Make what a file of requests asks for, each into a folder of its own. Called on every process."""
    from ..runtime import storage
    from ..sampling.jobs import Request
    from ..sampling.queue import generate_all

    entries = world.broadcast_object(entries, name="requests")
    setup = making.Setup.read(options, world)
    plans = [setup.labels(entry.options, f"{entry.where}: classes") for entry in entries]
    shared = setup.job(Request("all", sum(entry.options.num_samples for entry in entries)), "requests")
    jobs = []
    for entry, labels in zip(entries, plans):
        request = Request(entry.name, entry.options.num_samples, entry.options.seed, labels)
        config = {**shared.config, **entry.flags(), "classes": ",".join(map(str, labels.classes))}
        jobs.append(replace(shared, request=request, out=storage.join(shared.out, entry.name), config=config))
    if world.is_main:
        understood = [{"name": entry.name, **entry.flags()} for entry in entries]
        storage.write_json_atomic(storage.join(shared.out, "requests.json"), understood)
    saving = generate_all(setup.pipeline(), jobs, shared.out, world=world, should_stop=lambda: stop.requested)
    log.info("%s", saving if saving.images else f"all {len(jobs)} requests are there already")
