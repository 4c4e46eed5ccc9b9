"""Sampling to files, with a sampler that is a known function of its noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import chain
from torch import Tensor

from guided_diffusion.runtime.world import World
from guided_diffusion.sampling import generate as g
from guided_diffusion.sampling import writers


def to_uint8(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def job(out: Path, **changes: Any) -> g.Job:
    settings: dict[str, Any] = {"num_samples": 11, "shape": (3, 4, 6), "batch_size": 4, "seed": 5, "to_uint8": to_uint8}
    return g.Job(out=str(out), **{**settings, **changes})


def quiet(_: str) -> None:
    return None


def run(job: g.Job, **options: Any) -> dict[str, np.ndarray]:
    path = g.generate(chain, job, tell=options.pop("tell", quiet), progress=False, **options)
    with np.load(path) as found:
        return dict(found)


def test_npz_is_the_2021_layout(tmp_path: Path) -> None:
    found = run(job(tmp_path, labels=g.LabelPlan((3, 7), seed=5)))
    assert sorted(p.name for p in tmp_path.glob("*.npz")) == ["samples_11x4x6x3.npz"]
    assert found["arr_0"].shape == (11, 4, 6, 3) and found["arr_0"].dtype == np.uint8
    assert found["arr_1"].shape == (11,) and set(found["arr_1"]) <= {3, 7}
    assert sorted(run(job(tmp_path))) == ["arr_0"]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
def test_image_i_does_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    labels = g.LabelPlan(tuple(range(10)), seed=5)
    reference = run(job(tmp_path / "a", labels=labels))
    other = run(job(tmp_path / "b", labels=labels, batch_size=batch_size, num_samples=9))
    np.testing.assert_array_equal(other["arr_0"], reference["arr_0"][:9])
    np.testing.assert_array_equal(other["arr_1"], reference["arr_1"][:9])


def test_seeds_and_images_differ(tmp_path: Path) -> None:
    one, two = run(job(tmp_path / "a"))["arr_0"], run(job(tmp_path / "b", seed=6))["arr_0"]
    assert len({image.tobytes() for image in np.concatenate([one, two])}) == 22


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (1, 3), (3, 2)])
def test_a_killed_job_goes_on_with_any_number_of_processes(tmp_path: Path, ranks: int, batch_size: int) -> None:
    reference = run(job(tmp_path / "whole"))["arr_0"]
    calls = []

    def dies(noise: Tensor, randn_like: Any, cond: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return chain(noise, randn_like, cond)

    with pytest.raises(KeyboardInterrupt):
        g.generate(dies, job(tmp_path / "cut"), tell=quiet, progress=False)
    assert not list((tmp_path / "cut").glob("*.npz"))

    # Several ranks, played one after another: each makes its batches; the last call finds everything done.
    goes_on = job(tmp_path / "cut", batch_size=batch_size)
    todo = g.prepare(goes_on, quiet)
    assert todo == list(range(4, 11))
    batches = g._groups(todo, batch_size)
    for rank in range(1, ranks):
        for batch in batches[rank::ranks]:
            g.make_batch(chain, goes_on, batch, torch.device("cpu"))
    told: list[str] = []
    found = run(goes_on, tell=told.append)
    np.testing.assert_array_equal(found["arr_0"], reference)
    assert "are there already" in told[0]
    assert not list((tmp_path / "cut" / g.PARTS).iterdir())


def test_stopping_on_request_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(g.Interrupted, match="4 of 11 images"):
        g.generate(chain, job(tmp_path), tell=quiet, progress=False, should_stop=lambda: True)
    assert run(job(tmp_path))["arr_0"].shape[0] == 11


def test_other_settings_in_the_same_folder_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(g.Interrupted):
        g.generate(chain, job(tmp_path, receipt={"scale": 1.0}), tell=quiet, progress=False, should_stop=lambda: True)
    with pytest.raises(ValueError, match=r"scale was 1.0 and is 2.0.*Give another folder"):
        run(job(tmp_path, receipt={"scale": 2.0}))


def test_the_last_batch_is_filled_up(tmp_path: Path) -> None:
    sizes = []

    def notes(noise: Tensor, randn_like: Any, cond: dict[str, Tensor]) -> Tensor:
        sizes.append(len(noise))
        return chain(noise, randn_like, cond)

    g.generate(notes, job(tmp_path), tell=quiet, progress=False)
    assert sizes == [4, 4, 4]


def test_balanced_labels_are_dealt_evenly_and_drawn_ones_nearly() -> None:
    dealt = g.LabelPlan((2, 5, 9), balanced=True).of(range(30))
    assert dealt is not None and np.bincount(dealt)[[2, 5, 9]].tolist() == [10, 10, 10]
    drawn = g.LabelPlan(tuple(range(10)), seed=1).of(range(10000))
    assert drawn is not None
    assert np.abs(np.bincount(drawn) - 1000).max() < 5 * np.sqrt(900)  # five standard deviations of a binomial
    assert g.LabelPlan().of(range(3)) is None


def test_conditions_follow_the_image_number(tmp_path: Path) -> None:
    def sample(noise: Tensor, _: Any, cond: dict[str, Tensor]) -> Tensor:
        return cond["number"].reshape(-1, 1, 1, 1).expand_as(noise) / 127.5 - 1 + 1e-3

    by_number = job(tmp_path, conditions=lambda ids: {"number": torch.tensor(ids, dtype=torch.float32)}, batch_size=3)
    with np.load(g.generate(sample, by_number, tell=quiet, progress=False)) as found:
        assert found["arr_0"][:, 0, 0, 0].tolist() == list(range(11))


def test_receipt_tells_file_and_hash(tmp_path: Path) -> None:
    import hashlib

    path = g.generate(chain, job(tmp_path, receipt={"weights": "abc"}), tell=quiet, progress=False)
    told = json.loads((tmp_path / g.RECEIPT).read_text())
    assert told["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert told["settings"]["weights"] == "abc" and told["settings"]["seed"] == 5


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_picture_shows_every_channel_count(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    writers.write_grid(str(tmp_path / "grid.png"), np.zeros((5, 8, 8, channels), np.uint8), ["a"] * 5)
    assert Image.open(tmp_path / "grid.png").size == (3 * 66 + 2, 2 * 78 + 2)


def test_npz_of_wrong_length_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 images instead of 4"):
        writers.write_npz(str(tmp_path / "x.npz"), [np.zeros((3, 2, 2, 1), np.uint8)], (4, 2, 2, 1))
    assert list(tmp_path.iterdir()) == []


def test_writing_an_npz_reads_one_part_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    parts = (np.full((10, 64, 64, 3), k, np.uint8) for k in range(100))
    tracemalloc.start()
    writers.write_npz(str(tmp_path / "x.npz"), parts, (1000, 64, 64, 3), np.arange(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < 1000 * 64 * 64 * 3
    with np.load(tmp_path / "x.npz") as found:
        assert found["arr_0"][995, 0, 0, 0] == 99 and found["arr_1"][995] == 995


def test_world_of_one_is_the_default(tmp_path: Path) -> None:
    np.testing.assert_array_equal(run(job(tmp_path / "a"))["arr_0"], run(job(tmp_path / "b"), world=World())["arr_0"])
