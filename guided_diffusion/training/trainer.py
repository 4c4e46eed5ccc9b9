"""One training loop for generators and classifiers, on one process or many, that continues exactly where it stopped.

A step depends only on its batch, the saved state and the numbers (seed, step, position in the global batch): these seed
the `Streams` of noise and time steps, and the global generator, which dropout uses, is re-seeded from (seed, step, rank).
So 2N steps equal N steps, a restart, and N more, bit for bit, on the same number of processes; and, dropout aside, any
number of processes computes the same step up to rounding.

Between log lines nothing waits for the device: losses, norms and the decision to skip a bad step stay there as tensors.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..diffusion.timesteps import Timesteps
from ..runtime.devices import compute_in
from ..runtime.log import Log
from ..runtime.signals import Agreement, Stop
from ..runtime.streams import TRAIN, Streams, key_of
from ..runtime.world import World
from ..weights.files import load_weights_into
from ..weights.runs import SavedRun
from . import batching, incident, optimizer
from .ema import EMA
from .losses import Interval, Losses, LossFn
from .optimizer import learning_rate, total_norm
from .parallel import distributed, unwrapped
from .precision import Precision, store_as_used, weights_cast_once
from .saver import Checkpoints, load_tensors

Callback = tuple[int, Callable[["Trainer"], None]]
_log = logging.getLogger(__name__)


class Trainer:
    """Updates a network's weights from batches. See `__init__` for the parts; `step` for one update; `run` for many."""

    def __init__(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any] | Callable[[int], Iterable[Any]],
        *,
        lr: float = 1e-4,
        lr_anneal_steps: int = 0,
        lr_warmup_steps: int = 0,
        weight_decay: float = 0.0,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        shard_optimizer: bool = False,
        shard_ema: bool = False,
        ema_rates: Sequence[float] = (0.9999,),
        ema_sigma_rels: Sequence[float] = (),
        precision: str = "fp32",
        fp16_scale_growth: float = 1e-3,
        batch_size: int | None = None,
        microbatch: int = 0,
        max_grad_norm: float = 0.0,
        max_bad_steps: int = 10,
        seed: int = 0,
        schedule_sampler: Timesteps | None = None,
        callbacks: Sequence[Callback] = (),
        world: World | None = None,
        ddp_options: Mapping[str, Any] | None = None,
        log: Log | None = None,
        log_every: int = 10,
        progress: bool = False,
        checkpoints: Checkpoints | None = None,
        save_every: int = 10_000,
        stop: Stop | None = None,
    ) -> None:
        """Put `net` on the world's device and get ready; no step is taken.

        `loss_fn(net, microbatch, streams)` returns per-example `Losses`. `batches` yields this process's share of each
        global batch, a NamedTuple or dict of tensors with the examples along dim 0; a field `positions` holds the
        examples' indices in the global batch. Or `batches` is a function `first step -> iterable`, with which a resumed
        run continues at the right data.

        `batch_size` counts the GLOBAL batch (None: length of the batch times world size). `microbatch`: examples per
        forward pass on one process, 0 = all; the result does not depend on it. `max_grad_norm`: clip to this total
        gradient norm, 0 = off. `max_bad_steps`: end the run after so many non-finite steps in a row, 0 = never (on a GPU
        checked at log lines only). `callbacks`: `(n, f)` calls `f(trainer)` on every process after each n-th step.
        `schedule_sampler`: learns from the losses of each step, and is part of a save.
        `stop`: when it is requested on one process, all save and return from `run`. `make_optimizer` replaces AdamW.
        `shard_optimizer` divides the optimizer's state among the processes, `shard_ema` the EMA; results do not change.
        """
        self.world = World() if world is None else world
        self.device = self.world.device
        self.net = net.to(self.device)
        self.loss_fn = loss_fn
        self.precision = Precision(precision, device=self.device, growth=fp16_scale_growth)
        compute_in(unwrapped(net), precision)
        store_as_used(net)
        several = self.world.size > 1
        self.model: nn.Module = distributed(self.net, self.device, ddp_options) if several else self.net
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        if make_optimizer is not None:
            self.optimizer = make_optimizer(self.params)
        else:
            shard = shard_optimizer and several
            self.optimizer = optimizer.make_adamw(self.params, lr=lr, weight_decay=weight_decay, shard=shard)
        self.ema = EMA(unwrapped(net), ema_rates, ema_sigma_rels, world=self.world if shard_ema else None)
        self.lr, self.lr_anneal_steps, self.lr_warmup_steps = lr, lr_anneal_steps, lr_warmup_steps
        self.batch_size, self.microbatch = batch_size, microbatch
        self.max_grad_norm, self.max_bad_steps = max_grad_norm, max_bad_steps
        self.seed, self.schedule_sampler = seed, schedule_sampler
        # A sampler without state (uniform) learns nothing, and gathering losses would cost a device sync per step.
        self._sampler_learns = schedule_sampler is not None and bool(schedule_sampler.state_dict())
        self.callbacks = list(callbacks)
        self.log, self.log_every, self.progress = log, log_every, progress
        self.checkpoints, self.save_every = checkpoints, save_every
        self.stop, self._agreement = stop, Agreement(self.world, stop or Stop())

        self.steps_done = self.samples_seen = 0
        self._feed = batching.Feed(batches)
        self.batch: Any = None  # of the latest step
        self._saved_at: int | None = None
        # DistributedDataParallel orders its buckets by registration in the first backward pass, later by arrival. The order
        # in which more than two processes add a number depends on its position in a bucket. So the first step after a
        # restart would differ in the last bit from an uninterrupted run: `step` runs one pass more, and discards it.
        self._buckets_will_change = self.world.size > 2
        self._interval = Interval(self.device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._bad_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)

    # ---- One step

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One update from this process's share of a global batch. Returns scalar tensors without a device sync:

        "loss" (this process's mean), "grad_norm" (of the global batch, before clipping), "skipped" (bool).
        """
        self.batch = batch
        local, size = batching.length(batch), self.world.size
        global_size = self.batch_size or local * size
        if local * size != global_size:
            raise ValueError(
                f"a batch of {local} on each of {size} processes does not make the batch size {global_size}"
            )
        if not self.net.training:
            self.net.train()
        parts = list(batching.split(batch, self.microbatch))
        positions = batching.positions(batch, self.world.rank, size)
        if self._buckets_will_change:  # `zero_grad` below discards the gradients of this pass
            self.forward_backward(parts[0], positions[: batching.length(parts[0])], global_size, last=True)
            self._buckets_will_change = False
        torch.manual_seed(key_of(self.seed, TRAIN, self.steps_done, self.world.rank))  # for dropout
        rate = learning_rate(
            self.steps_done, self.lr, anneal_steps=self.lr_anneal_steps, warmup_steps=self.lr_warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.optimizer.zero_grad(set_to_none=True)
        all_losses: list[Losses] = []
        with weights_cast_once(self.net):
            for k, (part, ids) in enumerate(zip(parts, positions.split([batching.length(part) for part in parts]))):
                losses = self.forward_backward(part, ids, global_size, last=k == len(parts) - 1)
                self._interval.add(losses)
                all_losses.append(losses)
        loss = torch.cat([losses.loss.detach() for losses in all_losses]).float().mean()
        grad_norm, bad = self._update(loss)
        self.ema.update(self.steps_done + 1)
        self._update_schedule_sampler(positions, all_losses)
        self._interval.count_step(grad_norm, bad)
        self.steps_done += 1
        self.samples_seen += global_size
        return {"loss": loss, "grad_norm": grad_norm, "skipped": bad}

    def forward_backward(self, part: Any, ids: Tensor, global_size: int, *, last: bool) -> Losses:
        """Accumulate the gradients of one microbatch; with the `last` of a step, average them over the processes."""
        without_sync = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if without_sync else contextlib.nullcontext():  # type: ignore[operator]
            losses = self.losses_of(self.model, part, ids)
            # DistributedDataParallel divides by the world size; what remains is the mean over the global batch.
            share = losses.loss.float().sum() * (self.world.size / global_size)
            with self.world.operation("sum of the gradients") if self.world.size > 1 else contextlib.nullcontext():
                self.precision.scale(share).backward()
        return Losses(losses.loss.detach(), losses.terms or {"loss": losses.loss}, *losses[2:])

    def losses_of(self, net: nn.Module, part: Any, ids: Tensor, step: int | None = None) -> Losses:
        """The losses of `net` on some examples, with the random numbers of a step (None: the next one)."""
        step = self.steps_done if step is None else step
        streams = Streams(self.seed, TRAIN, step, ids=ids, device=self.device)
        return self.loss_fn(net, batching.to_device(part, self.device), streams)

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the gradients unless they or the loss are not finite; (gradient norm, whether skipped) on the device."""
        grads = [p.grad for p in self.params if p.grad is not None]
        assert grads, "no parameter received a gradient"
        divisor = self.precision.divisor()
        grad_norm = total_norm(grads) if divisor is None else total_norm(grads) / divisor
        bad_loss = ~torch.isfinite(loss)
        bad = bad_loss | ~torch.isfinite(grad_norm)
        if self.world.size > 1:
            # One process alone may see a bad loss; all must take the same decision.
            bad_loss, bad = self.world.all_reduce_sum_(torch.stack([bad_loss, bad]).float(), name="bad step?") > 0
        if self.max_grad_norm > 0:
            excess = (grad_norm / self.max_grad_norm).clamp(min=1.0)
            divisor = excess if divisor is None else divisor * excess
        optimizer.guarded_step(self.optimizer, grads, divisor, bad)
        # A float16 overflow that a smaller loss scale can cure is no sign of trouble.
        alarming = bad & (bad_loss | self.precision.at_floor())
        self.precision.update(bad)
        self._skipped += bad
        self._bad_in_a_row = torch.where(alarming, self._bad_in_a_row + 1, torch.where(bad, self._bad_in_a_row, 0))
        return grad_norm, bad

    def _update_schedule_sampler(self, positions: Tensor, all_losses: Sequence[Losses]) -> None:
        """Update the schedule sampler with the global batch's losses in order of position, alike on all processes."""
        steps = [losses.i for losses in all_losses if losses.i is not None]
        if self.schedule_sampler is None or not self._sampler_learns or not steps:
            return
        raw = [(losses.loss if losses.raw is None else losses.raw).detach() for losses in all_losses]
        positions = positions.to(self.device, non_blocking=True)
        table = torch.stack([positions, torch.cat(steps), torch.cat(raw).float()], dim=1)
        table = self.world.all_gather_cat(table, name="losses for the schedule sampler")
        table = table[table[:, 0].argsort(stable=True)]
        self.schedule_sampler.update(table[:, 1].to(steps[0].dtype), table[:, 2])

    # ---- Many steps

    def run(self, until: int = 0) -> Literal["finished", "stopped"]:
        """Train up to `until` updates in all, or to `lr_anneal_steps` if that comes first; 0 for both: without end.

        Logs, saves and calls callbacks on the way, and saves at the end. Returns "stopped" if `stop` was requested.
        Raises `TrainingDiverged` after too many bad steps in a row, `SaveError` if the save of the last step failed.
        """
        if min(until, self.lr_anneal_steps) < 0:
            raise ValueError(
                f"a limit of training is negative: until={until}, lr_anneal_steps={self.lr_anneal_steps}; 0 is none"
            )
        target = min((limit for limit in (until, self.lr_anneal_steps) if limit), default=None)
        if target is None:
            _log.info("training without end: neither a last step nor lr_anneal_steps is set; interrupt it when done")
        elif self.steps_done >= target:
            _log.info(f"nothing to do: {self.steps_done} steps are done, {target} were asked for")
        clock = batching.Clock(self.world.is_main and self.progress, self.steps_done, target)
        outcome: Literal["finished", "stopped"] = "finished"
        try:
            if self.checkpoints is not None:
                self.checkpoints.wait()  # an interrupted save of the last state may still be written, from these tensors
            while target is None or self.steps_done < target:
                if self._should_stop():
                    outcome = "stopped"
                    break
                batch = self._feed.next(self.steps_done, clock)
                if batch is None:
                    _log.info("the data ended")
                    break
                self.world.context.step = self.steps_done
                self.step(batch)
                clock.count(batching.length(batch) * self.world.size)
                self._after_step(clock, last=self.steps_done == target)
            if self.checkpoints is not None and self._saved_at != self.steps_done:
                self.save(background=False)
            self._raise_save_failure(last=True)
        finally:
            clock.close()
            self._feed.close()
            if self.checkpoints is not None:
                self.checkpoints.wait()
        return outcome

    def _after_step(self, clock: batching.Clock, *, last: bool) -> None:
        log_line = self.log_every > 0 and self.steps_done % self.log_every == 0
        if self.max_bad_steps and (log_line or self.device.type == "cpu"):
            self._check_health()
        # Callbacks first, so that the columns they add stand in the log row of this step.
        due = [call for every, call in self.callbacks if every > 0 and self.steps_done % every == 0]
        if due:
            with clock.paused(self.device):
                for call in due:
                    call(self)
        if log_line:
            self._write_row(clock)
        due_save = self.save_every > 0 and self.steps_done % self.save_every == 0
        if self.checkpoints is not None and due_save and not last:  # `run` saves the last state, without copying it
            with clock.paused(self.device):
                self.save()

    def _write_row(self, clock: batching.Clock) -> None:
        """Write one log row: means since the last one. A collective; rank 0 writes."""
        row = self._interval.read(self.world, self._feed.unreadable)
        with torch.no_grad():
            row["param_norm"] = total_norm([p.detach() for p in self.params]).item()
        if self.precision.scales:
            row["lg_loss_scale"] = self.precision.lg_loss_scale.item()
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        row.update(clock.read(row.get("loss")))
        if self.log is not None:
            self.log.dump({"step": self.steps_done, "samples": self.samples_seen, **row})

    def _should_stop(self) -> bool:
        """Whether to stop early, the same answer on all processes. Also warns of a failed save."""
        if self.log is not None and self.log.reader_left and self.stop is not None:
            self.stop.request("nobody reads the output any more")
        if not self._agreement.due(self.steps_done):
            return False
        self._raise_save_failure()
        return self._agreement.stop(self.steps_done)

    def _raise_save_failure(self, *, last: bool = False) -> None:
        if self.checkpoints is not None:
            # None lets the end of `run` save again. Set before the call, as it may raise.
            saved_at, self._saved_at = self._saved_at, None
            if not self.checkpoints.raise_failure(self.steps_done if last else None):
                self._saved_at = saved_at

    def _check_health(self) -> None:
        """Raise `TrainingDiverged`, with evidence on disk, after too many bad steps in a row. Waits for the device."""
        in_a_row = int(self._bad_in_a_row.item())
        if in_a_row < self.max_bad_steps:
            return
        step, rank = self.steps_done - 1, self.world.rank
        part = next(batching.split(self.batch, self.microbatch))
        ids = batching.positions(self.batch, rank, self.world.size)[: batching.length(part)]
        incident.raise_diverged(
            f"{in_a_row} steps in a row, up to step {self.steps_done}, had losses or gradients that are not finite",
            saves=self.checkpoints,
            net=self.net,
            losses_again=lambda: self.losses_of(self.net, part, ids, step),
            step=step,
            batch=self.batch,
            precision=self.precision.state_dict(),
        )

    # ---- State

    def save(self, *, background: bool = True) -> None:
        """Save now, all processes together; writing goes on in the background, unless told otherwise: see `Checkpoints.save`."""
        if self.checkpoints is None:
            raise ValueError("this trainer has no checkpoints to save to; pass checkpoints=Checkpoints(folder)")
        state = self.state_dict()
        self._saved_at = self.steps_done
        parts = {part: state.pop(name) for part, name in (("model", "net"), ("ema", "ema"), ("optimizer", "optimizer"))}
        self.checkpoints.save(self.steps_done, **parts, state=state, background=background)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, by name. Tensors are not copied. A collective: call it on all processes."""
        return {
            "net": unwrapped(self.net).state_dict(),
            "ema": {name: self.ema.state_dict_of(name) for name in self.ema.names},
            "optimizer": optimizer.full_state_dict(self.optimizer, self.world.is_main),
            "precision": self.precision.state_dict(),
            "feedback": None if self.schedule_sampler is None else self.schedule_sampler.state_dict(),
            "step": self.steps_done,
            "samples": self.samples_seen,
            "skipped": int(self._skipped.item()),
            "bad_in_a_row": int(self._bad_in_a_row.item()),
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a result of `state_dict`."""
        load_weights_into(unwrapped(self.net), state["net"])
        for name in self.ema.names:
            self.ema.load_state_dict_of(name, state["ema"][name])
        optimizer.load_state(self.optimizer, state["optimizer"], self.params)
        self._load_counters(state)

    def _load_counters(self, state: Mapping[str, Any]) -> None:
        """Restore what is neither weights nor moments, and let the data begin again at the restored step."""
        self.precision.load_state_dict(state["precision"])
        if self.schedule_sampler is not None and state.get("feedback") is not None:
            self.schedule_sampler.load_state_dict(state["feedback"])
        self.steps_done, self.samples_seen = int(state["step"]), int(state["samples"])
        self._skipped.fill_(int(state.get("skipped", 0)))
        self._bad_in_a_row.fill_(int(state.get("bad_in_a_row", 0)))
        self._feed.restart()

    def restore(self, saved: SavedRun) -> list[str]:
        """Continue from a save on disk; returns, and logs, what was restored and what was not.

        Every process reads the files itself, and all fail together if one cannot.
        """
        lines = load_tensors(saved, unwrapped(self.net), self.ema, self.optimizer, self.params, world=self.world)
        if saved.state:
            if saved.state.get("seed") != self.seed:
                lines.append(f"note: the save was made with seed {saved.state.get('seed')}, this run has {self.seed}")
            self._load_counters(saved.state)
            lines.append(f"counters: {self.samples_seen} images seen; loss scale and schedule sampler as saved")
        else:
            # A save of 2021 has no counters.
            known = {"precision": self.precision.state_dict(), "step": saved.step}
            self._load_counters({**known, "samples": saved.step * (self.batch_size or 0)})
            lines.append(
                "counters, loss scale and the state of the schedule sampler: not saved, as in 2021, start afresh"
            )
        self._saved_at = self.steps_done
        for line in lines:
            _log.info(line)
        return lines
