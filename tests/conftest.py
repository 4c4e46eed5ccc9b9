"""What all tests share: examples drawn the same way on every machine, and no clock in a property test."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings

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
            item.add_marker(pytest.mark.skip(reason="needs a GPU, real or pretended"))
        if item.get_closest_marker("real_gpu") and (not torch.cuda.is_available() or hasattr(torch.cuda, "pretended")):
            item.add_marker(pytest.mark.skip(reason="needs a real GPU"))


@pytest.fixture(autouse=True, scope="session")
def _interrupts_arrive() -> None:
    """A shell that starts the tests in the background has SIGINT ignored; the tests of signals need it as a terminal gives it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
