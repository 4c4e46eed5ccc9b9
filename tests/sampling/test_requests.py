"""Requests share batches and get the images they would have got alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import chain
from guided_pair import critic, generator, small
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guided_diffusion import build
from guided_diffusion.config import RunConfig
from guided_diffusion.diffusion.process import respace, space_timesteps
from guided_diffusion.runtime import storage
from guided_diffusion.runtime.world import World
from guided_diffusion.sampling import generate as g
from guided_diffusion.sampling import requests as r
from guided_diffusion.sampling.pipeline import build_sample
from guided_diffusion.weights.load import Loaded

SHAPE = (3, 4, 6)


@dataclass
class Counted:
    """`chain` that notes the size of each batch; `dies_at` ends the job in that batch."""

    sizes: list[int] = field(default_factory=list)
    dies_at: int = 0

    def __call__(self, noise: Tensor, randn_like: Any, cond: dict[str, Tensor]) -> Tensor:
        self.sizes.append(len(noise))
        if len(self.sizes) == self.dies_at:
            raise KeyboardInterrupt
        return chain(noise, randn_like, cond)


def to_uint8(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def quiet(_: str) -> None:
    return None


def request(name: str, count: int, seed: int, *classes: int, balanced: bool = False) -> r.Request:
    return r.Request(name, count, seed, g.LabelPlan(classes or tuple(range(10)), balanced, seed))


REQUESTS = (
    request("sevens", 3, 5, 7),
    request("one", 1, 9, 2),
    request("mixed", 10, 1),
    request("same_seed", 2, 5, 7),
    request("dealt", 6, 2, 3, 4, balanced=True),
)


def job(out: Path, batch_size: int = 4, **changes: Any) -> g.Job:
    settings: dict[str, Any] = {"num_samples": 1, "shape": SHAPE, "batch_size": batch_size, "to_uint8": to_uint8}
    return g.Job(out=str(out), **{**settings, **changes})


def alone(out: Path, one: r.Request, batch_size: int = 4, sample: g.Sample = chain, **options: Any) -> dict[str, Any]:
    """What `generate` makes of a request by itself."""
    settings = {"num_samples": one.num_samples, "seed": one.seed, "labels": one.labels}
    path = g.generate(sample, job(out / one.name, batch_size, **settings, **options), tell=quiet, progress=False)
    with np.load(path) as found:
        return dict(found)


def answered(*requests: r.Request, batch_size: int = 4, sample: g.Sample = chain, **options: Any) -> list[r.Answer]:
    settings = {"shape": SHAPE, "to_uint8": to_uint8, **options}
    return list(r.answers(sample, requests, batch_size=batch_size, **settings))


def fulfil(out: Path, sample: g.Sample = chain, requests: Any = REQUESTS, **options: Any) -> r.Saving:
    tell = options.pop("tell", quiet)
    job_options = options.pop("job", {})
    return r.fulfil(sample, job(out, **job_options), requests, tell=tell, progress=False, **options)


# ---------------------------------------------------------------------------------------------------------------------
# In memory


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7))
def test_batches_are_full_and_hold_every_image_once_in_turn(counts: list[int], size: int) -> None:
    requests = [request(str(k), count, k) for k, count in enumerate(counts)]
    rows = [r.Row(one, i) for one in requests for i in range(one.num_samples)]
    batches = list(r.pack(iter(rows), size))
    assert [row for batch in batches for row in batch] == rows
    assert {len(batch) for batch in batches[:-1]} <= {size} and 1 <= len(batches[-1]) <= size
    told = r.saving(counts, size)
    assert told.batches == len(batches) and told.images == len(rows) and told.requests == len(counts)
    assert told.alone == sum(
        len(list(r.pack([r.Row(one, i) for i in range(one.num_samples)], size))) for one in requests
    )


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_a_request_gets_the_images_it_would_have_got_alone(tmp_path: Path, batch_size: int) -> None:
    found = answered(*REQUESTS, batch_size=batch_size)
    assert [answer.request for answer in found] == list(REQUESTS)
    for answer in found:
        expected = alone(tmp_path, answer.request)
        np.testing.assert_array_equal(answer.images, expected["arr_0"])
        np.testing.assert_array_equal(answer.labels, expected["arr_1"])
    np.testing.assert_array_equal(found[3].images, found[0].images[:2])  # the same seed, fewer images


def test_company_does_not_matter() -> None:
    reference = answered(REQUESTS[2])[0].images
    for others in (REQUESTS[:2], REQUESTS[3:], (request("long", 17, 8),)):
        before, after = answered(*others, REQUESTS[2]), answered(REQUESTS[2], *others)
        np.testing.assert_array_equal(before[-1].images, reference)
        np.testing.assert_array_equal(after[0].images, reference)


def test_shapes_never_change_and_batches_are_as_few_as_can_be() -> None:
    counted = Counted()
    answered(*REQUESTS, sample=counted)
    assert counted.sizes == [4] * 6  # 22 images
    assert str(r.saving([3, 1, 10, 2, 6], 4)) == "5 requests, 22 images in 6 batches instead of 8"


def test_answers_come_early_and_no_request_is_taken_before_its_batch() -> None:
    taken: list[int] = []

    def endless() -> Iterator[r.Request]:
        while True:
            taken.append(len(taken))
            yield request(str(len(taken)), 3, len(taken))

    counted = Counted()
    found = r.answers(counted, endless(), shape=SHAPE, batch_size=4, to_uint8=to_uint8)
    for wanted, calls, most in ((1, 1, 2), (2, 2, 3), (3, 3, 4), (4, 3, 4), (5, 4, 6)):
        assert next(found).request.name == str(wanted)
        assert len(counted.sizes) == calls and len(taken) <= most


def test_networks_without_classes() -> None:
    plain = [r.Request("a", 2, 1), r.Request("b", 3, 2)]
    assert [answer.labels for answer in answered(*plain)] == [None, None]
    with pytest.raises(ValueError, match="'a' names no classes and others of its batch do"):
        answered(plain[0], REQUESTS[0])


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="request 'none' asks for 0 images"):
        r.Request("none", 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        answered(REQUESTS[0], batch_size=0)


@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_guided_networks_make_the_same_images_in_company(tmp_path: Path, method: str) -> None:
    shape = small(num_channels=32, image_size=16)
    process = respace(build.build_process(shape.diffusion), space_timesteps(1000, "5"))
    nets = generator(shape).requires_grad_(False), critic(shape).requires_grad_(False)
    configs = shape.config, RunConfig(model=shape.classifier, diffusion=shape.diffusion)
    model, guide = (Loaded(net, process, config, "") for net, config in zip(nets, configs))
    sample = build_sample(model, process, critic=guide, scale=2.0, method=method)
    requests = request("first", 3, 5, 7), request("second", 4, 6)

    found = answered(*requests, batch_size=4, sample=sample, shape=(3, 16, 16))
    expected = [alone(tmp_path, one, 4, sample, shape=(3, 16, 16))["arr_0"].astype(int) for one in requests]
    # The same batch size and the same places: the same to the last bit. The second's images have other places.
    np.testing.assert_array_equal(found[0].images, expected[0])
    difference = np.abs(found[1].images.astype(int) - expected[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02
    assert (found[0].images[:3] != found[1].images[:3]).mean() > 0.5


@pytest.mark.gpu
def test_recorded_steps_serve_all_requests() -> None:
    shape = small(num_channels=32, image_size=16)
    process = respace(build.build_process(shape.diffusion), space_timesteps(1000, "5")).to("cuda")
    model = Loaded(generator(shape, "cuda").requires_grad_(False), process, shape.config, "")
    made = []
    for graphs in (False, True):
        sample = build_sample(model, process, method="ddim", graphs=graphs)
        found = answered(*REQUESTS, sample=sample, shape=(3, 16, 16), device="cuda")
        made.append(np.concatenate([answer.images for answer in found]).astype(int))
    assert np.abs(made[0] - made[1]).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Into folders


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.parent.name: np.load(path)["arr_0"] for path in sorted(folder.glob("*/samples_*.npz"))}


def assert_same_files(found: Path, expected: Path) -> None:
    """Every npz byte for byte, pictures and receipts likewise, and nothing left over."""
    assert {p.name for p in found.iterdir() if p.is_dir()} == {p.name for p in expected.iterdir() if p.is_dir()}
    for folder in (p for p in expected.iterdir() if p.is_dir()):
        twin = found / folder.name
        names = {p.name for p in folder.iterdir()}
        assert {p.name for p in twin.iterdir()} | {g.LOCK} == names | {g.LOCK}
        for name in (p for p in names if p.endswith((".npz", ".png"))):
            assert (twin / name).read_bytes() == (folder / name).read_bytes()
        receipts = [json.loads((place / g.RECEIPT).read_text()) for place in (folder, twin)]
        assert receipts[0]["settings"] == receipts[1]["settings"] and receipts[0]["sha256"] == receipts[1]["sha256"]
        assert not list((twin / g.PARTS).iterdir())


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    for one in REQUESTS:
        alone(tmp_path / "expected", one)
    return tmp_path / "expected"


def test_folders_are_those_of_generate(tmp_path: Path, expected: Path) -> None:
    done = fulfil(tmp_path / "out")
    assert done == r.Saving(requests=5, images=22, batches=6, alone=8)
    assert_same_files(tmp_path / "out", expected)
    told: list[str] = []
    settings = {"num_samples": 10, "seed": 1, "labels": REQUESTS[2].labels}
    g.generate(Counted(dies_at=1), job(tmp_path / "out" / "mixed", **settings), tell=told.append, progress=False)
    assert "is there already, with these settings" in told[0]


def test_nothing_is_made_twice(tmp_path: Path) -> None:
    fulfil(tmp_path, requests=REQUESTS[:3])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npz")}
    counted = Counted()
    done = fulfil(tmp_path, counted)
    assert done.requests == 2 and counted.sizes == [4, 4]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert fulfil(tmp_path, Counted(dies_at=1)) == r.Saving(0, 0, 0, 0)


@pytest.mark.parametrize("dies_at", [1, 2, 4, 6])
def test_a_killed_job_makes_only_what_is_missing(tmp_path: Path, expected: Path, dies_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        fulfil(tmp_path / "out", Counted(dies_at=dies_at))
    counted = Counted()
    fulfil(tmp_path / "out", counted)
    assert len(counted.sizes) == 6 - (dies_at - 1)
    assert_same_files(tmp_path / "out", expected)


def test_a_job_begun_by_generate_is_completed(tmp_path: Path, expected: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        alone(tmp_path / "out", REQUESTS[2], sample=Counted(dies_at=2))
    assert fulfil(tmp_path / "out").images == 22 - 4
    assert_same_files(tmp_path / "out", expected)


def test_generate_completes_a_request_that_was_begun(tmp_path: Path, expected: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fulfil(tmp_path / "out", Counted(dies_at=3))  # four of ten images of "mixed" are there
    counted = Counted()
    found = alone(tmp_path / "out", REQUESTS[2], sample=counted)
    assert len(counted.sizes) == 2  # numbers 4 to 7, 8 and 9
    with np.load(next((expected / "mixed").glob("*.npz"))) as wanted:
        np.testing.assert_array_equal(found["arr_0"], wanted["arr_0"])


def test_killed_before_the_npz_was_put_together(
    tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(job: g.Job, tell: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(g, "assemble", dies)
        fulfil(tmp_path / "out", requests=REQUESTS[:1])
    assert fulfil(tmp_path / "out", Counted(dies_at=1), requests=REQUESTS[:1]).images == 0
    np.testing.assert_array_equal(pixels(tmp_path / "out")["sevens"], pixels(expected)["sevens"])


def test_files_are_written_as_soon_as_their_last_image_is_made(tmp_path: Path) -> None:
    there: list[int] = []

    def looks(noise: Tensor, randn_like: Any, cond: dict[str, Tensor]) -> Tensor:
        there.append(len(list(tmp_path.glob("*/*.npz"))))
        return chain(noise, randn_like, cond)

    fulfil(tmp_path, looks)
    assert there == [0, 2, 2, 2, 4, 4]  # last images at 3, 4, 14, 16, 22 of batches of 4


def test_stopping_on_request_tells_what_is_done_and_goes_on(tmp_path: Path, expected: Path) -> None:
    with pytest.raises(g.Interrupted, match="2 of 5 requests are in .*; the same command goes on"):
        fulfil(tmp_path / "out", should_stop=lambda: True)
    fulfil(tmp_path / "out")
    assert_same_files(tmp_path / "out", expected)


class Meeting:
    """Where processes, played by threads, hand each other values."""

    def __init__(self, size: int) -> None:
        self._all_are_here, self._brought = threading.Barrier(size, timeout=60), [None] * size

    def bring(self, rank: int, value: Any) -> list[Any]:
        self._brought[rank] = value
        self._all_are_here.wait()
        found = list(self._brought)
        self._all_are_here.wait()
        return found


@dataclass(frozen=True)
class Together(World):
    """One of several processes."""

    meeting: Any = None

    def broadcast_object(self, value: Any, src: int = 0, name: str = "") -> Any:
        return self.meeting.bring(self.rank, value)[src]

    def barrier(self, name: str = "") -> None:
        self.meeting.bring(self.rank, None)

    def any_true(self, flag: bool, name: str = "") -> bool:
        return any(self.meeting.bring(self.rank, flag))


def on_ranks(size: int, out: Path, **options: Any) -> tuple[list[Any], list[int]]:
    """(what `fulfil` answers on each rank, or the error; batches each rank computed)."""
    meeting, counted = Meeting(size), [Counted() for _ in range(size)]

    def work(rank: int) -> Any:
        try:
            return fulfil(out, counted[rank], world=Together(rank=rank, size=size, meeting=meeting), **options)
        except (ValueError, g.Interrupted) as error:
            return str(error)

    with ThreadPoolExecutor(size) as pool:
        answers = list(pool.map(work, range(size)))
    return answers, [len(each.sizes) for each in counted]


@pytest.mark.parametrize("size", [2, 4, 7])
def test_batches_are_dealt_to_processes(tmp_path: Path, expected: Path, size: int) -> None:
    answers, calls = on_ranks(size, tmp_path / "out")
    assert set(answers) == {r.Saving(requests=5, images=22, batches=6, alone=8)}
    assert calls == [len(range(rank, 6, size)) for rank in range(size)]
    assert_same_files(tmp_path / "out", expected)


def test_processes_stop_together_and_go_on_in_another_number(tmp_path: Path, expected: Path) -> None:
    answers, calls = on_ranks(2, tmp_path / "out", should_stop=lambda: True)
    assert calls == [1, 1] and len(set(answers)) == 1 and "2 of 5 requests are in" in answers[0]
    _, calls = on_ranks(3, tmp_path / "out")
    assert calls == [2, 1, 1]
    assert_same_files(tmp_path / "out", expected)


def test_all_processes_hear_of_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fulfil(tmp_path, Counted(dies_at=3))
    answers, calls = on_ranks(2, tmp_path, requests=[request("mixed", 10, 4)])
    assert calls == [0, 0] and all("seed was 1 and is 4" in answer for answer in answers)


def test_two_requests_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two requests are called 'one'"):
        fulfil(tmp_path, requests=[*REQUESTS, request("one", 3, 3)])


def test_other_settings_in_a_half_made_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fulfil(tmp_path, Counted(dies_at=3))
    with pytest.raises(ValueError, match="seed was 1 and is 4"):
        fulfil(tmp_path, requests=[request("mixed", 10, 4)])


def test_a_second_job_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_LOCK_WAIT_S", 0.1)

    def meets(noise: Tensor, randn_like: Any, cond: dict[str, Tensor]) -> Tensor:
        with pytest.raises(ValueError, match="another job writes to"):
            fulfil(tmp_path)
        return chain(noise, randn_like, cond)

    fulfil(tmp_path, meets, requests=REQUESTS[:1])
    assert list(pixels(tmp_path)) == ["sevens"]
