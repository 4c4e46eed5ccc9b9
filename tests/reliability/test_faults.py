"""The short form of the fault injection; the long one is `python -m tests.reliability.faults --moments 20`."""

import os

import pytest

from .faults import run


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals and forks")
def test_killed_at_random_moments_and_continued(tmp_path):
    for tally in run(tmp_path, 2, steps=20, images=32, seed=7):
        assert tally.moments == 2 and tally.compared > 0
        assert tally.good(), "\n".join([tally.row(), *tally.differing, *tally.problems])
