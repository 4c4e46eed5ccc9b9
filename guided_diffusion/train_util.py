"""Door: the 2021 training loop, a class whose methods subclasses override. The package itself trains with `training.Trainer`.

File names, and "step" in them, are those of 2021: a save within the loop carries the index of the last update (`model000002.pt` holds
the weights after three updates), the one after the loop the number of updates.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch as th
import torch.distributed as dist
from torch.nn.parallel.distributed import DistributedDataParallel
from torch.nn.parallel.distributed import DistributedDataParallel as DDP
from torch.optim import AdamW

from . import dist_util, logger
from .dist_util import bf  # noqa: F401  a 2021 name of this module
from .fp16_util import MixedPrecisionTrainer
from .nn import update_ema
from .resample import LossAwareSampler, UniformSampler
from .runtime import storage as _storage
from .training import optimizer as _optimizer
from .training.optimizer import learning_rate as _learning_rate
from .training.parallel import distributed as _distributed
from .training.precision import INITIAL_LOG_LOSS_SCALE  # noqa: F401
from .weights import runs as _files


class TrainLoop:
    """Train a diffusion model on `data`, an endless iterator of `(images, {"y": labels})`. Works without a process group.

    `run_loop` calls `run_step`, which calls `forward_backward`, `_update_ema`, `_anneal_lr` and `log_step`; `save` writes files.
    """

    def __init__(
        self,
        *,
        model: Any,
        diffusion: Any,
        data: Iterator[tuple[th.Tensor, dict[str, th.Tensor]]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: Any = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = [ema_rate] if isinstance(ema_rate, float) else [float(x) for x in str(ema_rate).split(",")]
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps

        self.step = 0
        self.resume_step = 0
        self.global_batch = self.batch_size * _processes()
        self.sync_cuda = th.cuda.is_available()

        self._load_and_sync_parameters()
        self.mp_trainer = MixedPrecisionTrainer(
            model=self.model, use_fp16=self.use_fp16, fp16_scale_growth=fp16_scale_growth
        )
        self.opt = AdamW(self.mp_trainer.master_params, lr=self.lr, weight_decay=self.weight_decay)
        if self.resume_step:
            self._load_optimizer_state()
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
        else:
            self.ema_params = [copy.deepcopy(self.mp_trainer.master_params) for _ in self.ema_rate]

        self.use_ddp = _processes() > 1
        self.ddp_model = self.model
        if self.use_ddp:
            device = dist_util.dev()
            if DDP is DistributedDataParallel:
                self.ddp_model = _distributed(self.model, device)
            else:  # a program has put its own in place
                ids = [device] if device.type == "cuda" else None
                options: dict[str, Any] = {
                    "broadcast_buffers": False,
                    "bucket_cap_mb": 128,
                    "find_unused_parameters": False,
                }
                self.ddp_model = DDP(self.model, device_ids=ids, output_device=ids and device, **options)

    def _load_and_sync_parameters(self) -> None:
        """Every process reads the weights for itself; rank 0's are then everybody's."""
        resume_checkpoint = find_resume_checkpoint() or self.resume_checkpoint
        if resume_checkpoint:
            self.resume_step = parse_resume_step_from_filename(resume_checkpoint)
            logger.log(f"loading model from checkpoint: {resume_checkpoint}...")
            if not self.resume_step:
                logger.log("this file name has no step: optimizer and averages start afresh, at step 0")
            self.model.load_state_dict(dist_util.load_state_dict(resume_checkpoint, map_location=dist_util.dev()))
        dist_util.sync_params(self.model.parameters())

    def _load_ema_parameters(self, rate: float) -> Any:
        main_checkpoint = find_resume_checkpoint() or self.resume_checkpoint
        ema_checkpoint = find_ema_checkpoint(main_checkpoint, self.resume_step, rate)
        ema_params: Any = copy.deepcopy(self.mp_trainer.master_params)
        if ema_checkpoint:
            logger.log(f"loading EMA from checkpoint: {ema_checkpoint}...")
            state_dict = dist_util.load_state_dict(ema_checkpoint, map_location=dist_util.dev())
            ema_params = self.mp_trainer.state_dict_to_master_params(state_dict)
        else:
            logger.log(f"no EMA of rate {rate} beside {main_checkpoint}: it starts from the weights")
        dist_util.sync_params(ema_params)
        return ema_params

    def _load_optimizer_state(self) -> None:
        main_checkpoint = find_resume_checkpoint() or self.resume_checkpoint
        path = _storage.join(os.path.dirname(main_checkpoint), _files.file_name("opt", self.resume_step))
        if _storage.exists(path):
            logger.log(f"loading optimizer state from checkpoint: {path}")
            state = dist_util.load_state_dict(path, map_location=dist_util.dev())
            # Moments and counts only: rate and decay are those of this loop, not of the one that wrote the file.
            model_params, master_params = list(self.model.parameters()), self.mp_trainer.master_params
            moments = state.get("state", {})
            if len(moments) == len(model_params) != len(master_params) == 2 and "exp_avg" in moments[0]:
                state = {"state": _flattened(moments, model_params, master_params)}
            _optimizer.load_state(self.opt, state, master_params)
            for group in self.opt.param_groups:
                group["lr"] = _learning_rate(self.resume_step, self.lr, anneal_steps=self.lr_anneal_steps)
        else:
            logger.log(f"no optimizer state at {path}: it starts afresh")

    def run_loop(self) -> None:
        """Steps until `lr_anneal_steps`, or for ever if that is 0."""
        if not self.lr_anneal_steps:
            logger.log("training without end: lr_anneal_steps is 0; interrupt it when done")
        while not self.lr_anneal_steps or self.step + self.resume_step < self.lr_anneal_steps:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self.step % self.log_interval == 0:
                logger.dumpkvs()
            if self.step % self.save_interval == 0:
                self.save()
                # Integration tests of 2021 code end a run after its second save by this variable.
                if os.environ.get("DIFFUSION_TRAINING_TEST", "") and self.step > 0:
                    return
            self.step += 1
        if (self.step - 1) % self.save_interval != 0:
            self.save()

    def run_step(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """One update, its averages, the next learning rate, and the step's log entries."""
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
        self._anneal_lr()
        self.log_step()

    def forward_backward(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """Gradients of the batch, summed over the means of its microbatches, as in 2021."""
        self.mp_trainer.zero_grad()
        for start in range(0, batch.shape[0], self.microbatch):
            part = slice(start, start + self.microbatch)
            micro = batch[part].to(dist_util.dev())
            micro_cond = {k: v[part].to(dist_util.dev()) for k, v in cond.items()}
            last_batch = start + self.microbatch >= batch.shape[0]
            t, weights = self.schedule_sampler.sample(micro.shape[0], dist_util.dev())
            compute_losses = functools.partial(
                self.diffusion.training_losses, self.ddp_model, micro, t, model_kwargs=micro_cond
            )
            with contextlib.nullcontext() if last_batch or not self.use_ddp else self.ddp_model.no_sync():
                losses = compute_losses()
            if isinstance(self.schedule_sampler, LossAwareSampler):
                self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
            loss = (losses["loss"] * weights).mean()
            log_loss_dict(self.diffusion, t, {k: v * weights for k, v in losses.items()})
            self.mp_trainer.backward(loss)

    def _update_ema(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params):
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps:
            lr = _learning_rate(self.step + self.resume_step, self.lr, anneal_steps=self.lr_anneal_steps)
            for param_group in self.opt.param_groups:
                param_group["lr"] = lr

    def log_step(self) -> None:
        """The columns "step" and "samples"."""
        logger.logkv("step", self.step + self.resume_step)
        logger.logkv("samples", (self.step + self.resume_step + 1) * self.global_batch)

    def save(self) -> None:
        """Weights, averages and optimizer state into `get_blob_logdir()`, on rank 0; all processes wait for it."""
        step = self.step + self.resume_step
        named = {_files.file_name("model", step): self.mp_trainer.master_params}
        named |= {_files.file_name(f"ema_{rate}", step): params for rate, params in zip(self.ema_rate, self.ema_params)}
        main = not dist.is_initialized() or dist.get_rank() == 0
        for name, params in named.items():
            state = self.mp_trainer.master_params_to_state_dict(params)  # on all: an override may gather here
            if main:
                logger.log(f"saving {name}...")
                tensors = {
                    key: value.detach().contiguous() for key, value in state.items() if isinstance(value, th.Tensor)
                }
                _write(name, {**state, **tensors})
        if main:
            _write(_files.file_name("opt", step), self.opt.state_dict())
        if dist.is_initialized():
            dist.barrier()


def _flattened(moments: Any, model_params: list[Any], master_params: list[Any]) -> dict[int, Any]:
    """Moments of each of the model's parameters, as moments of the two flat ones of a float16 run."""
    out: dict[int, dict[str, th.Tensor]] = {}
    for k, master in enumerate(master_params):
        members = [moments[m] for m, p in enumerate(model_params) if (p.dim() > 1) == bool(k)]
        pieces = {name: [entry[name].reshape(-1) for entry in members] for name in ("exp_avg", "exp_avg_sq")}
        if sum(piece.numel() for piece in pieces["exp_avg"]) != master.numel():
            raise ValueError(f"the optimizer file does not fit the {master.numel()} parameters of this network")
        out[k] = {name: th.cat(parts).reshape(master.shape) for name, parts in pieces.items()}
        out[k]["step"] = th.as_tensor(members[0]["step"], dtype=th.float32).clone()
    return out


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _write(name: str, content: Any) -> None:
    with _storage.atomic_write(_storage.join(get_blob_logdir(), name)) as file:
        th.save(content, file)


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in `path/to/modelNNNNNN.pt`; 0 for any other name."""
    split = filename.split("model")
    digits = split[-1].split(".")[0] if len(split) > 1 else ""
    return int(digits) if digits.isdecimal() else 0


def get_blob_logdir() -> str:
    """Where `save` writes: the logger's folder. Replace it to write elsewhere."""
    folder = logger.get_dir()
    assert folder is not None
    return folder


def find_resume_checkpoint() -> str | None:
    """A hook for clusters that know the checkpoint to continue from; None means `resume_checkpoint` decides."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The averaged weights beside `main_checkpoint`, if they exist."""
    if main_checkpoint is None:
        return None
    path = _storage.join(os.path.dirname(main_checkpoint), _files.file_name(f"ema_{rate}", step))
    return path if _storage.exists(path) else None


def log_loss_dict(diffusion: Any, ts: th.Tensor, losses: dict[str, th.Tensor]) -> None:
    """Log each loss `[B]`: its mean, and each example's under the quartile of its step; one read from the device."""
    quartiles = (4 * ts / diffusion.num_timesteps).long().tolist()
    for key, values in losses.items():
        numbers = values.detach().float().tolist()
        logger.logkv_mean(key, sum(numbers) / len(numbers))
        for quartile, number in zip(quartiles, numbers):
            logger.logkv_mean(f"{key}_q{quartile}", number)
