"""The door resample: draws of NumPy's global state, learning from losses alone and among uneven processes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from guided_diffusion import resample

GOLDEN = Path(__file__).parent.parent / "golden"
EIGHT = SimpleNamespace(num_timesteps=8)


def test_relations_and_names():
    assert issubclass(resample.LossSecondMomentResampler, resample.LossAwareSampler)
    assert issubclass(resample.LossAwareSampler, resample.ScheduleSampler)
    assert issubclass(resample.UniformSampler, resample.ScheduleSampler)
    assert isinstance(resample.create_named_schedule_sampler("uniform", EIGHT), resample.UniformSampler)
    aware = resample.create_named_schedule_sampler(name="loss-second-moment", diffusion=EIGHT)
    assert isinstance(aware, resample.LossSecondMomentResampler)
    with pytest.raises(NotImplementedError, match="other"):
        resample.create_named_schedule_sampler("other", EIGHT)


def test_one_draw_of_numpy_choice():
    sampler = resample.UniformSampler(EIGHT)
    np.random.seed(5)
    indices, weights = sampler.sample(16, "cpu")
    np.random.seed(5)
    expected = np.random.choice(8, size=(16,), p=np.full(8, 1 / 8))
    assert indices.tolist() == expected.tolist() and indices.dtype == torch.int64
    assert torch.equal(weights, torch.ones(16)) and weights.dtype == torch.float32


def test_uneven_weights_are_made_up_for():
    class Odd(resample.ScheduleSampler):
        def weights(self):
            return np.array([1.0, 3.0])

    indices, weights = Odd().sample(64, "cpu")
    assert torch.equal(weights, torch.where(indices == 0, 2.0, 2 / 3))


def test_recorded_weights():
    case = json.loads((GOLDEN / "golden.json").read_text())["resample"]
    sampler = resample.LossSecondMomentResampler(EIGHT, case["history_per_term"], case["uniform_prob"])
    assert np.array_equal(sampler.weights(), np.ones(8))
    for steps, losses in case["updates"]:
        sampler.update_with_all_losses(steps, losses)
    np.testing.assert_allclose(sampler.weights(), np.load(GOLDEN / "golden.npz")["resample/weights"], rtol=1e-12)
    assert sampler._loss_counts.tolist() == [3] * 8 and sampler._loss_history.shape == (8, 3)


def test_alone_without_process_group():
    seen = []

    class Watched(resample.LossAwareSampler):
        def weights(self):
            return np.ones(8)

        def update_with_all_losses(self, ts, losses):
            seen.append((ts, losses))

    Watched().update_with_local_losses(torch.tensor([3, 1]), torch.tensor([0.5, 2.0], requires_grad=True))
    assert seen == [([3, 1], [0.5, 2.0])]


def _one_of_two(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sampler = resample.LossSecondMomentResampler(SimpleNamespace(num_timesteps=2), history_per_term=2)
    local = [(0, 1.0), (1, 2.0), (0, 3.0)] if rank == 0 else [(1, 5.0)]
    steps, losses = (torch.tensor(column) for column in zip(*local))
    sampler.update_with_local_losses(steps, losses)
    np.save(f"{out}{rank}.npy", sampler.weights())
    dist.destroy_process_group()


def test_two_processes_with_uneven_batches_learn_the_same(tmp_path):
    mp.spawn(_one_of_two, args=(str(tmp_path / "store"), str(tmp_path / "weights")), nprocs=2)
    first, second = (np.load(tmp_path / f"weights{rank}.npy") for rank in (0, 1))
    assert np.array_equal(first, second)
    moments = np.sqrt([(1 + 9) / 2, (4 + 25) / 2])
    np.testing.assert_allclose(first, 0.999 * moments / moments.sum() + 0.0005)
