"""Whatever is written as JSON is JSON: no NaN, which Python alone reads."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import guided_diffusion
from guided_diffusion.runtime import log, storage
from guided_diffusion.training import incident
from guided_diffusion.weights import runs as checkpoint

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = math.nan, math.inf


def strict(text: str) -> Any:
    """As JavaScript, jq and most databases read it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({"a": NAN}, {"a": None}),
        ([1.5, INF, -INF, None, "NaN"], [1.5, None, None, None, "NaN"]),
        ({"rows": ({"x": (NAN, 2)}, {})}, {"rows": [{"x": [None, 2]}, {}]}),
        ({"grown": np.float64(NAN)}, {"grown": None}),
        ({5: 0.5}, {"5": 0.5}),
        ("caf\udce9", "caf\udce9"),  # a file's name that is no UTF-8
    ],
)
def test_figures_that_are_not_finite_become_null(values: Any, read: Any, tmp_path: Path) -> None:
    storage.write_json_atomic(tmp_path / "x.json", values)
    assert strict((tmp_path / "x.json").read_text(encoding="utf-8")) == read


def test_nothing_else_writes_json() -> None:
    """One home; what only processes of one job or hashes see may be made elsewhere, as long as it refuses NaN."""
    allowed = {"runtime/storage.py", "runtime/world.py"}
    package = Path(guided_diffusion.__file__).parent
    for path in [*package.rglob("*.py"), *(ROOT / "evaluations").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        if path.is_relative_to(package) and path.relative_to(package).as_posix() in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                strictly = {word.arg: word.value for word in node.keywords}.get("allow_nan")
                assert isinstance(strictly, ast.Constant) and strictly.value is False, f"{path}:{node.lineno}"


def test_the_log_of_a_run_that_broke_down(tmp_path: Path) -> None:
    writer = log.JsonWriter(tmp_path / "progress.json")
    writer.write({"step": 1, "loss": NAN, "grad_norm": torch.tensor(INF)})
    writer.close()
    assert strict((tmp_path / "progress.json").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_the_report_of_an_incident(tmp_path: Path) -> None:
    report = {"losses": {"mse": [NAN, 1.0]}, "layers": [{"largest": INF}]}
    folder = Path(incident.write_incident(str(tmp_path), step=3, rank=0, batch={}, report=report))
    found = strict((folder / "report_rank0.json").read_text())
    assert found["losses"] == {"mse": [None, 1.0]} and found["layers"] == [{"largest": None}]


def test_a_save_keeps_its_state_whatever_it_holds(tmp_path: Path) -> None:
    state = {"best": NAN, "scale": -INF, "history": torch.tensor([[1.0, NAN]]), "drawn": np.array([INF, 2.0])}
    path = checkpoint.save_run(str(tmp_path), step=1, model={"w": torch.zeros(1)}, state=state)
    strict(Path(path).read_text())
    saved = checkpoint.find_latest(str(tmp_path))
    assert saved is not None and math.isnan(saved.state["best"]) and saved.state["scale"] == -INF
    torch.testing.assert_close(saved.state["history"], state["history"], equal_nan=True)
    np.testing.assert_array_equal(saved.state["drawn"], state["drawn"])
