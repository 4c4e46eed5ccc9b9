"""`guided-diffusion doctor`: what would go wrong with this run on this machine, asked before it starts.

Takes the flags of the training command. Starts the same processes (`torchrun ... doctor`, `mpiexec -n 8 ... doctor`), reads a little of
the data, predicts memory and disk, prints one table; exit code 1 if something would fail.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import RunConfig
from . import runs
from .arguments import Parser, parse

if TYPE_CHECKING:
    from torch import nn

    from ..runtime.doctor import Finding
    from ..runtime.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Examine device, processes, data, memory and disk; returns 0, or 1 if a check failed."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--kind", default="diffusion")
    kind = first.parse_known_args(argv)[0].kind
    extra = {
        "kind": ("diffusion", "diffusion, super_resolution or classifier"),
        "out": ("", "the run folder, whose disk is looked at; empty = here"),
        "measure": (False, "also take a few training steps on noise: images per second, memory, days"),
    }
    sections = RunConfig.sections(kind)
    flags = parse(
        argv,
        list(sections.values()),
        program="doctor",
        description=str(__doc__),
        extra=extra,
        defaults={"microbatch": 0},  # as `train` has it
    ).flags

    from ..runtime import doctor

    with runs.session(flags, timeout_s=300.0) as world:
        local = [doctor.check_device(world)]
        if world.is_main:
            local = [doctor.check_versions(), *local]
        shared = [doctor.check_all_reduce(world)]
        if world.is_main:
            shared += _check_run(kind, flags, world)
        gathered = world.all_gather_object((local, shared if world.is_main else []), "doctor: findings")
        findings = [
            finding._replace(
                what=f"{finding.what} {rank}" if world.size > 1 and finding.what == "device" else finding.what
            )
            for rank, (own, _) in enumerate(gathered)
            for finding in own
        ] + gathered[0][1]
        if world.is_main:
            print(doctor.report(findings), flush=True)
        return int(any(finding.status == doctor.FAIL for finding in findings))


def _check_run(kind: str, flags: dict[str, Any], world: World) -> list[Finding]:
    """What follows from the flags: data, memory, disk. Rank 0 alone."""
    from ..runtime.doctor import FAIL, OK, WARN, Finding, check_disk

    try:
        config = RunConfig.from_flags(kind, flags).validate()
        net = _network_of_shapes(config)
    except ValueError as error:
        return [Finding(FAIL, "flags", str(error))]
    findings = (
        _check_data(config, world)
        if config.data.data_dir
        else [Finding(WARN, "data", "no --data_dir given: not looked at")]
    )
    count = sum(p.numel() for p in net.parameters())
    findings.append(Finding(OK, "network", f"{count / 1e6:.2f} million parameters"))
    memory, passes = _check_memory(config, net, world)
    findings.append(memory)
    if flags["measure"] and memory.status != FAIL:
        findings.append(_measure(config, world, passes))
    train = config.train
    one_save = 4 * count * (1 + len(train.ema_rates)) + 8 * count
    saves = train.last_step // train.save_interval + 1 if train.last_step else None
    if train.keep_last:
        kept_for_good = train.last_step // train.keep_every if train.keep_every else 0
        saves = min(saves or train.keep_last, train.keep_last) + kept_for_good
    findings.append(check_disk(flags["out"] or os.getcwd(), one_save, saves))
    return findings


def _network_of_shapes(config: RunConfig) -> nn.Module:
    """The network on the meta device: shapes without numbers, so a 500-million-parameter network costs nothing."""
    import torch

    from ..build import build_network

    with torch.device("meta"):
        return build_network(config.model, config.diffusion)


def _check_data(config: RunConfig, world: World) -> list[Finding]:
    """List the records, compare them with the batch, and read one batch."""
    from ..build import build_batches
    from ..data.listing import list_records
    from ..runtime.doctor import FAIL, OK, WARN, Finding

    data, size = config.data, world.size
    try:
        start = time.perf_counter()
        wants_labels = getattr(config.model, "class_cond", config.kind == "classifier")
        records = list_records(data.data_dir, labels=data.labels if wants_labels else "none")
        text = f"{len(records)} images in {data.data_dir}, listed in {time.perf_counter() - start:.1f} s; "
        text += f"labels: {records.label_source}" + (
            f", {len(records.class_names)} classes" if records.class_names else ""
        )
        findings = [Finding(OK, "data", text)]
        if wants_labels:
            records.require_labels()
    except (ValueError, OSError, ImportError) as error:
        return [Finding(FAIL, "data", str(error))]
    total = config.train.global_batch_size or config.train.batch_size * size
    try:
        start = time.perf_counter()
        batches = build_batches(
            records, data, config.model, batch_size=total, rank=0, size=size, seed=config.train.seed
        )
        try:
            own = len(next(batches).images)
            first = time.perf_counter() - start
            start = time.perf_counter()
            next(batches)
            second = time.perf_counter() - start
        finally:
            batches.close()
    except (ValueError, OSError) as error:
        return [*findings, Finding(FAIL, "batch", str(error))]
    text = f"{total} images per step over {size} processes, {len(records) / total:.1f} steps per epoch; "
    text += f"read at {own / min(first, second):.0f} images/s here"
    few = len(records) < 2 * total
    return [
        *findings,
        Finding(WARN if few else OK, "batch", text + (": fewer than two steps per epoch" if few else "")),
    ]


class _Pass(NamedTuple):
    """A forward and backward pass of training, as far as it can be told beforehand: images at a time, what is recomputed."""

    images: int
    recompute: str


def _check_memory(config: RunConfig, net: nn.Module, world: World) -> tuple[Finding, _Pass]:
    """Compare predicted with free memory, and tell what makes the passes fit; returns them as they will be."""
    from ..runtime.doctor import FAIL, OK, WARN, Finding, format_bytes
    from ..runtime.fitting import half

    train, on_gpu = config.train, world.device.type == "cuda"
    part, told = _images_at_a_time(config, world), train.checkpoint
    state, free = _state_bytes(config, net, world), _free_bytes(config, world)

    def bytes_of(recompute: str) -> tuple[int, int]:
        recompute = recompute if recompute in ("norms", "all") else "none"  # the network still is as asked before
        return activation_bytes(replace(config, train=replace(train, checkpoint=recompute)), net, world.device.type)

    def room(recompute: str) -> int:
        """How many images at a time there is room for."""
        fixed, each = bytes_of(recompute)
        return max(0, int((free - state - fixed) // max(each, 1)))

    fixed, per_image = bytes_of(told)
    need = state + fixed + part * per_image
    text = (
        f"about {format_bytes(need)} to train {part} images at a time: {format_bytes(state)} weights, gradients, Adam, EMA + "
        f"{format_bytes(fixed + part * per_image)} activations ({format_bytes(per_image)} per image); {format_bytes(free)} free"
    )
    if not free or need <= free:
        return Finding(WARN if free and need > 0.85 * free else OK, "memory", text), _Pass(part, told)

    ways = ("all",) if train.compile else ("norms", "all")  # a compiled network chooses for itself in between
    if told == "auto":
        found = next((_Pass(part, way) for way in ways if room(way) >= part), None)
        if found is not None:
            return Finding(WARN, "memory", f"{text}. --checkpoint auto will make it fit"), found
    final = "all" if told == "auto" else told
    if train.microbatch == 0 and (on_gpu or told == "auto") and room(final):
        images = part
        while images > room(final):
            images = half(images)
        finding = Finding(WARN, "memory", f"{text}. --microbatch auto will make it fit, {images} images at a time")
        return finding, _Pass(images, final)

    remedies = [f"--checkpoint {way}" for way in ways if room(way) >= part and told != "auto"][:1]
    if room(final):
        remedies.append(f"--microbatch {room(final)}")
    if not remedies and room("all"):
        remedies.append(f"--checkpoint all --microbatch {room('all')}")
    if remedies:
        return Finding(FAIL, "memory", f"{text}. {' or '.join(remedies)} would fit"), _Pass(part, told)
    smaller = "fewer channels" if train.precision == "bf16" else "--precision bf16, or fewer channels"
    return Finding(FAIL, "memory", f"{text}. Not even one image fits: {smaller}"), _Pass(part, told)


def _state_bytes(config: RunConfig, net: nn.Module, world: World) -> int:
    """float32 weights, gradients and two moments of Adam; a copy per EMA rate; the buckets that gradients travel in."""
    train, count = config.train, sum(p.numel() for p in net.parameters())
    moments = 8 / (world.size if train.shard_optimizer else 1)
    averages = 4 * len(train.ema_rates) / (world.size if train.shard_ema else 1)
    return int(count * (8 + moments + averages + (4 if world.size > 1 else 0)))


def _free_bytes(config: RunConfig, world: World) -> int:
    """Free memory of the device, this process's share of it, or what --memory_limit_gb leaves if that is less."""
    from ..runtime import memory
    from ..runtime.doctor import available_memory

    free = available_memory(world.device) // (1 if world.device.type == "cuda" else max(1, world.local_size))
    if config.train.memory_limit_gb:
        free = min(free, max(1, int(config.train.memory_limit_gb * 2**30) - memory.used(world.device)))
    return free


def activation_bytes(config: RunConfig, net: nn.Module, device_type: str) -> tuple[int, int]:
    """(bytes that do not grow with the batch, bytes per image) kept between forward and backward pass.

    Counted, not measured: the network runs on the meta device and every tensor that autograd keeps is added up once. Left out are
    the workspaces of kernels and the allocator's rounding. Attention is counted as its fused kernels do it, without a T x T matrix,
    and so are norms, but on a GPU without Triton.
    """
    import torch

    _as_told(config, net, device_type)
    own = {p.untyped_storage()._cdata for p in net.parameters()}

    def kept(batch: int) -> int:
        sizes: dict[int, int] = {}
        alive = []  # ids are only unique among living storages

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in sizes:
                sizes[storage._cdata] = storage.nbytes()
                alive.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _as_on_a_device():
            _forward(config, net, batch, "meta")
        return sum(sizes.values())

    one, two = kept(1), kept(2)
    return max(0, 2 * one - two), two - one


def _images_at_a_time(config: RunConfig, world: World) -> int:
    train = config.train
    own = train.global_batch_size // world.size if train.global_batch_size else train.batch_size
    return min(own, train.microbatch) if train.microbatch > 0 else own


def _as_told(config: RunConfig, net: nn.Module, device_type: str) -> None:
    """Let the network compute in the precision, and recompute what, the flags say."""
    import torch

    from ..build import DTYPES, choose_precision
    from ..models import fused_norm
    from ..training.measuring import blocks_of, recompute, set_recomputing

    use_fp16 = getattr(config.model, "use_fp16", False) or getattr(config.model, "classifier_use_fp16", False)
    precision = choose_precision(config.train.precision, use_fp16, torch.device(device_type))
    net.set_compute_dtype(DTYPES[precision])  # type: ignore[operator]
    if device_type == "cuda" and not fused_norm.available():
        net.set_fused_norm(False)  # type: ignore[operator]
    recompute(net, config.train.checkpoint)
    if getattr(config.model, "use_checkpoint", False):
        set_recomputing(net, blocks_of(net))


def _forward(config: RunConfig, net: nn.Module, batch: int, device: Any) -> Any:
    """The network's answer to `batch` images of noise."""
    import torch

    model = config.model
    x = torch.randn(batch, model.image_channels, model.sample_size, model.sample_size, device=device)
    cond: dict[str, Any] = {}
    if getattr(model, "class_cond", False):
        cond["y"] = torch.zeros(batch, dtype=torch.int64, device=device)
    if config.kind == "super_resolution":
        small: int = model.small_size  # type: ignore[union-attr]
        cond["low_res"] = torch.randn(batch, model.image_channels, small, small, device=device)
    return net(x.contiguous(memory_format=torch.channels_last), torch.zeros(batch, device=device), **cond)


def _measure(config: RunConfig, world: World, passes: _Pass, steps: int = 3) -> Finding:
    """Time forward, backward and AdamW on noise, in such passes, after one step of warm-up.

    What the processes say to each other is left out.
    """
    import torch

    from ..build import build_network
    from ..runtime.doctor import FAIL, OK, Finding, format_bytes

    device, part = world.device, passes.images
    config = replace(config, train=replace(config.train, checkpoint=passes.recompute))
    own = config.train.global_batch_size // world.size or config.train.batch_size
    try:
        net = build_network(config.model, config.diffusion, seed=0).to(device)
        _as_told(config, net, device.type)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
        for step in range(steps + 1):
            if step == 1:
                _wait_for(device)
                start = time.perf_counter()
            optimizer.zero_grad()
            _forward(config, net, part, device).float().square().mean().backward()
            optimizer.step()
        _wait_for(device)
    except RuntimeError as error:  # out of memory, most of all
        return Finding(FAIL, "speed", f"{part} images at a time: {str(error).splitlines()[0]}")
    rate = part * steps / (time.perf_counter() - start)
    text = f"{rate:.3g} images/s on this process"
    if world.device.type == "cuda":
        text += f", {format_bytes(torch.cuda.max_memory_allocated(device))} at most in use"
    if config.train.last_step:
        text += f"; {config.train.last_step} steps of {own} images take {config.train.last_step * own / rate / 86400:.3g} days"
    return Finding(OK, "speed", text)


def _wait_for(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _as_on_a_device() -> Any:
    """While active, the meta device keeps what others do: torch would take the plain formula of attention, and forget layouts."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out = torch.empty_like(q)
            log_sum_exp = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
            ctx.save_for_backward(q, k, v, out, log_sum_exp)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError("only counted, never run backwards")

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                return Fused.apply(*args[:3])
            answer = func(*args, **(kwargs or {}))
            if func is torch.conv2d:  # on the meta device it forgets the layout
                return answer.contiguous(memory_format=torch.channels_last)
            return answer

    return Mode()
