"""--checkpoint auto as a whole: what it does where memory is short, on a pretended device, a real process and two processes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from guided_diffusion.config import RunConfig
from guided_diffusion.runtime import memory
from guided_diffusion.runtime.world import World
from guided_diffusion.training import fitting
from guided_diffusion.training.checkpointing import Needs
from guided_diffusion.training.fitting import GB, fit_checkpointing
from guided_diffusion.training.measuring import blocks_of, measured, recompute, set_recomputing, set_recomputing_norms

from .test_measuring import Batch, batch_of, classifier, trainer_of, unet
from .test_processes import start

MIB = 2**20
Real = Callable[[int, frozenset[str]], float]


def recomputing(trainer: Any) -> frozenset[str]:
    return frozenset(name for name, block in blocks_of(trainer.net).items() if block.use_checkpoint)


def norms_again(trainer: Any) -> bool:
    return any(getattr(module, "recompute_norms", False) for module in trainer.net.modules())


class Pretended:
    """A device whose passes take what `real` says, beside 1 MiB that is always in use; counts the trials."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: Any, real: Real | None = None) -> None:
        self.of: dict[bool, Needs] = {}  # by whether norms are recomputed
        for norms in (True, False):
            set_recomputing_norms(trainer.net, norms)
            self.of[norms] = Needs(**{**vars(measured(trainer, batch_of(8))), "hidden": 0.0})
        self.trials: list[int] = []
        self.moments = 2 * sum(p.nbytes for p in trainer.params)

        def trial(trainer: Any, batch: Batch, count: int) -> float:
            self.trials.append(count)
            chosen = recomputing(trainer)
            return self.total(count, chosen, norms_again(trainer)) if real is None else real(count, chosen)

        monkeypatch.setattr(memory, "used", lambda device: MIB)
        monkeypatch.setattr(memory, "free", lambda device: 100 * GB)
        monkeypatch.setattr(memory, "give_back_at_once", lambda device: None)
        monkeypatch.setattr(fitting, "measured", lambda trainer, batch: self.of[norms_again(trainer)])
        monkeypatch.setattr(fitting, "_try", trial)

    def total(self, count: int, chosen: frozenset[str] | set[str] = frozenset(), norms: bool = True) -> float:
        return MIB + self.moments + self.of[norms].peak(count, chosen, more=count < 8)


@pytest.mark.parametrize("make", [unet, classifier])
def test_more_blocks_recompute_the_less_memory_there_is(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(make(), 8)
    device = Pretended(monkeypatch, trainer)
    everything = frozenset(blocks_of(trainer.net))
    least, middle, most = device.total(8, everything), device.total(8), device.total(8, norms=False)
    assert least < middle < 0.9 * most
    choices = []
    for enough in (
        1.05 * most,
        most - 0.2 * (most - middle),
        *(least + s * (middle - least) for s in (0.8, 0.5, 0.01)),
    ):
        limit = enough / 0.97
        told = fit_checkpointing(trainer, batch_of(8), limit_gb=limit / GB)
        chosen = recomputing(trainer)
        choices.append((norms_again(trainer), len(chosen)))
        assert device.total(8, chosen, norms_again(trainer)) <= limit and trainer.microbatch == 0
        assert f"of {limit / GB:.2f} GB" in told and ("norms of all blocks" in told) == norms_again(trainer)
        if chosen:
            assert f"{len(chosen)} of {len(everything)} blocks as a whole" in told
    assert choices[:2] == [(False, 0), (True, 0)] and all(norms for norms, _ in choices[2:])
    counts = [count for _, count in choices]
    assert counts == sorted(counts) and counts[2] > 0 and counts[-1] >= len(everything) // 2
    before = recomputing(trainer)
    with pytest.raises(ValueError, match="even if all .* raise --memory_limit_gb, or give a smaller --batch_size"):
        fit_checkpointing(trainer, batch_of(8), limit_gb=0.9 * least / GB)
    assert before <= everything and all(p.grad is None for p in trainer.params)


def test_where_there_is_plenty_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(unet(), 8)
    device = Pretended(monkeypatch, trainer)
    set_recomputing(trainer.net, blocks_of(trainer.net))
    assert "no block has to recompute" in fit_checkpointing(trainer, batch_of(8))
    assert not recomputing(trainer) and not norms_again(trainer) and not device.trials


def test_real_passes_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is foreseen may be too little, or a pass may run out of memory: more blocks follow."""
    trainer = trainer_of(unet(), 8)
    device = Pretended(monkeypatch, trainer)
    everything = frozenset(blocks_of(trainer.net))
    limit = (device.total(8, everything) + 0.6 * (device.total(8) - device.total(8, everything))) / 0.97
    fit_checkpointing(trainer, batch_of(8), limit_gb=limit / GB)
    foreseen = recomputing(trainer)

    def heavier(count: int, chosen: frozenset[str]) -> float:
        return MIB + device.moments + 1.1 * device.of[norms_again(trainer)].peak(count, chosen)

    def breaking(count: int, chosen: frozenset[str]) -> float:
        if len(chosen) < len(foreseen) + 2:
            raise torch.OutOfMemoryError("out of memory")
        return device.total(count, chosen, norms_again(trainer))

    for real in (heavier, breaking):
        worse = Pretended(monkeypatch, trainer, real)
        fit_checkpointing(trainer, batch_of(8), limit_gb=limit / GB)
        assert len(worse.trials) > 1 and len(recomputing(trainer)) > len(foreseen)
        assert real(8, recomputing(trainer)) <= 0.97 * limit


@pytest.mark.parametrize("problem", ["out of memory", "more than foreseen"])
def test_what_an_earlier_choice_took_is_forgotten(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that keep everything fail; with norms recomputed there is plenty, so that nothing is tried any more."""
    trainer = trainer_of(unet(), 8)

    def real(count: int, chosen: frozenset[str]) -> float:
        if problem == "out of memory":
            raise torch.OutOfMemoryError(problem)
        return 10 * GB

    device = Pretended(monkeypatch, trainer, real)
    monkeypatch.setattr(fitting, "_SURELY", 0.9)
    told = fit_checkpointing(trainer, batch_of(8), limit_gb=1.05 * device.total(8, norms=False) / GB)
    assert device.trials == [8] and norms_again(trainer) and not recomputing(trainer)
    assert f"recompute; {device.total(8) / GB:.2f} GB instead of {device.total(8, norms=False) / GB:.2f} GB" in told


def test_a_network_that_will_be_compiled_recomputes_whole_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(unet(), 8)
    trainer.net.set_fused_norm(False)  # keeps less by itself; a compiled network does without it
    device = Pretended(monkeypatch, trainer)
    limit = 0.8 * device.total(8, norms=False)
    assert device.total(8) < 0.97 * limit
    told = fit_checkpointing(trainer, batch_of(8), limit_gb=limit / GB, norms=False)
    assert recomputing(trainer) and not norms_again(trainer) and "norms" not in told
    assert device.total(8, recomputing(trainer), norms=False) < limit


def test_what_recomputes_is_what_was_asked_for() -> None:
    net = unet()
    for what, norms, blocks in (
        ("norms", True, 0),
        ("", True, 0),
        ("all", False, 14),
        ("auto", False, 14),
        ("none", False, 0),
    ):
        recompute(net, what)
        trainer = trainer_of(net, 8)
        assert (norms_again(trainer), len(recomputing(trainer))) == (norms, blocks)
    with pytest.raises(ValueError, match="--checkpoint norms: Linear cannot"):
        recompute(torch.nn.Linear(1, 1), "norms")


def test_halves_the_microbatch_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(unet(), 8)
    device = Pretended(monkeypatch, trainer)
    everything = frozenset(blocks_of(trainer.net))
    limit = (device.total(3, everything) + device.total(2, everything)) / 2 / 0.97
    with pytest.raises(ValueError, match="8 images at a time"):
        fit_checkpointing(trainer, batch_of(8), limit_gb=limit / GB)
    told = fit_checkpointing(trainer, batch_of(8), limit_gb=limit / GB, shrink=True)
    assert trainer.microbatch == 2 and "2 images per forward and backward pass" in told
    assert device.total(2, recomputing(trainer)) <= 0.97 * limit
    # A microbatch that is given counts, not the batch.
    trainer.microbatch = 1
    assert "1 images per" in fit_checkpointing(trainer, batch_of(8), limit_gb=limit / GB)
    with pytest.raises(ValueError, match="1 image at a time need"):
        fit_checkpointing(trainer, batch_of(8), limit_gb=0.5 * device.total(1, everything) / GB, shrink=True)


def test_no_memory_to_measure_and_nothing_to_recompute() -> None:
    class Hungry(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.use_checkpoint = torch.nn.Linear(1, 1), False

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ValueError, match="not even one example"):
        fit_checkpointing(trainer_of(Hungry(), 8), batch_of(8))
    with pytest.raises(ValueError, match="no blocks that can recompute"):
        fit_checkpointing(trainer_of(torch.nn.Linear(1, 1), 8), batch_of(8))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_batches(size: int) -> None:
    trainer = trainer_of(unet(), size)
    assert "no block has to recompute" in fit_checkpointing(trainer, batch_of(size))
    trainer.step(batch_of(size))


_PROCESS = """
import json, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from training.test_measuring import UNetModel, batch_of, trainer_of
from guided_diffusion.runtime import memory
from guided_diffusion.training.fitting import fit_checkpointing
net = UNetModel(32, 3, 32, 3, 1, (2,), channel_mult=(1, 2), num_head_channels=16)
trainer, batch = trainer_of(net, 96), batch_of(96, 32)
told = fit_checkpointing(trainer, batch, limit_gb={limit!r}, norms={norms!r}) if {limit!r} else ""
memory.restart_peak(trainer.device)
for _ in range(3): trainer.step(batch)
print(json.dumps([memory.peak(trainer.device) / 2**30, told]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process as Linux tells it")
def test_a_real_process_stays_below_its_limit() -> None:
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

    def run(limit: float, norms: bool = True) -> tuple[float, str]:
        code = _PROCESS.format(paths=paths, limit=limit, norms=norms)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return tuple(json.loads(done.stdout.splitlines()[-1]))

    without, _ = run(0)
    peak, told = run(0.75 * without)
    assert peak < 0.75 * without and "the norms of all blocks recompute" in told, (without, told)
    peak, told = run(0.75 * without, norms=False)
    assert peak < 0.75 * without and "of 12 blocks recompute" in told, (without, told)


def test_two_processes_choose_the_same(tmp_path: Path) -> None:
    processes = start(2, tmp_path, "checkpointing")
    for process in processes:
        _, problem = process.communicate(timeout=240)
        assert process.returncode == 0, problem[-3000:]
    first, second = (json.loads((tmp_path / f"chosen{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) > 0


@pytest.fixture
def gpu_of() -> Any:
    """A function that leaves so many bytes of the GPU to this process."""
    if not hasattr(torch.cuda, "pretended"):
        pytest.skip("limits of a few MB, finer than a real GPU's allocator deals out memory")
    whole = torch.cuda.mem_get_info()[1]
    gc.collect()  # what earlier tests left there must not go away in the middle
    yield lambda size: torch.cuda.set_per_process_memory_fraction(size / whole)
    torch.cuda.set_per_process_memory_fraction(1.0)


def gpu_trainer() -> Any:
    return trainer_of(unet(), 32, world=World(device=torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("shrink", [False, True])
def test_a_gpu_says_itself_when_there_is_no_more(gpu_of: Any, shrink: bool) -> None:
    """From so much memory that nothing recomputes to so little that not even one image fits; steps fit as foreseen."""
    trainer, batch, told = gpu_trainer(), batch_of(32), []
    below = torch.cuda.memory_allocated() + 2 * sum(p.nbytes for p in trainer.params)
    needs = {}
    for norms in (True, False):
        set_recomputing_norms(trainer.net, norms)
        needs[norms] = measured(trainer, batch)
    everything = set(blocks_of(trainer.net))
    keeping, norms, least = needs[False].peak(32), needs[True].peak(32), needs[True].peak(32, everything)
    limits = [1.2 * keeping, 1.1 * norms, 0.7 * least + 0.3 * norms, *[0.6 * least] * shrink]
    assert least < norms < 0.8 * keeping
    del trainer
    for limit in limits:
        trainer = gpu_trainer()
        gpu_of(below + limit)
        told.append(fit_checkpointing(trainer, batch, shrink=shrink))
        for _ in range(2):
            trainer.step(batch)
        del trainer
        gc.collect()
    assert "no block has to recompute" in told[0] and "the norms of all blocks recompute" in told[1]
    assert "blocks as a whole" in told[2] and not any("inf" in line for line in told)
    assert not shrink or "images per forward and backward pass" in told[3]
    trainer = gpu_trainer()
    gpu_of(below + 0.6 * (least if not shrink else needs[True].peak(1, everything)))
    with pytest.raises(
        ValueError,
        match="not even one example|1 image at a time need" if shrink else "32 images at a time need .* ran out of",
    ):
        fit_checkpointing(trainer, batch, shrink=shrink)


@pytest.mark.gpu
def test_a_microbatch_that_fits_a_gpu(gpu_of: Any) -> None:
    trainer, batch = gpu_trainer(), batch_of(32)
    trainer.step(batch)
    torch.cuda.reset_peak_memory_stats()
    trainer.step(batch)
    gpu_of(0.45 * torch.cuda.max_memory_allocated())
    trainer = gpu_trainer()
    trainer.microbatch = fitting.fitting_microbatch(trainer, batch)
    assert trainer.microbatch in (4, 8, 16)
    trainer.step(batch)


def test_contradicting_flags_are_refused_in_words() -> None:
    read = RunConfig.from_flags
    with pytest.raises(ValueError, match="--checkpoint 'none' .* --use_checkpoint True .* one of the two"):
        read("diffusion", {"checkpoint": "none", "use_checkpoint": True})
    with pytest.raises(ValueError, match="--checkpoint 'norms' .* --use_checkpoint True .* one of the two"):
        read("diffusion", {"checkpoint": "norms", "use_checkpoint": True})
    with pytest.raises(ValueError, match="--checkpoint 'norms' has no effect with --compile True"):
        read("classifier", {"checkpoint": "norms", "compile": True})
    with pytest.raises(ValueError, match="--memory_limit_gb 3 .* --checkpoint auto"):
        read("diffusion", {"memory_limit_gb": 3.0})
    with pytest.raises(ValueError, match="--checkpoint is 'some'"):
        read("classifier", {"checkpoint": "some"})
    for kind in ("diffusion", "super_resolution", "classifier"):
        config = read(kind, {"checkpoint": "auto", "memory_limit_gb": 3.0, "use_checkpoint": True})
        assert RunConfig.from_dict(kind, config.to_dict()) == config
        stored = config.to_dict()
        for name in ("checkpoint", "memory_limit_gb"):  # the file of an older run
            del stored["train"][name]
        assert RunConfig.from_dict(kind, stored).train.checkpoint == ""
