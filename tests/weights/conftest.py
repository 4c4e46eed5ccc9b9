"""The messages of the package are kept for every test of this folder."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _keep_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "guided_diffusion")
