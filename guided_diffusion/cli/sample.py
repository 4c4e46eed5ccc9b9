"""`sample`: weights -> images, guided by a classifier if one is given; `--requests` makes many small requests in shared batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..config import ModelConfig, flag
from . import arguments, making, requests, runs

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


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion sample`."""
    return run(argv, program="guided-diffusion sample")


def image_sample(argv: Sequence[str] | None = None) -> int:
    """`scripts/image_sample.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, program="image_sample.py", script=True), argv)


def classifier_sample(argv: Sequence[str] | None = None) -> int:
    """`scripts/classifier_sample.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, program="classifier_sample.py", script=True, guided=True), argv)


def flags(argv: Sequence[str] | None, *, program: str, script: bool = False) -> arguments.Parsed:
    """The flags of a sampling command."""
    return making.flags(argv, Sampling, ModelConfig, program=program, script=script)


def run(argv: Sequence[str] | None, *, program: str, script: bool = False, guided: bool = False) -> int:
    """Sample as the flags say; returns the exit code."""
    asked = Sampling.of(flags(argv, program=program, script=script))
    if not asked.model_path:
        raise ValueError("--model_path is empty; give the weights of a diffusion model, or the folder of a run")
    if guided and asked.classifier_scale and not asked.classifier_path:
        raise ValueError(
            "--classifier_path is empty; give the weights of a classifier, or --classifier_scale 0 for none"
        )
    return start(asked)


def start(asked: Sampling) -> int:
    """Sample as `asked`, in a session of its own; returns the exit code."""
    entries = requests.read(asked.requests, asked) if asked.requests else ()
    if entries:
        return making.in_session(asked, lambda world, stop: make_all(entries, asked, world, stop))
    return making.in_session(asked, lambda world, stop: make(asked, world, stop))


def make(asked: making.Making, world: World, stop: Stop) -> str:
    """Sample and return the path of the npz. Called on every process."""
    from ..sampling.jobs import Request

    networks = making.read_networks(asked, "diffusion", world)
    request = Request("", asked.num_samples, asked.seed, making.label_plan(asked, networks))
    job, chosen = making.job_of(asked, networks, request, world, "samples")
    return making.make(asked, networks, job, chosen, world, stop)


def make_all(entries: Sequence[requests.Entry], asked: Sampling, world: World, stop: Stop) -> None:
    """Make what a file of requests asks for, each into a folder of its own. Called on every process."""
    from ..runtime import storage
    from ..sampling.jobs import Request
    from ..sampling.queue import generate_all

    entries = world.broadcast_object(entries, name="requests")
    networks = making.read_networks(asked, "diffusion", world)
    each = [entry.request(networks.num_classes, networks.class_names) for entry in entries]
    total = sum(request.num_samples for request in each)
    shared, chosen = making.job_of(asked, networks, Request("all", total), world, "requests")
    jobs = []
    for entry, request in zip(entries, each):
        own = {**entry.flags(), "classes": ",".join(map(str, request.labels.classes))}
        del own["name"]
        out = storage.join(shared.out, request.name)
        jobs.append(replace(shared, request=request, out=out, config={**shared.config, **own}))
    what = making.what_is_made(asked, networks)
    log.info("%d requests, %d %s, into %s (%s)", len(jobs), total, what, shared.out, chosen)
    if world.is_main:
        understood = [entry.flags() for entry in entries]
        storage.write_json_atomic(storage.join(shared.out, "requests.json"), understood)
    pipeline = making.pipeline_of(asked, networks)
    saving = generate_all(pipeline, jobs, shared.out, world=world, should_stop=lambda: stop.requested)
    log.info("%s", saving if saving.images else f"all {len(jobs)} requests are there already")
