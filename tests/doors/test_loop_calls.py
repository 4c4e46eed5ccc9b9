"""The training loop, the float16 trainer, the samplers of steps, pictures and logger call by name what they called in 2021, so that
subclasses and replaced functions act.

Counts, ways of calling, and the outcomes under a change were recorded by running the 2021 package (see `loop_calls.py`).
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from loop_calls import AT_LEAST, SCENARIOS, calls, overridden

FACTS = json.loads(gzip.decompress(Path(__file__).with_name("loop_calls.json.gz").read_bytes()))
CHANGES = [(name, target) for name, outcomes in FACTS["overridden"].items() for target in outcomes]


@pytest.mark.parametrize("name", SCENARIOS)
def test_methods_and_functions_are_called_as_often_and_in_the_same_way(name):
    count, styles = calls(name)
    for target, times in FACTS["counts"][name].items():
        assert count.get(target, 0) >= times if target in AT_LEAST else count.get(target, 0) == times, target
    for target, ways in styles.items():
        assert target not in FACTS["styles"] or ways <= set(FACTS["styles"][target]), target


@pytest.mark.parametrize(("name", "target"), CHANGES)
def test_a_change_acts(name, target):
    close(overridden(name, target), FACTS["overridden"][name][target])


def close(found, expected):
    """Equal but for rounding, at any depth."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        close(list(found.values()), list(expected.values()))
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            close(*pair)
    else:
        assert found == expected
