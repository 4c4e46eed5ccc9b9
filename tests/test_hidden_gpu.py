"""Tests choose their device: on a machine with a GPU only those marked for one see it."""

from __future__ import annotations

import os

import pytest
import torch
from processes import run_forked

from guided_diffusion.runtime.devices import choose_device


@pytest.fixture(scope="module")
def seen_by_a_fixture() -> bool:
    return torch.cuda.is_available()


def test_commands_and_fixtures_of_unmarked_tests_take_the_cpu(seen_by_a_fixture: bool) -> None:
    assert not seen_by_a_fixture and choose_device("auto", 0, 1).type == "cpu"


def test_started_processes_see_none_either() -> None:
    found = run_forked("import torch; print(torch.cuda.is_available(), torch.cuda.device_count())")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and found.split() == ["False", "0"]


@pytest.mark.gpu
def test_a_marked_test_has_its_gpu() -> None:
    assert choose_device("auto", 0, 1).type == "cuda"
