"""`guided-diffusion doctor`: find out before a training run starts what would fail on this machine.

It takes the flags of the training command, `--kind` and `--measure`, and resolves them as training does. Start it with as many
processes as the run (`torchrun ... doctor`, `mpiexec -n 8 ... doctor`). It reads a little of the data, predicts memory and disk
space, and prints one table; exit code 1 if something would fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, flag
from . import runs, train
from .arguments import Parsed, Parser

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..runtime.doctor import Finding
    from ..runtime.world import World
    from ..training.memory import StepPlan


@dataclass(frozen=True)
class DoctorFlags(train.StartFlags):
    """What would go wrong with this run on this machine, asked before it starts, with the flags of the training command.

    Start the same processes (`torchrun ... doctor`); exit code 1 if something would fail."""

    kind: str = flag("diffusion", "diffusion, super_resolution or classifier")
    out: str = flag("", "the run folder, whose free disk space is checked; empty = working directory")
    measure: bool = flag(False, "also take a few training steps on noise: images per second, memory, days")
    timeout_s: float = flag(300.0, "seconds that a process waits for the others before it ends with an error")


def main(argv: Sequence[str], program: str = "guided-diffusion doctor") -> int:
    """Examine device, processes, data, memory and disk; returns 0, or 1 if a check failed."""
    first = Parser(add_help=False)
    first.add_argument("--kind", default="diffusion")
    kind = first.parse_known_args(argv)[0].kind
    RunConfig.sections(kind)  # raises ValueError for an unknown kind
    parsed = train.flags(argv, kind, program, start=DoctorFlags)

    from ..runtime import doctor

    values = parsed.flags
    options = {name: values[name] for name in ("debug", "timeout_s", "tf32")}
    with runs.session(values["device"], **options) as world:
        found = world.all_gather_object(doctor.check_device(world), "doctor: devices")
        if world.size > 1:
            found = [device._replace(what=f"device {rank}") for rank, device in enumerate(found)]
        all_reduce = doctor.check_all_reduce(world)
        if world.is_main:
            found = [doctor.check_versions(), *found, all_reduce, *_check_run(kind, parsed, world)]
            print(doctor.report(found), flush=True)
        found = world.broadcast_object(found, name="doctor: findings")
        return int(any(finding.status == doctor.FAIL for finding in found))


def _check_run(kind: str, parsed: Parsed, world: World) -> list[Finding]:
    """Check the flags, data, network, memory, speed and disk of a run. Called on rank 0 only."""
    import torch

    from ..build import build_batches, build_network
    from ..runtime.devices import choose_precision, require_compiler
    from ..runtime.doctor import FAIL, OK, WARN, Finding, check_disk, planned_saves
    from ..runtime.world import World
    from ..training import checks
    from ..training.memory import StepPlan, set_recompute
    from ..weights.continuing import with_global_batch
    from ..weights.probe import forward_of
    from . import training_run

    try:
        train.check_start(parsed, kind)
        folder, _ = runs.run_folder(parsed.flags["out"], kind)
        alone = World(device=world.device)  # of one process: no other rank takes part in reading the checkpoint
        config, saved, start = training_run.configured(parsed, kind, alone, folder)
        config = with_global_batch(config, world.size)
        if config.train.compile == "on":
            require_compiler(world.device)
        with torch.device("meta"):  # shapes without memory: a network of any size costs nothing
            net = build_network(config.model, config.diffusion)
    except (ValueError, OSError) as error:
        return [Finding(FAIL, "flags", str(error))]
    options, batch_size = config.train, config.train.global_batch_size
    findings = [Finding(WARN, "data", "no --data_dir given: not checked")]
    if config.data.data_dir:
        finding, records = checks.check_data(lambda: training_run.list_images(config, saved, start)[1])
        findings = [finding]
        if records is not None:
            make = partial(build_batches, records, config, batch_size=batch_size, size=world.size)
            findings.append(checks.check_batches(make, records, batch_size, world.size))
    count = sum(p.numel() for p in net.parameters())
    findings.append(Finding(OK, "network", f"{count / 1e6:.2f} million parameters"))
    findings += check_norms(world.device, choose_precision(options.precision, config.model.fp16, world.device))
    local_batch = batch_size // world.size
    images = min(local_batch, options.microbatch) if options.microbatch > 0 else local_batch
    try:
        memory, plan = _check_memory(config, net, world, images)
    except ValueError as error:  # such as a --recompute that this network does not support
        memory, plan = Finding(FAIL, "memory", str(error)), StepPlan("none", images)
    findings.append(memory)

    def build_step() -> tuple[nn.Module, Callable[[], Any]]:
        """The network on the device instead of the meta device, and its forward pass on as many images as fit."""
        on_device = build_network(config.model, config.diffusion, seed=0, device=world.device)
        set_recompute(on_device, plan.recompute)
        return on_device, partial(forward_of(config, on_device, world.device), plan.images)

    if parsed.flags["measure"] and memory.status != FAIL:
        run = {"last_step": options.last_step, "own_batch": local_batch}
        findings.append(checks.check_speed(build_step, plan, world.device, **run))
    # Bytes of a save: float32 weights, raw and of each average, and two moments of Adam.
    one_save = 4 * count * (1 + len(options.ema_rates) + len(options.ema_sigma_rels)) + 8 * count
    saves = planned_saves(options.last_step, options.save_interval, options.keep_last, options.keep_every)
    return [*findings, check_disk(parsed.flags["out"] or os.getcwd(), one_save, saves)]


def check_norms(device: torch.device, precision: str) -> list[Finding]:
    """On a GPU: whether norms are fused there."""
    from ..models.kernels import norm
    from ..runtime.devices import DTYPES
    from ..runtime.doctor import OK, WARN, Finding

    if device.type != "cuda":
        return []
    if norm.triton_kernels(device, DTYPES[precision]):
        return [Finding(OK, "norms", "fused, by Triton")]
    installed = norm.available()
    why = "it does not run on this GPU, as a warning says" if installed else "it is not installed: pip install triton"
    text = f"by torch's kernels, which turn every feature map's layout, and not by Triton's: {why}"
    return [Finding(WARN, "norms", text)]


def _check_memory(config: RunConfig, net: nn.Module, world: World, images: int) -> tuple[Finding, StepPlan]:
    """Check the memory of a forward and backward pass on `images` images. net: on the meta device."""
    from ..runtime.devices import choose_precision
    from ..training import checks
    from ..weights.probe import forward_of

    options = config.train
    return checks.check_memory(
        net,
        forward_of(config, net, world.device),
        images,
        world,
        recompute=options.recompute or ("all" if getattr(config.model, "use_checkpoint", False) else "none"),
        shrink=options.microbatch == 0,
        compiled=options.compile == "on",
        averages=len(options.ema_rates) + len(options.ema_sigma_rels),
        shard_optimizer=options.shard_optimizer,
        shard_ema=options.shard_ema,
        limit_gb=options.memory_limit_gb,
        precision=choose_precision(options.precision, config.model.fp16, world.device),
    )
