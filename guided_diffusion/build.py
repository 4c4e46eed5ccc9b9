"""Configuration -> objects: the one file that knows both. Networks, processes, losses, batches."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import nn

from .config import (
    UNET,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    Network,
    RunConfig,
    SuperResConfig,
    TrainConfig,
    classes_of,
    label_rows,
)
from .data.listing import Records
from .data.loader import Batches, make_batches
from .diffusion.process import Process, make_process, rescale_time, respace, space_timesteps
from .diffusion.schedules import named_betas, zero_terminal_snr
from .diffusion.timesteps import LossSecondMoment, Timesteps, UniformTimesteps
from .diffusion.weighting import min_snr, named_weight
from .models.architectures import make_network
from .models.unet import EncoderUNetModel, SuperResModel, UNetModel
from .models.unfilled import Unfilled
from .runtime.streams import TRAIN, key_of

# ---------------------------------------------------------------------------------------------------------------------
# Networks and processes


_CLASSIFIER_OPTIONS = ("use_fp16", "num_head_channels", "use_scale_shift_norm", "resblock_updown", "pool")
_DENOISER_OPTIONS = (
    "num_res_blocks", "dropout", "use_checkpoint", "use_fp16", "num_heads", "num_head_channels", "num_heads_upsample",
    "use_scale_shift_norm", "resblock_updown", "use_new_attention_order",
)  # fmt: skip


def network_options(model: Network, diffusion: DiffusionConfig | None = None) -> dict[str, Any]:
    """The arguments of a config's U-Net."""
    levels = {"attention_resolutions": model.attention_downsamplings, "channel_mult": model.multipliers}
    if isinstance(model, ClassifierConfig):
        sizes: dict[str, Any] = {"model_channels": model.classifier_width, "num_res_blocks": model.classifier_depth}
        same = {name: getattr(model, f"classifier_{name}") for name in _CLASSIFIER_OPTIONS}
    else:
        sizes = {"model_channels": model.num_channels, "num_classes": label_rows(model) or None}
        same = {name: getattr(model, name) for name in _DENOISER_OPTIONS}
    return {**_shape_of(model, diffusion), **levels, **sizes, **same}


def _shape_of(model: Network, diffusion: DiffusionConfig | None) -> dict[str, Any]:
    """Image size and channels: a classifier's outputs are logits, another's an image and, if learned, variances."""
    factor = 2 if (diffusion or DiffusionConfig()).learn_sigma else 1
    outputs = classes_of(model) if isinstance(model, ClassifierConfig) else model.image_channels * factor
    return {"image_size": model.sample_size, "in_channels": model.image_channels, "out_channels": outputs}


def build_model(model: Network, diffusion: DiffusionConfig | None = None) -> Any:
    """The network of a config, on the CPU, float32: the U-Net of its role, or another `--architecture`."""
    if model.architecture == UNET:
        network = {"super_resolution": SuperResModel, "classifier": EncoderUNetModel}.get(model.kind, UNetModel)
        return network(**network_options(model, diffusion))
    shape: dict[str, Any] = {**_shape_of(model, diffusion), "num_classes": None}
    if model.size[0] != model.size[1]:
        shape["image_size"] = model.size
    if not isinstance(model, ClassifierConfig):
        shape["num_classes"] = label_rows(model) or None
    return make_network(model.architecture, model.options, prefix=model.prefix, **shape)


def build_classifier(model: ClassifierConfig) -> Any:
    """The classifier of noised images, on the CPU, float32."""
    return build_model(model)


def build_network(
    model: Network,
    diffusion: DiffusionConfig | None = None,
    *,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """As `build_model`, on `device`, without changing the global generators.

    A U-Net's weights are drawn by the device itself; with `seed` they depend on it and on the kind of device alone.
    """
    device = None if device is None else torch.device(device)
    gpus = [device] if device is not None and device.type == "cuda" else []
    # Another architecture's constructor may compute with tensors of its own; it is built on the CPU and then moved.
    where = contextlib.nullcontext() if device is None or model.architecture != UNET else device
    with torch.random.fork_rng(devices=gpus), where:
        if seed is not None:
            torch.manual_seed(key_of(seed, TRAIN))
        net: nn.Module = build_model(model, diffusion)
    return net if device is None else net.to(device)


def build_empty(
    model: Network, diffusion: DiffusionConfig | None = None, *, device: torch.device | str = "meta"
) -> nn.Module:
    """The network of a config on `device`, for weights to be loaded: a U-Net whose weights are memory as it was found.

    On the meta device it has none, and takes those loaded with `assign=True`.
    """
    if model.architecture != UNET:  # its constructor may compute buffers that no file holds
        return build_network(model, diffusion, device=None if torch.device(device).type == "meta" else device)
    with Unfilled():
        return build_network(model, diffusion, device=device)


def build_process(diffusion: DiffusionConfig, *, respacing: str | None = None) -> Process:
    """The noise process, on the CPU; `respacing` replaces the config's own ("" = every step)."""
    betas = named_betas(diffusion.noise_schedule, diffusion.diffusion_steps)
    process = make_process(zero_terminal_snr(betas) if diffusion.zero_terminal_snr else betas)
    if diffusion.rescale_timesteps:
        process = rescale_time(process)
    sections = diffusion.timestep_respacing if respacing is None else respacing
    keep = space_timesteps(diffusion.diffusion_steps, sections)
    if len(keep) == 1 < diffusion.diffusion_steps:
        raise ValueError(
            f"--timestep_respacing is {sections!r}, which keeps step {keep[0]} alone; give at least 2 steps, as in '25' or 'ddim25'"
        )
    return respace(process, keep)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build_timesteps(name: str, num_steps: int) -> Timesteps:
    """The schedule sampler of that name, "uniform" or "loss-second-moment"."""
    return UniformTimesteps(num_steps) if name == "uniform" else LossSecondMoment(num_steps)


def loss_options(config: RunConfig) -> dict[str, Any]:
    """The keyword arguments of `training.losses.diffusion_loss`."""
    assert isinstance(config.model, (ModelConfig, SuperResConfig))
    train = config.train
    return {
        "loss": config.diffusion.loss,
        "weight": partial(min_snr, gamma=train.min_snr_gamma)
        if train.min_snr_gamma
        else named_weight(train.loss_weight),
        "class_cond": config.model.class_cond,
        "class_dropout": train.class_dropout,
        "null_label": classes_of(config.model),
        **config.diffusion.reading,
    }


def build_batches(
    records: Records,
    config: RunConfig,
    *,
    batch_size: int,
    rank: int = 0,
    size: int = 1,
    held_out: bool = False,
    start_step: int = 0,
    start_image: int | None = None,
) -> Batches:
    """Endless batches of this process; `batch_size` is the global one. `held_out`: no augmentation, no workers."""
    data, model = config.data, config.model
    return make_batches(
        records,
        image_size=model.size,
        batch_size=batch_size,
        rank=rank,
        size=size,
        seed=config.train.seed,
        start_step=start_step,
        start_image=start_image,
        crop="random" if data.random_crop and not held_out else "center",
        flip=data.random_flip and not held_out,
        channels=model.image_channels,
        workers=0 if held_out else data.workers,
        on_error=data.on_error,
        low_res_size=getattr(model, "small_size", 0),
    )


def trainer_options(train: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of Trainer that are plain values of the config."""
    same = "lr weight_decay ema_rates ema_sigma_rels fp16_scale_growth seed shard_optimizer shard_ema".split()
    return {
        **{name: getattr(train, name) for name in same},
        "lr_anneal_steps": train.last_step if getattr(train, "anneal_lr", False) else train.lr_anneal_steps,
        "lr_warmup_steps": train.warmup_steps,
        "microbatch": max(0, train.microbatch),
        "max_grad_norm": train.grad_clip,
        "ddp_options": {"static_graph": train.static_graph, "compress_gradients": train.compress_gradients},
        "log_every": train.log_interval,
        "save_every": train.save_interval,
    }
