"""`sample --requests FILE`: many small requests in shared batches. The file is checked before any weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import SampleConfig
from . import making
from .arguments import Parsed, UsageError, near

if TYPE_CHECKING:
    from ..runtime.world import World
    from ..sampling.requests import Request

FIELDS = ("name", "seed", "num_samples", "classes", "labels")
_NAME = re.compile(r"[\w-]{1,100}")


@dataclass(frozen=True)
class Asked:
    """One request as it stands in the file, completed by the flags. `where` names its place, for complaints."""

    name: str
    seed: int
    num_samples: int
    classes: str
    labels: str
    where: str


def read(path: str, parsed: Parsed) -> tuple[Asked, ...]:
    """The requests of a JSON list, or of a file with one JSON object per line; what an object leaves open, the flags say.

    UsageError naming file, line (in a list: entry) and field.
    """
    from ..runtime import storage

    try:
        text = storage.read_bytes(path).decode("utf-8-sig")  # some editors begin a file with a mark
    except FileNotFoundError:
        raise FileNotFoundError(f"--requests {path}: there is no such file") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UsageError(f"--requests {path} is no text file: {error}") from None
    config = SampleConfig.from_flags(parsed.flags)
    counted = "num_samples" in parsed.typed
    asked: dict[str, Asked] = {}
    for number, (where, value) in enumerate(_objects(path, text), start=1):
        one = _asked(value, f"{number:04d}", f"--requests {path}, {where}", config, counted)
        key = one.name.casefold()  # some file systems hold Cats and cats for one folder
        if key in asked:
            raise UsageError(
                f"{one.where}: name {one.name!r} is that of {asked[key].where.rpartition(', ')[2]} already"
            )
        asked[key] = one
    if not asked:
        raise UsageError(f"--requests {path} holds no requests; write one JSON object per line, or a list of them")
    return tuple(asked.values())


def _objects(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """(place in words, value) of each entry."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UsageError(f"--requests {path} begins as a JSON list and is none: {error}") from None
        yield from ((f"entry {number}", value) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise UsageError(
                    f"--requests {path}, line {number} is no JSON ({error}); write one object per line, or a list"
                ) from None


def _asked(value: Any, name: str, where: str, config: SampleConfig, counted: bool) -> Asked:
    """One request, checked by the rules of the flags of the same names."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}; a request is an object such as {{'name': 'cats', 'num_samples': 3}}")
    for key in value:
        if key not in FIELDS:
            raise UsageError(f"{where}: {_foreign(key)}")
    if "num_samples" not in value and not counted:
        raise UsageError(f"{where} has no num_samples; write it there, or give --num_samples for all that have none")
    name = value.get("name", name)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{where}: name is {name!r}; it becomes the name of a folder: text of up to 100 letters, digits, - and _"
        )
    told = {key: value[key] for key in ("seed", "num_samples", "labels") if key in value}
    classes = _classes(value["classes"], where) if "classes" in value else config.classes
    try:
        config = replace(config, **told).validate()
    except ValueError as error:
        raise UsageError(f"{where}: {str(error).removeprefix('--')}") from None
    return Asked(name, config.seed, config.num_samples, classes, config.labels, where)


def _foreign(key: str) -> str:
    if key in SampleConfig.names():
        return f"{key} is one for all requests; give it as --{key}"
    return f"a request has no {key!r}{near(key, FIELDS)}; it has {', '.join(FIELDS)}"


def _classes(value: Any, where: str) -> str:
    """7, "3,7", [3, "cat"] -> as the flag --classes is written."""
    words: Sequence[Any] = value if isinstance(value, list) else [value]
    if not words or any(isinstance(word, bool) or not isinstance(word, (int, str)) for word in words):
        raise UsageError(f'{where}: classes is {value!r}; write 7, "3,7", or a list of numbers or names')
    return ",".join(str(word) for word in words)


def work(asked: Sequence[Asked], parsed: Parsed, world: World, stop: Any) -> str:
    """Make what is asked for; returns the folder, in which every request has one of its own. Called on every process."""
    from ..runtime import storage
    from ..sampling.requests import fulfil

    tell, asked = making.teller(world), world.broadcast_object(asked, name="requests")
    config = SampleConfig.from_flags(parsed.flags)
    pieces = making.prepare(parsed, config, "diffusion", world)
    requests = [_request(one, pieces) for one in asked]
    total = sum(one.num_samples for one in asked)
    job, chosen = making.job_of(parsed, replace(config, num_samples=total), pieces, world, "requests")
    what = making.what_is_made(config, pieces)
    tell(f"{len(asked)} requests, {total} {what}, into {job.out} ({chosen})")
    if world.is_main:
        understood = [{name: getattr(one, name) for name in FIELDS} for one in asked]
        storage.write_json_atomic(storage.join(job.out, "requests.json"), understood)
    done = fulfil(pieces.sample, job, requests, world=world, tell=tell, should_stop=lambda: stop.requested)
    tell(str(done) if done.images else f"all {len(asked)} requests are there already")
    return job.out


def _request(one: Asked, pieces: making.Pieces) -> Request:
    """With the classes that the networks know; ValueError naming the place of one that does not exist."""
    from ..sampling.generate import LabelPlan
    from ..sampling.requests import Request

    classes = making.choose_classes(one.classes, pieces.num_classes, pieces.names, f"{one.where}: classes")
    return Request(one.name, one.num_samples, one.seed, LabelPlan(classes, one.labels == "balanced", one.seed))
