"""What is recomputed and how much of the batch goes through at a time: the same training, less memory, found by trying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from guided_diffusion.config import RunConfig
from guided_diffusion.models.unet import EncoderUNetModel, UNetModel
from guided_diffusion.runtime.streams import Streams
from guided_diffusion.runtime.world import World
from guided_diffusion.training import memory
from guided_diffusion.training.losses import Losses
from guided_diffusion.training.memory import can_recompute, fit, kept_bytes, set_recompute
from guided_diffusion.training.trainer import Trainer

from .test_processes import start

GIB = 2**30


class Batch(NamedTuple):
    images: Tensor
    positions: Tensor


def batch_of(size: int, side: int = 16) -> Batch:
    return Batch(torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(2)), torch.arange(size))


def loss_fn(net: Any, batch: Batch, streams: Streams) -> Losses:
    time = streams.uniform() * 1000
    error = net(batch.images + streams.randn_like(batch.images), time).float()
    loss = error.pow(2).flatten(1).mean(1)
    return Losses(loss, {"loss": loss})


def unet(dropout: float = 0.0) -> UNetModel:
    torch.manual_seed(0)
    net = UNetModel(16, 3, 32, 6, 1, (2,), dropout, channel_mult=(1, 2), num_head_channels=16,
                    use_scale_shift_norm=True, resblock_updown=True)  # fmt: skip
    return stirred(net)


def classifier() -> EncoderUNetModel:
    torch.manual_seed(0)
    return stirred(
        EncoderUNetModel(16, 3, 32, 10, 2, (2,), channel_mult=(1, 2), num_head_channels=16, pool="attention")
    )


def stirred(net: Any) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():  # a fresh network ends in zeros: half of its gradients would be zero
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return net


def trainer_of(net: nn.Module, size: int, **options: Any) -> Trainer:
    return Trainer(net, loss_fn, iter([]), lr=1e-3, ema_rates=(0.9,), batch_size=size, **options)


def recomputed_by(net: nn.Module) -> str:
    blocks = {module.use_checkpoint for module in net.modules() if hasattr(module, "use_checkpoint")}
    norms = {module.recompute_norms for module in net.modules() if hasattr(module, "recompute_norms")}
    assert len(blocks) == len(norms) == 1
    return "all" if True in blocks else "norms" if True in norms else "none"


def kept(what: str, size: int, make: Any = unet) -> float:
    """Bytes kept of a forward pass, by counting them on `size` examples at once."""
    trainer, batch = trainer_of(make(), size), batch_of(size)
    set_recompute(trainer.net, what)
    fixed, each = kept_bytes(lambda _: trainer.losses_of(trainer.net, batch, batch.positions), trainer.params, most=1)
    return fixed + each


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_the_same_whatever_is_recomputed(precision: str) -> None:
    """Dropout draws the same in the second computation."""
    weights = []
    for what in ("none", "norms", "all"):
        trainer = trainer_of(unet(dropout=0.3), 4, precision=precision, microbatch=3)
        set_recompute(trainer.net, what)
        assert recomputed_by(trainer.net) == what
        for _ in range(2):
            trainer.step(batch_of(4))
        weights.append([p.detach() for p in trainer.params])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other))


@pytest.mark.parametrize("make", [unet, classifier])
def test_the_more_is_recomputed_the_less_is_kept_and_it_grows_with_the_batch(make: Any) -> None:
    none, norms, blocks = (kept(what, 4, make) for what in ("none", "norms", "all"))
    assert blocks < 0.6 * norms and norms < 0.8 * none
    trainer, batch = trainer_of(make(), 4), batch_of(4)

    def forward(count: int) -> Losses:
        part = Batch(*(t[:count] for t in batch))
        return trainer.losses_of(trainer.net, part, part.positions)

    fixed, each = kept_bytes(forward, trainer.params)
    assert fixed + 4 * each == pytest.approx(none, rel=0.05)


def test_networks_that_cannot_recompute_are_named() -> None:
    assert can_recompute(unet()) == ("none", "norms", "all") and can_recompute(nn.Linear(1, 1)) == ("none",)
    set_recompute(nn.Linear(1, 1), "none")
    with pytest.raises(ValueError, match="--recompute norms: Linear supports none only"):
        set_recompute(nn.Linear(1, 1), "norms")


# ---- What fits


def needed(what: str, count: int, first: str = "none") -> float:
    """Bytes that a step of `count` examples adds on a CPU; workspaces follow from what `first`, the first way, keeps."""
    trainer, batch = trainer_of(unet(), 8), batch_of(8)
    (fixed, each), passing = (memory._kept(trainer, batch, way) for way in (what, first))
    return fixed + count * (each + memory._TEMPORARY * passing[1]) + 3 * sum(p.nbytes for p in trainer.params)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from (what is recomputed, examples at a time) to a limit in GiB between that and the next larger need."""
    monkeypatch.setattr(memory, "used_memory", lambda device: 0)

    def between(what: str, count: int, first: str = "none") -> float:
        return 1.02 * needed(what, count, first) / GIB

    return between


@pytest.mark.parametrize(
    ("what", "count", "options", "words"),
    [
        ("none", 8, {"recompute": True}, "--recompute auto: nothing is recomputed"),
        ("norms", 8, {"recompute": True}, "--recompute auto: norms are recomputed"),
        ("all", 8, {"recompute": True}, "--recompute auto: whole blocks are recomputed"),
        ("norms", 8, {"recompute": True, "norms": False}, "whole blocks are recomputed"),
        ("all", 4, {"recompute": True, "shrink": True}, "whole blocks are recomputed; 4 images per forward"),
        ("none", 2, {"shrink": True}, "--microbatch auto: 2 images per forward and backward pass fit"),
    ],
)
def test_the_first_that_fits_stays(limits: Any, caplog: Any, what: str, count: int, options: Any, words: str) -> None:
    caplog.set_level("INFO", "guided_diffusion")
    trainer = trainer_of(unet(), 8)
    fit(trainer, batch_of(8), limit_gb=limits(what, count), **{"recompute": False, "shrink": False, **options})
    wanted = "all" if options.get("norms") is False else what
    assert recomputed_by(trainer.net) == wanted and (trainer.microbatch or 8) == count
    assert words in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recompute": True}, "8 images at a time fit .* give --memory_limit_gb 0 or more, or --microbatch auto"),
        ({"recompute": True, "shrink": True}, "not even 1 image at a time fits"),
        ({"shrink": True}, "or --recompute all"),
    ],
)
def test_what_helps_is_named_where_nothing_fits(limits: Any, options: Any, words: str) -> None:
    options = {"recompute": False, "shrink": False, "limit_gb": 0.5 * limits("all", 1), **options}
    with pytest.raises(ValueError, match=words):
        fit(trainer_of(unet(), 8), batch_of(8), **options)


class OnlyFew(nn.Module):
    """A network for which more than `limit` examples are too many, as a GPU would say it."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.inner, self.limit = unet(dropout=0.3), limit

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x, time)


@pytest.mark.parametrize("limit", [7, 2])
def test_trials_leave_no_trace(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By passes that run out of memory, as on a GPU; the step that follows is that of a run that knew the answer.

    With a limit of 7, two trials of 8 fail. With 2, not even the images fit on which bytes are counted: one is tried.
    """
    monkeypatch.setattr(memory, "_can_try", lambda device: True)
    tried, passes = [], memory._try
    monkeypatch.setattr(memory, "_try", lambda *args: (tried.append(args[2]), passes(*args)))
    trainer = trainer_of(OnlyFew(limit), 8)
    fit(trainer, batch_of(8), recompute=True, shrink=True)
    assert tried == ([8, 8] if limit == 7 else [1])
    assert 0 < trainer.microbatch <= min(limit, 4) and all(p.grad is None for p in trainer.params)
    other = trainer_of(OnlyFew(limit), 8, microbatch=trainer.microbatch)
    set_recompute(other.net, "all")
    for a, b in zip(trainer.step(batch_of(8)).values(), other.step(batch_of(8)).values()):
        assert torch.equal(a, b)


def test_all_processes_plan_with_the_room_of_the_one_that_has_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step needs in any case differs too: EMA copies that are divided. Other plans would wait for others' numbers for ever."""
    rooms: list[float] = []
    monkeypatch.setattr(memory, "choose", lambda plans, need, room, trial: rooms.append(room) or plans[0])
    trainer = trainer_of(unet(), 8)
    monkeypatch.setattr(type(trainer.world), "all_gather_object", lambda world, value, name: [value, 5.0])
    fit(trainer, batch_of(8), recompute=True, shrink=True)
    assert rooms == [5.0]


PLANS = memory.attempts(("none", "norms", "all"), 64, shrink=True)


@pytest.mark.parametrize(
    ("room", "fits", "chosen", "tried"),
    [
        (200, 200, ("none", 64), [("none", 64)]),
        (100, 80, ("norms", 64), [("none", 64), ("norms", 64)]),  # counted bytes lack workspaces
        (70, 30, ("all", 64), [("norms", 64), ("all", 64)]),  # all need half of norms
        (100, 30, ("all", 64), [("none", 64), ("norms", 64)]),  # the third is taken untried
        (30, 20, ("all", 32), [("all", 64), ("all", 32)]),
        (30, 10, ("all", 16), [("all", 64), ("all", 32)]),
        (0.1, 200, ("all", 1), [("all", 1)]),  # the count may be too high
        (0.1, 0.1, None, [("all", 1)]),
        (1, 0.6, ("all", 1), [("all", 2), ("all", 1)]),
        (1, 0.1, None, [("all", 2), ("all", 1)]),
    ],
)
def test_at_most_two_plans_are_tried(room: float, fits: float, chosen: Any, tried: Any) -> None:
    """`room` bytes are free by computation; in truth a step fits that is counted to need at most `fits`."""
    each = {"none": 100 / 64, "norms": 55 / 64, "all": 27.5 / 64}
    seen = []

    def trial(plan: memory.StepPlan) -> bool:
        seen.append(tuple(plan))
        return need(plan) <= fits

    def need(plan: memory.StepPlan) -> float:
        return plan.images * each[plan.recompute]

    assert memory.choose(PLANS, need, room, trial) == chosen and seen == tried
    counted = memory.choose(PLANS, need, room)  # without trials the count decides
    assert counted == next((plan for plan in PLANS if need(plan) <= room), None)


def test_a_plan_that_needs_hardly_less_is_not_tried() -> None:
    """Nor is one without a smaller plan behind it."""
    plans = [memory.StepPlan("", images) for images in (8, 7, 6, 5, 3, 2)]
    seen: list[int] = []

    def trial(plan: memory.StepPlan) -> bool:
        seen.append(plan.images)
        return False

    assert memory.choose(plans, lambda plan: plan.images, 8, trial) == ("", 3) and seen == [8, 6]
    assert memory.choose(plans[:1], lambda plan: plan.images, 8, trial) is None and seen == [8, 6, 8]
    assert memory.choose(plans[:2], lambda plan: plan.images, 8, trial) is None and seen == [8, 6, 8, 8, 7]


def test_two_processes_choose_the_same(tmp_path: Path) -> None:
    """Only the second one is short of memory."""
    processes = start(2, tmp_path, "fitting")
    for process in processes:
        _, problem = process.communicate(timeout=240)
        assert process.returncode == 0, problem[-3000:]
    assert [json.loads((tmp_path / f"chosen{rank}.json").read_text()) for rank in range(2)] == [["norms", 0]] * 2


@pytest.mark.gpu
def test_a_gpu_says_itself_when_there_is_no_more() -> None:
    world = World(device=torch.device("cuda"))

    def trainer() -> Trainer:
        return trainer_of(unet(), 256, world=world)

    peaks = {}
    for what in ("none", "norms", "all"):
        steps = trainer()
        set_recompute(steps.net, what)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            steps.step(batch_of(256, 64))
        peaks[what] = torch.cuda.max_memory_allocated() / GIB
        del steps
    torch.cuda.empty_cache()
    assert peaks["all"] < peaks["norms"] < peaks["none"]
    try:
        for limit, keeps in ((1.5 * peaks["none"], True), ((peaks["norms"] + peaks["none"]) / 2, False)):
            chosen = trainer()
            fit(chosen, batch_of(256, 64), recompute=True, shrink=False, limit_gb=limit)
            assert (recomputed_by(chosen.net) == "none") == keeps
            torch.empty(int(limit * GIB), dtype=torch.uint8, device="cuda")  # the limit held for the trials only
            chosen.step(batch_of(256, 64))
            del chosen
        chosen = trainer()
        fit(chosen, batch_of(256, 64), recompute=True, shrink=True, limit_gb=0.5 * peaks["all"])
        assert recomputed_by(chosen.net) == "all" and 0 < chosen.microbatch < 256
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- Flags


def test_contradicting_flags_are_refused_and_old_names_are_read() -> None:
    read = RunConfig.from_flags
    for kind, flags, words in (
        ("diffusion", {"recompute": "none", "use_checkpoint": True}, "--recompute 'none' .* one of the two"),
        ("diffusion", {"recompute": "norms", "use_checkpoint": True}, "--recompute 'norms' .* one of the two"),
        ("classifier", {"recompute": "norms", "compile": True}, "--recompute 'norms' has no effect with --compile"),
        ("diffusion", {"memory_limit_gb": 3.0}, "--memory_limit_gb 3 .* --recompute auto"),
        ("classifier", {"recompute": "some"}, "--recompute is 'some'"),
    ):
        with pytest.raises(ValueError, match=words):
            read(kind, flags)
    for kind in ("diffusion", "super_resolution", "classifier"):
        config = read(kind, {"recompute": "auto", "memory_limit_gb": 3.0, "use_checkpoint": True})
        assert RunConfig.from_dict(kind, config.to_dict()) == config
        stored = config.to_dict()
        stored["train"]["checkpoint"] = stored["train"].pop("recompute")  # as earlier versions called it
        assert RunConfig.from_dict(kind, stored) == config
        for name in ("checkpoint", "memory_limit_gb"):  # the file of an older run
            del stored["train"][name]
        assert RunConfig.from_dict(kind, stored).train.recompute == ""


def test_the_old_flag_is_read_and_not_shown(capsys: Any) -> None:
    from guided_diffusion.cli.train import flags

    for words in (["--checkpoint", "norms"], ["--checkpoint=norms"], ["--recompute", "norms"]):
        assert flags(words, "diffusion", "train").typed == {"recompute": "norms"}
    with pytest.raises(SystemExit):
        flags(["--help"], "diffusion", "train")
    shown = capsys.readouterr().out
    assert "--recompute" in shown and "--checkpoint " not in shown
