"""What all tests share: examples drawn the same way on every machine, no clock in a property test, no GPU that a test did not ask for."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


# Tests of several real processes, which meet, die and are killed within seconds: on a machine whose cores are taken by others one may
# miss its moment. They get a second chance; a defect fails twice.
_REAL_PROCESSES = ("tests/reliability/", "tests/runtime/test_world", "tests/runtime/test_signals", "tests/integration/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of real processes for one repetition, where the plugin that repeats is installed; skip those without their GPU."""
    for item in items:
        if config.pluginmanager.hasplugin("rerunfailures") and item.nodeid.startswith(_REAL_PROCESSES):
            item.add_marker(pytest.mark.flaky(reruns=1))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Begin every test, with its fixtures, with the same random numbers, whatever ran before. Hide the machine's GPU from those that are
    not marked for one, and from the processes they start.

    Commands take a GPU by themselves; what a test says of numbers holds where it was said of: on the CPU, everywhere.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("gpu"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _interrupts_arrive() -> None:
    """A shell that starts the tests in the background has SIGINT ignored, nohup SIGHUP; the tests need them as a terminal gives them."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures in two classes of one folder each."""
    root = tmp_path_factory.mktemp("photos")
    for k in range(8):
        path = root / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(k).randint(0, 256, (9, 9, 3), np.uint8)).save(path)
    return root
