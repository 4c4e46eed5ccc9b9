"""Overrides act as in 2021: every method that it called through `self`, and every function that it looked up in its module, still is.

The counts, the ways of calling, and the outcomes under an override were recorded by running the 2021 package (see `self_calls.py`).
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from self_calls import FUNCTIONS, TRIED, calls, figures, overridden, play, scenarios

FACTS = json.loads(gzip.decompress(Path(__file__).with_name("self_calls.json.gz").read_bytes()))
STARTS = [
    "training",
    "p_sample",
    "p_sample_loop",
    "ddim_sample",
    "ddim_sample_loop",
    "ddim_reverse_sample",
    "calc_bpd_loop",
]


def beginning(names, kind, start):
    return [name for name in names if name.startswith(f"{kind} {start} ")]


def test_every_scenario_was_recorded():
    assert set(FACTS["counts"]) == set(scenarios()) and set(FACTS["overridden"]) == set(TRIED)


@pytest.mark.parametrize("kind", ["plain", "spaced"])
@pytest.mark.parametrize("start", [*STARTS, "p_sample_loop_progressive", "ddim_sample_loop_progressive"])
def test_methods_and_functions_are_called_as_often_and_in_the_same_way(kind, start):
    names = beginning(scenarios(), kind, start)
    assert names
    for name in names:
        count, styles = calls(name)
        for called, times in FACTS["counts"][name].items():
            assert count.get(called, 0) >= times, f"{name}: {called}"
            if called not in FUNCTIONS:
                assert count[called] == times, f"{name}: {called}"
        for called, ways in styles.items():
            assert ways <= set(FACTS["styles"][called]), f"{name}: {called}"


@pytest.mark.parametrize("kind", ["plain", "spaced"])
@pytest.mark.parametrize("start", STARTS)
def test_an_override_changes_what_it_changed(kind, start):
    names = beginning(TRIED, kind, start)
    assert names
    for name in names:
        for target, expected in FACTS["overridden"][name].items():
            if target == "_extract_into_tensor":
                continue  # equal formulas, differently written, disagree once the tables contradict each other
            found = overridden(name, target) if target else figures(play(name))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), f"{name}: {target or 'nothing overridden'}"
