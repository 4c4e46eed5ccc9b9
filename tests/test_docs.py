"""The tables of the docs name what the tables of the code hold."""

from __future__ import annotations

import re

from processes import ROOT

import guided_diffusion as gd
from guided_diffusion.diffusion.samplers import ALIASES
from guided_diffusion.sampling.chains import make_chain


def rows(page: str, header: str) -> dict[str, list[str]]:
    """The cells of each line of the table with this header, by the name in its first cell."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    table = text.split(header, 1)[1].split("\n\n", 1)[0].strip().splitlines()[1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {first.strip("`"): rest for first, *rest in cells}


def names(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`(\w+)`", cell))


def test_samplers() -> None:
    found = rows("sampling.md", "| name | what | options (defaults) | grid | calls for 20 steps |")
    assert list(found) == list(gd.SAMPLERS)
    for name, (_, options, grid, calls) in found.items():
        kind = gd.SAMPLERS[name]
        assert (names(options), grid) == (kind.options, kind.grid)
        if name != "restart":  # whose calls depend on what is asked for
            chain = make_chain(gd.make_process(gd.SCHEDULES["linear"](1000)), name, steps=20)
            assert int(calls) == len(chain.levels())
        defaults = {option: kind.defaults()[option] for option in kind.options}
        told = dict(re.findall(r"`(\w+)` ([\w.]+)", options))
        assert told == {option: str(value) for option, value in defaults.items() if option in told}


def test_other_names_of_samplers() -> None:
    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)` = (\w+)", text.split("Other names:", 1)[1].split("\n\n", 1)[0])
    assert listed == [(alias, sampler) for alias, (sampler, _) in ALIASES.items()]


def test_grids() -> None:
    found = rows("sampling.md", "| name | nodes | options |")
    assert {name: names(cells[-1]) for name, cells in found.items()} == {n: g.options for n, g in gd.GRIDS.items()}


def test_guidances_in_their_order() -> None:
    assert list(rows("guidance.md", "| name | x0 becomes | cost | usual | flags |")) == list(gd.GUIDANCES)
