"""Jobs and requests share batches; every image is a function of its seed and number alone, whoever shares its batch or is killed."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
from guided_diffusion.sampling import jobs as j
from guided_diffusion.sampling import queue as q
from guided_diffusion.sampling.guiding import classifier
from guided_diffusion.sampling.pipeline import make_pipeline
from guided_diffusion.weights.load import Loaded

SHAPE = (3, 4, 6)


@dataclass
class Counted:
    """`chain` that notes the size of each batch; `dies_at` ends the job in that batch."""

    sizes: list[int] = field(default_factory=list)
    dies_at: int = 0

    def __call__(self, noise: Tensor, fresh: Any, cond: dict[str, Tensor]) -> Tensor:
        self.sizes.append(len(noise))
        if len(self.sizes) == self.dies_at:
            raise KeyboardInterrupt
        return chain(noise, fresh, cond)


def request(name: str, count: int, seed: int, *classes: int, balanced: bool = False) -> j.Request:
    return j.Request(name, count, seed, j.LabelPlan(classes or tuple(range(10)), balanced, seed))


REQUESTS = (
    request("sevens", 3, 5, 7),
    request("one", 1, 9, 2),
    request("mixed", 10, 1),
    request("same_seed", 2, 5, 7),
    request("dealt", 6, 2, 3, 4, balanced=True),
)
ONE = j.Request("", 11, 5)


def job(out: Path, one: j.Request = ONE, batch_size: int = 4, **changes: Any) -> j.Job:
    return j.Job(one, str(out), **{"shape": SHAPE, "batch_size": batch_size, **changes})


def made(one: j.Job, pipeline: q.Pipeline = chain, **options: Any) -> dict[str, np.ndarray]:
    """The npz of a job by itself."""
    with np.load(q.generate(pipeline, one, progress=False, **options)) as found:
        return dict(found)


def together(out: Path, pipeline: q.Pipeline = chain, requests: Any = REQUESTS, **options: Any) -> q.Saving:
    jobs = [job(out / one.name, one) for one in requests]
    return q.generate_all(pipeline, jobs, str(out), progress=False, **options)


def answered(*requests: j.Request, batch_size: int = 4, pipeline: q.Pipeline = chain, **options: Any) -> list[q.Answer]:
    return list(q.answers(pipeline, requests, **{"shape": SHAPE, "batch_size": batch_size, **options}))


# ---------------------------------------------------------------------------------------------------------------------
# Batches and answers in memory


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7))
def test_batches_are_full_and_hold_every_image_once_in_turn(counts: list[int], size: int) -> None:
    requests = [request(str(k), count, k) for k, count in enumerate(counts)]
    places = [q.Place(one, i) for one in requests for i in range(one.num_samples)]
    batches = list(q.pack(iter(places), size))
    assert [place for batch in batches for place in batch if place.wanted] == places
    assert {len(batch) for batch in batches} == {size} and len(batches) == -(-len(places) // size)


@given(st.sets(st.integers(0, 20), min_size=1), st.integers(1, 7))
def test_an_image_has_its_place_in_a_batch_wherever_a_job_goes_on(missing: set[int], size: int) -> None:
    batches = list(q.in_place(request("r", 21, 0), sorted(missing), size))
    wanted = [(place.image, k) for batch in batches for k, place in enumerate(batch) if place.wanted]
    assert wanted == [(i, i % size) for i in sorted(missing)] and {len(batch) for batch in batches} == {size}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_a_request_gets_the_images_it_would_have_got_alone(tmp_path: Path, batch_size: int) -> None:
    found = answered(*REQUESTS, batch_size=batch_size)
    assert [answer.request for answer in found] == list(REQUESTS)
    for answer in found:
        expected = made(job(tmp_path / answer.request.name, answer.request))
        np.testing.assert_array_equal(answer.images, expected["arr_0"])
        np.testing.assert_array_equal(answer.labels, expected["arr_1"])
    np.testing.assert_array_equal(found[3].images, found[0].images[:2])  # the same seed, fewer images


def test_company_does_not_matter() -> None:
    reference = answered(REQUESTS[2])[0].images
    for others in (REQUESTS[:2], REQUESTS[3:], (request("long", 17, 8),)):
        before, after = answered(*others, REQUESTS[2]), answered(REQUESTS[2], *others)
        np.testing.assert_array_equal(before[-1].images, reference)
        np.testing.assert_array_equal(after[0].images, reference)


def test_answers_come_early_and_no_request_is_taken_before_its_batch() -> None:
    taken: list[int] = []

    def endless() -> Iterator[j.Request]:
        while True:
            taken.append(len(taken))
            yield request(str(len(taken)), 3, len(taken))

    counted = Counted()
    found = q.answers(counted, endless(), shape=SHAPE, batch_size=4)
    for wanted, calls, most in ((1, 1, 2), (2, 2, 3), (3, 3, 4), (4, 3, 4), (5, 4, 6)):
        assert next(found).request.name == str(wanted)
        assert len(counted.sizes) == calls and len(taken) <= most


def test_networks_without_classes() -> None:
    plain = [j.Request("a", 2, 1), j.Request("b", 3, 2)]
    assert [answer.labels for answer in answered(*plain)] == [None, None]
    with pytest.raises(ValueError, match="'a' names no classes and others of its batch do"):
        answered(plain[0], REQUESTS[0])


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="request 'none' asks for 0 images"):
        j.Request("none", 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        answered(REQUESTS[0], batch_size=0)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_guided_networks_make_the_same_images_in_company(tmp_path: Path, sampler: str) -> None:
    shape = small(num_channels=32, image_size=16)
    process = respace(build.build_process(shape.diffusion), space_timesteps(1000, "5"))
    nets = generator(shape).requires_grad_(False), critic(shape).requires_grad_(False)
    configs = shape.config, RunConfig(model=shape.classifier, diffusion=shape.diffusion)
    model, guide = (Loaded(net, process, config, "") for net, config in zip(nets, configs))
    pipeline = make_pipeline(model, guidance=classifier(guide, scale=2.0), sampler=sampler)
    requests = request("first", 3, 5, 7), request("second", 4, 6)

    found = answered(*requests, pipeline=pipeline, shape=(3, 16, 16))
    alone = [job(tmp_path / one.name, one, shape=(3, 16, 16)) for one in requests]
    expected = [made(each, pipeline)["arr_0"].astype(int) for each in alone]
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
    found = []
    for graphs in (False, True):
        pipeline = make_pipeline(model, sampler="ddim", graphs=graphs)
        answers = answered(*REQUESTS, pipeline=pipeline, shape=(3, 16, 16), device="cuda")
        found.append(np.concatenate([answer.images for answer in answers]).astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# One job


def test_npz_is_the_2021_layout_and_the_receipt_has_its_hash(tmp_path: Path) -> None:
    one = job(tmp_path, replace(ONE, labels=j.LabelPlan((3, 7), seed=5)), receipt={"weights": "abc"})
    found = made(one)
    assert [p.name for p in tmp_path.glob("*.npz")] == ["samples_11x4x6x3.npz"]
    assert found["arr_0"].shape == (11, 4, 6, 3) and found["arr_0"].dtype == np.uint8
    assert found["arr_1"].shape == (11,) and set(found["arr_1"]) <= {3, 7}
    receipt = json.loads((tmp_path / j.RECEIPT).read_text())
    assert receipt["sha256"] == hashlib.sha256(Path(one.npz).read_bytes()).hexdigest()
    assert receipt["settings"]["weights"] == "abc" and receipt["settings"]["seed"] == 5
    assert sorted(made(job(tmp_path))) == ["arr_0"]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
def test_image_i_does_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    one = replace(ONE, labels=j.LabelPlan(tuple(range(10)), seed=5))
    reference, counted = made(job(tmp_path / "a", one)), Counted()
    other = made(job(tmp_path / "b", replace(one, num_samples=9), batch_size), counted)
    np.testing.assert_array_equal(other["arr_0"], reference["arr_0"][:9])
    np.testing.assert_array_equal(other["arr_1"], reference["arr_1"][:9])
    assert counted.sizes == [batch_size] * -(-9 // batch_size)  # shapes never change


def test_seeds_and_images_differ(tmp_path: Path) -> None:
    one, two = made(job(tmp_path / "a"))["arr_0"], made(job(tmp_path / "b", replace(ONE, seed=6)))["arr_0"]
    assert len({image.tobytes() for image in np.concatenate([one, two])}) == 22


@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_killed_job_goes_on(tmp_path: Path, batch_size: int, caplog: pytest.LogCaptureFixture) -> None:
    reference = made(job(tmp_path / "whole"))["arr_0"]
    with pytest.raises(KeyboardInterrupt):
        made(job(tmp_path / "cut"), Counted(dies_at=2))
    assert not list((tmp_path / "cut").glob("*.npz"))
    goes_on = job(tmp_path / "cut", batch_size=batch_size)
    assert j.prepare(goes_on) == list(range(4, 11))
    with caplog.at_level("INFO", logger="guided_diffusion"):
        np.testing.assert_array_equal(made(goes_on)["arr_0"], reference)
    assert "4 of 11 images are there already" in caplog.text
    assert not list((tmp_path / "cut" / j.PARTS).iterdir())


def test_stopping_on_request_keeps_what_is_done_for_the_same_settings(tmp_path: Path) -> None:
    with pytest.raises(q.Interrupted, match="4 of 11 images"):
        made(job(tmp_path, receipt={"scale": 1.0}), should_stop=lambda: True)
    with pytest.raises(ValueError, match=r"scale was 1.0 and is 2.0.*Give another folder"):
        made(job(tmp_path, receipt={"scale": 2.0}))
    counted = Counted()
    assert made(job(tmp_path, receipt={"scale": 1.0}), counted)["arr_0"].shape[0] == 11 and len(counted.sizes) == 2


def test_labels_are_dealt_drawn_or_given() -> None:
    dealt = j.LabelPlan((2, 5, 9), balanced=True).of(range(30))
    assert dealt is not None and np.bincount(dealt)[[2, 5, 9]].tolist() == [10, 10, 10]
    drawn = j.LabelPlan(tuple(range(10)), seed=1).of(range(10000))
    assert drawn is not None
    assert np.abs(np.bincount(drawn) - 1000).max() < 5 * np.sqrt(900)  # five standard deviations of a binomial
    fixed = j.LabelPlan.fixed([4, 1, 4]).of([0, 1, 2, 3, 7])
    assert fixed is not None and fixed.tolist() == [4, 1, 4, 4, 1]
    assert j.LabelPlan().of(range(3)) is None


def test_conditions_follow_the_image_number(tmp_path: Path) -> None:
    def numbered(noise: Tensor, _: Any, cond: dict[str, Tensor]) -> Tensor:
        return cond["number"].reshape(-1, 1, 1, 1).expand_as(noise) / 127.5 - 1 + 1e-3

    one = replace(ONE, conditions=lambda ids: {"number": torch.tensor(ids, dtype=torch.float32)})
    found = made(job(tmp_path, one, batch_size=3), numbered)
    assert found["arr_0"][:, 0, 0, 0].tolist() == list(range(11))


# ---------------------------------------------------------------------------------------------------------------------
# Many requests into folders


def assert_same_files(found: Path, expected: Path) -> None:
    """Every npz byte for byte, pictures and receipts likewise, and nothing left over."""
    assert {p.name for p in found.iterdir() if p.is_dir()} == {p.name for p in expected.iterdir() if p.is_dir()}
    for folder in (p for p in expected.iterdir() if p.is_dir()):
        twin = found / folder.name
        names = {p.name for p in folder.iterdir()}
        assert {p.name for p in twin.iterdir()} | {j.LOCK} == names | {j.LOCK}
        for name in (p for p in names if p.endswith((".npz", ".png"))):
            assert (twin / name).read_bytes() == (folder / name).read_bytes()
        receipts = [json.loads((place / j.RECEIPT).read_text()) for place in (folder, twin)]
        assert receipts[0]["settings"] == receipts[1]["settings"] and receipts[0]["sha256"] == receipts[1]["sha256"]
        assert not list((twin / j.PARTS).iterdir())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `generate` makes of each request by itself."""
    root = tmp_path_factory.mktemp("expected")
    for one in REQUESTS:
        made(job(root / one.name, one))
    return root


def test_folders_are_those_of_generate_and_nothing_is_made_twice(tmp_path: Path, expected: Path) -> None:
    assert together(tmp_path, requests=REQUESTS[:3]).requests == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npz")}
    counted = Counted()
    assert together(tmp_path, counted).requests == 2 and counted.sizes == [4, 4]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same_files(tmp_path, expected)
    assert together(tmp_path, Counted(dies_at=1)) == q.Saving(0, 0, 0, 0)
    made(job(tmp_path / "mixed", REQUESTS[2]), Counted(dies_at=1))  # finished for `generate`, too


@pytest.mark.parametrize("dies_at", [1, 2, 4, 6])
def test_killed_requests_make_only_what_is_missing(tmp_path: Path, expected: Path, dies_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        together(tmp_path / "out", Counted(dies_at=dies_at))
    counted = Counted()
    together(tmp_path / "out", counted)
    assert len(counted.sizes) == 6 - (dies_at - 1)
    assert_same_files(tmp_path / "out", expected)


def test_one_job_and_many_complete_what_the_other_began(tmp_path: Path, expected: Path) -> None:
    mixed = REQUESTS[2]
    with pytest.raises(KeyboardInterrupt):
        made(job(tmp_path / "a" / "mixed", mixed), Counted(dies_at=2))
    assert together(tmp_path / "a").images == 22 - 4
    assert_same_files(tmp_path / "a", expected)
    with pytest.raises(KeyboardInterrupt):
        together(tmp_path / "b", Counted(dies_at=3))  # four of ten images of "mixed" are there
    counted = Counted()
    found = made(job(tmp_path / "b" / "mixed", mixed), counted)
    assert len(counted.sizes) == 2  # numbers 4 to 7, 8 and 9
    with np.load(next((expected / "mixed").glob("*.npz"))) as wanted:
        np.testing.assert_array_equal(found["arr_0"], wanted["arr_0"])


def test_killed_before_the_npz_was_put_together(
    tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(_: j.Job) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(q, "assemble", dies)
        together(tmp_path, requests=REQUESTS[:1])
    assert together(tmp_path, Counted(dies_at=1), requests=REQUESTS[:1]).images == 0
    found, wanted = (next((root / "sevens").glob("*.npz")).read_bytes() for root in (tmp_path, expected))
    assert found == wanted


def test_files_are_written_as_soon_as_their_last_image_is_made(tmp_path: Path) -> None:
    there: list[int] = []

    def looks(noise: Tensor, fresh: Any, cond: dict[str, Tensor]) -> Tensor:
        there.append(len(list(tmp_path.glob("*/*.npz"))))
        return chain(noise, fresh, cond)

    together(tmp_path, looks)
    assert there == [0, 2, 2, 2, 4, 4]  # last images at 3, 4, 14, 16, 22 of batches of 4


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
    """(what `generate_all` returns on each rank, or the error; batches each rank computed)."""
    meeting, counted = Meeting(size), [Counted() for _ in range(size)]

    def work(rank: int) -> Any:
        try:
            return together(out, counted[rank], world=Together(rank=rank, size=size, meeting=meeting), **options)
        except (ValueError, q.Interrupted) as error:
            return str(error)

    with ThreadPoolExecutor(size) as pool:
        answers = list(pool.map(work, range(size)))
    return answers, [len(each.sizes) for each in counted]


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_batches_are_dealt_to_processes(tmp_path: Path, expected: Path, size: int) -> None:
    answers, calls = on_ranks(size, tmp_path / "out")
    assert set(answers) == {q.Saving(requests=5, images=22, batches=6, alone=8)}
    assert str(answers[0]) == "5 requests, 22 images in 6 batches instead of 8"
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
        together(tmp_path, Counted(dies_at=3))
    answers, calls = on_ranks(2, tmp_path, requests=[request("mixed", 10, 4)])
    assert calls == [0, 0] and all("seed was 1 and is 4" in answer for answer in answers)


def test_two_requests_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two requests are called 'one'"):
        together(tmp_path, requests=[*REQUESTS, request("one", 3, 3)])


def test_a_second_job_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_LOCK_WAIT_S", 0.1)

    def meets(noise: Tensor, fresh: Any, cond: dict[str, Tensor]) -> Tensor:
        with pytest.raises(ValueError, match="another job writes to"):
            together(tmp_path)
        return chain(noise, fresh, cond)

    together(tmp_path, meets, requests=REQUESTS[:1])
    assert [path.parent.name for path in tmp_path.glob("*/*.npz")] == ["sevens"]
