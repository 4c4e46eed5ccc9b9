"""What a process holds and what is left, against memory that is really taken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from guided_diffusion.runtime import memory

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="figures as Linux tells them")
def test_used_and_peak_follow_what_is_taken() -> None:
    torch.ones(64 * MIB, dtype=torch.uint8)  # code that is loaded with the first call
    memory.give_back(CPU)
    before = memory.used(CPU)
    assert memory.restart_peak(CPU)
    taken = torch.ones(64 * MIB, dtype=torch.uint8)
    assert memory.used(CPU) - before == pytest.approx(64 * MIB, rel=0.1)
    del taken
    memory.give_back(CPU)
    assert memory.used(CPU) - before < 16 * MIB
    assert memory.peak(CPU) - before >= 60 * MIB
    assert memory.restart_peak(CPU) and memory.peak(CPU) - before < 32 * MIB


@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 600 + 150), ("max", None)])
def test_the_limit_of_a_job_counts(
    limit: str, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux":
        pytest.skip("control groups are of Linux")
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), None)
    if own is None:
        pytest.skip("no control groups of version 2")
    folder = tmp_path / own.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("600\n")
    (folder / "memory.stat").write_text("anon 450\nactive_file 0\ninactive_file 150\n")
    before = memory.free(CPU)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    if left is None:
        assert memory.free(CPU) == pytest.approx(before, rel=0.2)
    else:
        assert memory.free(CPU) == left
