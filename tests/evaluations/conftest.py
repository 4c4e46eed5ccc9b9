"""Synthetic Inception weights: published layouts, numbers from a seed. Written once per test session (95 MB each)."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"


@pytest.fixture(scope="session")
def recipes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluation_recipes", GOLDEN / "recipes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def synthetic_constants(recipes) -> dict[str, np.ndarray]:
    return recipes.synthetic_weights(1234)


@pytest.fixture(scope="session")
def synthetic_pb(recipes, synthetic_constants, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception_pb") / "classify_image_graph_def.pb"
    recipes.write_synthetic_graphdef(path, synthetic_constants)
    return path


def load(path: Path, *, folded: bool):
    """Load synthetic weights without the warning that they are nobody's."""
    from evaluations.weights import load_inception

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "scores rest on unknown Inception weights")
        return load_inception(path, folded=folded, allow_unknown=True)


@pytest.fixture(scope="session")
def synthetic_pth(synthetic_pb, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception_pth") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(load(synthetic_pb, folded=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def net(synthetic_pb):
    """The folded network on synthetic weights, as commands use it."""
    return load(synthetic_pb, folded=True)


@pytest.fixture(scope="session")
def plain_net(synthetic_pth):
    """The network as published, nothing folded."""
    return load(synthetic_pth, folded=False)
