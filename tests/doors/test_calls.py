"""Subclasses and replaced functions act as in 2021: what it called through `self` or looked up in its module still is called so.

Counts, ways of calling, and outcomes under a change were recorded by running the 2021 package (see `loop_calls.py`, `self_calls.py`).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import loop_calls
import pytest
import self_calls

HERE = Path(__file__).parent
LOOP, SELF = (json.loads(gzip.decompress((HERE / f"{name}_calls.json.gz").read_bytes())) for name in ("loop", "self"))
STARTS = "training p_sample p_sample_loop ddim_sample ddim_sample_loop ddim_reverse_sample calc_bpd_loop".split()


def beginning(names, kind, start):
    """The scenarios of the diffusion classes that begin so; there are some."""
    found = [name for name in names if name.startswith(f"{kind} {start} ")]
    assert found
    return found


def same_calls(name, recorder, facts, at_least):
    count, styles = recorder.calls(name)
    for target, times in facts["counts"][name].items():
        found = count.get(target, 0)
        assert found >= times if target in at_least else found == times, f"{name}: {target}"
    for target, ways in styles.items():
        unknown = ways if recorder is loop_calls else ()  # of loops, calls that 2021 did not make may be added
        assert ways <= set(facts["styles"].get(target, unknown)), f"{name}: {target}"


def test_every_scenario_was_recorded():
    assert set(SELF["counts"]) == set(self_calls.scenarios()) and set(SELF["overridden"]) == set(self_calls.TRIED)


@pytest.mark.parametrize("kind", self_calls.KINDS)
@pytest.mark.parametrize("start", [*STARTS, "p_sample_loop_progressive", "ddim_sample_loop_progressive"])
def test_diffusions_call_their_methods_as_often_and_in_the_same_way(kind, start):
    for name in beginning(self_calls.scenarios(), kind, start):
        same_calls(name, self_calls, SELF, self_calls.FUNCTIONS)


@pytest.mark.parametrize("name", loop_calls.SCENARIOS)
def test_loops_trainers_samplers_and_loggers_call_as_often_and_in_the_same_way(name):
    same_calls(name, loop_calls, LOOP, loop_calls.AT_LEAST)


@pytest.mark.parametrize("kind", self_calls.KINDS)
@pytest.mark.parametrize("start", STARTS)
def test_an_override_changes_what_it_changed(kind, start):
    for name in beginning(self_calls.TRIED, kind, start):
        for target, expected in SELF["overridden"][name].items():
            if target == "_extract_into_tensor":
                continue  # equal formulas, differently written, disagree once the tables contradict each other
            found = self_calls.overridden(name, target) if target else self_calls.outcome(self_calls.play(name))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), f"{name}: {target or 'nothing overridden'}"


CHANGES = [(name, target) for name, outcomes in LOOP["overridden"].items() for target in outcomes]


@pytest.mark.parametrize(("name", "target"), CHANGES)
def test_a_change_acts(name, target):
    close(loop_calls.overridden(name, target), LOOP["overridden"][name][target])


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
