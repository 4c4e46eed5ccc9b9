"""The short form of the fault injection; the long one is `python -m tests.reliability.faults --moments 20`."""

import os

import pytest

from . import workers
from .faults import disturb_sampling, make_images, run
from .jobs import Job

TINY = "--num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 --num_heads 2 --diffusion_steps 40".split()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs signals and forks")]


def test_killed_at_random_moments_and_continued(tmp_path):
    for tally in run(tmp_path, 2, steps=20, images=32, seed=7):
        assert tally.moments == 2 and tally.compared > 0
        assert tally.good(), "\n".join([tally.row(), *tally.differing, *tally.problems])


def test_upsampling_goes_on(tmp_path):
    data, model = make_images(tmp_path / "data"), tmp_path / "model"
    words = ["train-upsampler", "--data_dir", str(data), "--out", str(model), "--large_size", "8", "--small_size", "4"]
    job = Job(1, [[*words, "--max_steps", "2", "--batch_size", "4", "--progress", "False", *TINY]], tmp_path / "logs")
    assert job.wait() == [0], job.text()

    def upsample(out):
        words = ["upsample", "--model_path", str(model), "--base_samples", str(data), "--out", str(out)]
        return [*words, *"--num_samples 40 --batch_size 4 --timestep_respacing 6".split()]

    tally = disturb_sampling(tmp_path, 2, upsample, seed=3, what="upsampling")
    assert tally.good() and tally.compared, "\n".join([tally.row(), *tally.differing, *tally.problems])


def test_features_go_on(tmp_path):
    data = make_images(tmp_path / "data", number=90)
    words = lambda out: [str(data), str(out)]  # noqa: E731
    tally = disturb_sampling(tmp_path, 4, words, seed=11, what="features", run=workers.features)
    # The ranks share nothing but the folder: one that is left alone goes on, or says after a while which images are missing.
    assert not tally.differing and tally.compared, "\n".join([tally.row(), *tally.differing, *tally.problems])
