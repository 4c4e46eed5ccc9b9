"""`guided-diffusion doctor`: what would go wrong with this run on this machine, asked before it starts.

Takes the flags of the training command, `--kind` and `--measure`, and resolves them as it does. Starts the same processes (`torchrun ...
doctor`, `mpiexec -n 8 ... doctor`), reads a little of the data, predicts memory and disk, prints one table; exit code 1 if something
would fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, flag
from . import runs, train
from .arguments import Parsed, Parser

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.listing import Records
    from ..runtime.doctor import Finding
    from ..runtime.world import World
    from ..training.memory import StepPlan


@dataclass(frozen=True)
class DoctorFlags(train.StartFlags):
    """What would go wrong with this run on this machine, asked before it starts, with the flags of the training command.

    Start the same processes (`torchrun ... doctor`); exit code 1 if something would fail."""

    kind: str = flag("diffusion", "diffusion, super_resolution or classifier")
    out: str = flag("", "the run folder, whose disk is looked at; empty = working directory")
    measure: bool = flag(False, "also take a few training steps on noise: images per second, memory, days")
    timeout_s: float = flag(300.0, "seconds that a process waits for the others before it ends with an error")


def main(argv: Sequence[str], program: str = "guided-diffusion doctor") -> int:
    """Examine device, processes, data, memory and disk; returns 0, or 1 if a check failed."""
    first = Parser(add_help=False)
    first.add_argument("--kind", default="diffusion")
    kind = first.parse_known_args(argv)[0].kind
    RunConfig.sections(kind)  # complains about an unknown kind
    parsed = train.flags(argv, kind, program, start=DoctorFlags)

    from ..runtime import doctor

    values = parsed.flags
    with runs.session(values["device"], debug=values["debug"], timeout_s=values["timeout_s"]) as world:
        local = [doctor.check_device(world)]
        if world.is_main:
            local.insert(0, doctor.check_versions())
        shared = [doctor.check_all_reduce(world)]
        if world.is_main:
            shared += _check_run(kind, parsed, world)
        gathered = world.all_gather_object((local, shared), "doctor: findings")
        findings = [
            finding._replace(what=f"device {rank}") if world.size > 1 and finding.what == "device" else finding
            for rank, (own, _) in enumerate(gathered)
            for finding in own
        ] + gathered[0][1]
        if world.is_main:
            print(doctor.report(findings), flush=True)
        return int(any(finding.status == doctor.FAIL for finding in findings))


def _check_run(kind: str, parsed: Parsed, world: World) -> list[Finding]:
    """What follows from the flags: data, memory, speed, disk. Rank 0 alone."""
    import torch

    from ..build import build_batches, build_network
    from ..runtime.devices import require_compiler
    from ..runtime.doctor import FAIL, OK, WARN, Finding, check_disk, planned_saves
    from ..runtime.world import World
    from ..training import checks
    from ..training.memory import StepPlan
    from ..weights.continuing import with_classes, with_global_batch

    try:
        train.check_start(parsed, kind)
        folder, _ = runs.run_folder(parsed.flags["out"], kind)
        alone = World(device=world.device)  # the other processes take no part in reading what the run starts from
        config, saved, start = train.configured(parsed, kind, alone, folder)
        config = with_global_batch(config, world.size)
        if config.train.compile:
            require_compiler(world.device)
        with torch.device("meta"):  # shapes without numbers: a network of 500 million parameters costs nothing
            net = build_network(config.model, config.diffusion)
    except (ValueError, OSError) as error:
        return [Finding(FAIL, "flags", str(error))]
    options, batch_size = config.train, config.train.global_batch_size
    findings = [Finding(WARN, "data", "no --data_dir given: not looked at")]
    if config.data.data_dir:

        def list_images() -> Records:
            records, _ = train.list_images(config, saved, start)
            with_classes(config, records.class_names, records.root)
            return records

        finding, records = checks.check_data(list_images)
        findings = [finding]
        if records is not None:
            make = partial(build_batches, records, config, batch_size=batch_size, size=world.size)
            findings.append(checks.check_batches(make, records, batch_size, world.size))
    count = sum(p.numel() for p in net.parameters())
    findings.append(Finding(OK, "network", f"{count / 1e6:.2f} million parameters"))
    own = batch_size // world.size
    images = min(own, options.microbatch) if options.microbatch > 0 else own
    try:
        memory, plan = _check_memory(config, net, world, images)
    except ValueError as error:  # of what this network cannot do
        memory, plan = Finding(FAIL, "memory", str(error)), StepPlan("none", images)
    findings.append(memory)

    def on_the_device() -> tuple[nn.Module, Callable[[], Any]]:
        real = build_network(config.model, config.diffusion, seed=0).to(world.device)
        return real, partial(forward_of(config, real, plan.recompute, world.device), plan.images)

    if parsed.flags["measure"] and memory.status != FAIL:
        run = {"last_step": options.last_step, "own_batch": own}
        findings.append(checks.check_speed(on_the_device, plan, world.device, **run))
    one_save = 4 * count * (1 + len(options.ema_rates)) + 8 * count
    saves = planned_saves(options.last_step, options.save_interval, options.keep_last, options.keep_every)
    return [*findings, check_disk(parsed.flags["out"] or os.getcwd(), one_save, saves)]


def forward_of(config: RunConfig, net: nn.Module, recompute: str, device: torch.device) -> Callable[[int], Any]:
    """`net` on n images of noise, in the precision that a device computes in, recomputing what `recompute` says."""
    import torch

    from ..models.kernels import norm
    from ..runtime.devices import choose_precision, compute_in
    from ..training.memory import set_recompute
    from ..weights.probe import conditions

    model, where = config.model, next(net.parameters()).device
    half = getattr(model, "use_fp16", False) or getattr(model, "classifier_use_fp16", False)
    if device.type == "cuda" and hasattr(net, "set_fused_norm") and not norm.available():
        net.set_fused_norm(False)  # type: ignore[operator]
    compute_in(net, choose_precision(config.train.precision, half, device))
    set_recompute(net, recompute)

    def forward(count: int) -> Any:
        x = torch.randn(count, model.image_channels, *model.size, device=where)
        return net(x.contiguous(memory_format=torch.channels_last), x.new_zeros(count), **conditions(model, x))

    return forward


def _check_memory(config: RunConfig, net: nn.Module, world: World, images: int) -> tuple[Finding, StepPlan]:
    """The memory of steps of `images` at a time; `net` on the meta device."""
    from ..runtime.devices import available_memory, used_memory
    from ..training import checks
    from ..training.memory import attempts, can_recompute, kept_bytes

    options, on_gpu = config.train, world.device.type == "cuda"
    free = available_memory(world.device) // (1 if on_gpu else max(1, world.local_size))
    if options.memory_limit_gb:
        free = min(free, max(1, int(options.memory_limit_gb * 2**30) - used_memory(world.device)))
    can = [
        way for way in can_recompute(net) if way != "norms" or not options.compile
    ]  # a compiler chooses for itself in between
    recompute = options.recompute or ("all" if getattr(config.model, "use_checkpoint", False) else "none")
    auto = recompute == "auto"
    shrink = options.microbatch == 0 and (on_gpu or auto)
    state = checks.state_bytes(
        sum(p.numel() for p in net.parameters()),
        averages=len(options.ema_rates),
        processes=world.size,
        shard_optimizer=options.shard_optimizer,
        shard_ema=options.shard_ema,
    )
    return checks.check_memory(
        cache(lambda way: kept_bytes(forward_of(config, net, way, world.device), net.parameters())),
        attempts(can if auto else [recompute], images, shrink=shrink),
        can,
        state=state,
        free=free,
        precision=options.precision,
    )
