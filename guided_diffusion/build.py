"""Configuration -> objects: the one file that knows both. Networks, processes, losses, batches."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import (
    ClassifierConfig,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    Network,
    RunConfig,
    SuperResConfig,
    TrainConfig,
    classes_of,
)
from .data.listing import Records
from .data.loader import Batches, make_batches
from .diffusion.process import Process, make_process, rescale_time, respace, space_timesteps
from .diffusion.schedules import SCHEDULES, named_betas
from .diffusion.timesteps import LossSecondMoment, Timesteps, UniformTimesteps
from .models.unet import EncoderUNetModel, SuperResModel, UNetModel
from .runtime.streams import TRAIN, key_of

_log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Networks and processes


def network_options(model: Network, diffusion: DiffusionConfig | None = None) -> dict[str, Any]:
    """The arguments of a config's network."""
    if isinstance(model, ClassifierConfig):
        return {
            "image_size": model.image_size,
            "in_channels": model.image_channels,
            "model_channels": model.classifier_width,
            "out_channels": classes_of(model),
            "num_res_blocks": model.classifier_depth,
            "attention_resolutions": model.attention_downsamplings,
            "channel_mult": model.multipliers,
            "use_fp16": model.classifier_use_fp16,
            "num_head_channels": model.classifier_num_head_channels,
            "use_scale_shift_norm": model.classifier_use_scale_shift_norm,
            "resblock_updown": model.classifier_resblock_updown,
            "pool": model.classifier_pool,
        }
    return {
        "image_size": model.sample_size,
        "in_channels": model.image_channels,
        "model_channels": model.num_channels,
        "out_channels": model.image_channels * (2 if (diffusion or DiffusionConfig()).learn_sigma else 1),
        "num_res_blocks": model.num_res_blocks,
        "attention_resolutions": model.attention_downsamplings,
        "dropout": model.dropout,
        "channel_mult": model.multipliers,
        "num_classes": classes_of(model) or None,
        "use_checkpoint": model.use_checkpoint,
        "use_fp16": model.use_fp16,
        "num_heads": model.num_heads,
        "num_head_channels": model.num_head_channels,
        "num_heads_upsample": model.num_heads_upsample,
        "use_scale_shift_norm": model.use_scale_shift_norm,
        "resblock_updown": model.resblock_updown,
        "use_new_attention_order": model.use_new_attention_order,
    }


def build_model(model: ModelConfig | SuperResConfig, diffusion: DiffusionConfig | None = None) -> UNetModel:
    """The denoising network, on the CPU, float32; a SuperResModel for a SuperResConfig."""
    network = SuperResModel if isinstance(model, SuperResConfig) else UNetModel
    return network(**network_options(model, diffusion))


def build_super_res(model: SuperResConfig, diffusion: DiffusionConfig | None = None) -> UNetModel:
    """The denoising network that also sees a smaller image."""
    return build_model(model, diffusion)


def build_classifier(model: ClassifierConfig) -> EncoderUNetModel:
    """The classifier of noised images, on the CPU, float32."""
    return EncoderUNetModel(**network_options(model))


def build_network(model: Network, diffusion: DiffusionConfig | None = None, *, seed: int | None = None) -> nn.Module:
    """The network of any config; with `seed` its first weights are a function of it, and the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(key_of(seed, TRAIN))
        return build_classifier(model) if isinstance(model, ClassifierConfig) else build_model(model, diffusion)


def build_empty(model: Network, diffusion: DiffusionConfig | None = None) -> nn.Module:
    """The network of any config on the meta device, without weights: to be given those of a file (`assign=True`)."""
    with torch.device("meta"), _Unfilled():
        return build_network(model, diffusion)


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled with first weights.

    On the meta device filling does nothing, slowly: its normal_ imports the whole compiler, which takes a second or two.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.zero_, Tensor.fill_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_process(diffusion: DiffusionConfig, *, respacing: str | None = None) -> Process:
    """The noise process, on the CPU; `respacing` replaces the config's own ("" = every step)."""
    if diffusion.noise_schedule not in SCHEDULES:
        known = ", ".join(sorted(SCHEDULES))
        raise ValueError(f"--noise_schedule is {diffusion.noise_schedule!r}; it must be one of {known}")
    process = make_process(named_betas(diffusion.noise_schedule, diffusion.diffusion_steps))
    if diffusion.rescale_timesteps:
        process = rescale_time(process)
    sections = diffusion.timestep_respacing if respacing is None else respacing
    keep = space_timesteps(diffusion.diffusion_steps, sections)
    if len(keep) == 1 < diffusion.diffusion_steps:
        raise ValueError(
            f"--timestep_respacing is {sections!r}, which keeps step {keep[0]} alone; give at least 2 steps, as in '25' or 'ddim25'"
        )
    return respace(process, keep)


def choose_precision(precision: str, use_fp16: bool, device: torch.device) -> str:
    """fp32, bf16 or fp16: `precision` where given, else by `use_fp16`, which the CPU answers with fp32."""
    if precision:
        if precision == "fp16" and device.type == "cpu":
            _log.warning(
                "--precision fp16 on the CPU is some 30 times slower than fp32; done all the same, as it was asked for"
            )
        return precision
    if use_fp16 and device.type == "cpu":
        _log.info(
            "--use_fp16 True: computing in fp32, because float16 convolutions are some 30 times slower on the CPU"
        )
        return "fp32"
    return "fp16" if use_fp16 else "fp32"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build_timesteps(name: str, num_steps: int) -> Timesteps:
    """What draws the steps to train on: "uniform" or "loss-second-moment"."""
    return UniformTimesteps(num_steps) if name == "uniform" else LossSecondMoment(num_steps)


def loss_options(config: RunConfig) -> dict[str, Any]:
    """The keyword arguments of `training.losses.diffusion_loss`."""
    assert isinstance(config.model, (ModelConfig, SuperResConfig))
    return {
        "loss": config.diffusion.loss,
        "min_snr_gamma": config.train.min_snr_gamma,
        "class_cond": config.model.class_cond,
        **config.diffusion.reading,
    }


def build_batches(
    records: Records,
    data: DataConfig,
    model: Network,
    *,
    batch_size: int,
    rank: int = 0,
    size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    start_image: int | None = None,
) -> Batches:
    """Endless batches of this process; `batch_size` counts the global batch."""
    return make_batches(
        records,
        image_size=model.size,
        batch_size=batch_size,
        rank=rank,
        size=size,
        seed=seed,
        start_step=start_step,
        start_image=start_image,
        crop="random" if data.random_crop else "center",
        flip=data.random_flip,
        channels=model.image_channels,
        workers=data.workers,
        on_error=data.on_error,
        low_res_size=getattr(model, "small_size", 0),
    )


def trainer_options(train: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of Trainer that are plain values of the config."""
    anneal = train.last_step if getattr(train, "anneal_lr", False) else train.lr_anneal_steps
    return {
        "lr": train.lr,
        "lr_anneal_steps": anneal,
        "lr_warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "ema_rates": train.ema_rates,
        "fp16_scale_growth": train.fp16_scale_growth,
        "microbatch": max(0, train.microbatch),
        "max_grad_norm": train.grad_clip,
        "seed": train.seed,
        "shard_optimizer": train.shard_optimizer,
        "shard_ema": train.shard_ema,
        "ddp_options": {"static_graph": train.static_graph, "compress_gradients": train.compress_gradients},
        "log_every": train.log_interval,
        "save_every": train.save_interval,
    }
