"""`sample`: make images from weights, guided by a classifier if one is given; `--requests` serves many small requests in shared batches."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import SampleConfig, flag
from ..runtime import storage
from . import making
from .arguments import near

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime.signals import Stop
    from ..runtime.world import World

FIELDS = ("name", "seed", "num_samples", "classes", "labels")
_NAME = re.compile(r"[\w-]{1,100}")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling(making.Making):
    """Make images from weights."""

    invert: str = flag(
        "",
        "images (an npz of samples, or a folder): begin with the noise that they come from, by DDIM backwards and unguided; "
        "one image of each, unless --num_samples says how many",
    )
    requests: str = flag("", f"JSON file of many small requests, made in shared batches; fields: {', '.join(FIELDS)}")


class Entry(NamedTuple):
    """One request: its name, where it is in the file (for error messages), and the flags of the command with its values in them."""

    name: str
    where: str
    options: Sampling

    def flags(self) -> dict[str, Any]:
        """The values of a request's fields except its name."""
        return {name: getattr(self.options, name) for name in FIELDS[1:]}


def main(argv: Sequence[str], program: str, *, script: bool = False, guided: bool = False) -> int:
    """Sample as the flags say; returns the exit code. guided: a classifier is required unless its scale is 0."""
    options = Sampling.of(Sampling.flags(argv, program, script=script))
    options.require(model_path="the weights of a diffusion model, or the folder of a run")
    if guided and options.classifier_scale:
        options.require(classifier_path="the weights of a classifier, or --classifier_scale 0 for none")
    if options.requests and options.invert:
        raise ValueError("--requests and --invert do not go together; leave one of the two out")
    entries = read_requests(options.requests, options) if options.requests else ()
    with making.session(options) as (world, stop):
        if entries:
            make_all(entries, options, world, stop)
        elif options.invert:
            make_inverted(making.Setup.read(options, world), options, stop)
        else:
            make(making.Setup.read(options, world), stop)
    return 0


def make(setup: making.Setup, stop: Stop) -> tuple[str, int]:
    """Sample; returns the path of the npz and how many images were not there yet. Called on every process."""
    from ..sampling.jobs import Request

    request = Request("", setup.options.num_samples, setup.options.seed, setup.labels())
    job = setup.job(request, "samples")
    return job.npz, setup.make([job], job.out, stop).images


def make_inverted(setup: making.Setup, options: Sampling, stop: Stop) -> None:
    """Sample from the noise of the images of `--invert`, one image of each unless `--num_samples` is given. Called on every process."""
    import torch

    from ..sampling.jobs import Request
    from ..sampling.pipeline import INVERTED

    if setup.chain.draws:
        raise ValueError(
            f"--invert: --sampler {setup.chain.sampler} draws fresh noise here, and a random chain has no inverse; "
            "give --sampler ddim or unipc, or --eta 0, --tau 0, --churn 0 to those that have it"
        )
    images, labels, own = setup.images("invert", setup.model.shape[1:], own=True)

    def conditions(ids: Sequence[int]) -> dict[str, Tensor]:
        classes, given = own.of(ids), {INVERTED[0]: images.batch(ids)}
        return given if classes is None else {**given, INVERTED[1]: torch.from_numpy(classes)}

    if "num_samples" not in options.typed:
        setup = replace(setup, options=replace(options, num_samples=len(images)))
    log.info("from the noise of %d images of %s (%s)", len(images), options.invert, images.about)
    request = Request("", setup.options.num_samples, options.seed, labels, conditions)
    inverted = {"images": images.identity(), "calls": len(setup.chain.nodes) - 1}
    job = setup.job(request, "samples", inverted=inverted)
    source = images.records.root
    if storage.same_folder(source if storage.isdir(source) else os.path.dirname(source), job.out):
        raise ValueError(
            f"--out {job.out} holds the images of --invert; give another folder, as files there would be written over"
        )
    setup.make([job], job.out, stop)


def make_all(entries: Sequence[Entry], options: Sampling, world: World, stop: Stop) -> None:
    """Make the images of all requests, each request in a folder of its own. Called on every process."""
    from ..sampling.jobs import Request

    entries = world.broadcast_object(entries, name="requests")
    setup = making.Setup.read(options, world)
    # Check the classes of all requests before anything is made.
    plans = [setup.labels(entry.options, f"{entry.where}: classes") for entry in entries]
    # A job for all requests finds the batch size and the folder; each request's job is a copy with its own values.
    total = sum(entry.options.num_samples for entry in entries)
    shared = setup.job(Request(f"{len(entries)} requests", total), "requests")
    jobs = []
    for entry, labels in zip(entries, plans):
        request = Request(entry.name, entry.options.num_samples, entry.options.seed, labels)
        config = {**shared.config, **entry.flags(), "classes": ",".join(map(str, labels.classes))}
        jobs.append(replace(shared, request=request, out=storage.join(shared.out, entry.name), config=config))
    if world.is_main:
        resolved = [{"name": entry.name, **entry.flags()} for entry in entries]
        storage.write_json_atomic(storage.join(shared.out, "requests.json"), resolved)
    saving = setup.make(jobs, shared.out, stop)
    log.info("%s", saving if saving.images else f"all {len(jobs)} requests are there already")


def read_requests(path: str, options: Sampling) -> tuple[Entry, ...]:
    """Read a file of requests: a JSON list, or one JSON object per line. Missing fields have the values of the flags.

    ValueError naming file, line (in a list: entry) and field.
    """
    from ..sampling.requests import objects

    entries: dict[str, Entry] = {}
    for number, (where, value) in enumerate(objects(path), start=1):
        entry = _entry(value, f"{number:04d}", f"--requests {path}, {where}", options)
        key = entry.name.casefold()  # for some file systems Cats and cats are the same folder
        if key in entries:
            raise ValueError(
                f"{entry.where}: name {entry.name!r} is already used in {entries[key].where.rpartition(', ')[2]}"
            )
        entries[key] = entry
    if not entries:
        raise ValueError(f"--requests {path} holds no requests; write one JSON object per line, or a list of them")
    return tuple(entries.values())


def _entry(value: Any, name: str, where: str, options: Sampling) -> Entry:
    """The request of a JSON value, checked like the flags of the same names. name: its name if the value has none."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; a request is an object such as {{'name': 'cats', 'num_samples': 3}}")
    for key in value:
        if key in SampleConfig.names() and key not in FIELDS:
            raise ValueError(f"{where}: {key} is one for all requests; give it as --{key}")
        if key not in FIELDS:
            raise ValueError(f"{where}: a request has no {key!r}{near(key, FIELDS)}; it has {', '.join(FIELDS)}")
    if "num_samples" not in value and "num_samples" not in options.typed:
        raise ValueError(f"{where} has no num_samples; write it there, or give --num_samples for all that have none")
    name = value.get("name", name)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}: name is {name!r}; it becomes the name of a folder: text of up to 100 letters, digits, - and _"
        )
    values = {key: value[key] for key in ("seed", "num_samples", "labels") if key in value}
    classes = value.get("classes", options.classes)  # 7, "3,7", [3, "cat"]
    words = classes if isinstance(classes, list) else [classes]
    if not words or any(isinstance(word, bool) or not isinstance(word, (int, str)) for word in words):
        raise ValueError(f'{where}: classes is {classes!r}; write 7, "3,7", or a list of numbers or names')
    try:
        return Entry(name, where, replace(options, **values, classes=",".join(map(str, words))).validate())
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('--')}") from None
