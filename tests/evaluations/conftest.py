"""Synthetic Inception weights: published layouts, numbers from a seed. Written once per test session (95 MB each)."""

from __future__ import annotations

import warnings
from pathlib import Path

import inception_files
import numpy as np
import pytest
import torch

from evaluations.inception import InceptionV3
from evaluations.weights import load_inception


@pytest.fixture(scope="session")
def synthetic_constants() -> dict[str, np.ndarray]:
    return inception_files.synthetic_constants()


@pytest.fixture(scope="session")
def synthetic_pb(synthetic_constants, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception_pb") / "classify_image_graph_def.pb"
    inception_files.write_graph(path, synthetic_constants)
    return path


def load(path: Path, *, folded: bool) -> InceptionV3:
    """Load synthetic weights without the warning that they are nobody's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "scores rest on unknown Inception weights")
        return load_inception(path, folded=folded, allow_unknown=True)


@pytest.fixture(scope="session")
def synthetic_pth(synthetic_pb, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception_pth") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(load(synthetic_pb, folded=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def net(synthetic_pb) -> InceptionV3:
    """The folded network on synthetic weights, as commands use it."""
    return load(synthetic_pb, folded=True)


@pytest.fixture(scope="session")
def plain_net(synthetic_pth) -> InceptionV3:
    """The network as published, nothing folded."""
    return load(synthetic_pth, folded=False)
