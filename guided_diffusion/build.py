"""Config -> objects: the one file that knows both. Networks, processes, losses, batches, samplers, and reading them back from files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
)
from .data.images import low_res, to_float
from .data.listing import Records
from .data.loader import Batches, make_batches
from .diffusion import guidance, samplers
from .diffusion.compiled import Compiled
from .diffusion.denoiser import Denoiser, make_denoiser
from .diffusion.graphs import Graphed
from .diffusion.objectives import training_losses
from .diffusion.process import Process, add_noise, make_process, rescale_time, respace, space_timesteps
from .diffusion.schedules import SCHEDULES, named_betas
from .diffusion.timesteps import LossSecondMoment, Timesteps, UniformTimesteps
from .models.layers import lay_out_convolution
from .models.network import Network as Torso
from .models.unet import EncoderUNetModel, SuperResModel, UNetModel
from .reading import agree as agree
from .reading import classes_of as classes_of
from .reading import find as find
from .reading import fitted as fitted
from .reading import read as read
from .reading import recognise as recognise
from .runtime.streams import TRAIN, Streams, key_of
from .training.checkpoint import save_run
from .training.losses import Losses
from .training.restore import load_weights_into

Tell = Callable[[str], None]
LossFn = Callable[[Any, Any, Streams], Losses]
Sample = Callable[[Tensor, Callable[[Tensor], Tensor], dict[str, Tensor]], Tensor]

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


def choose_precision(precision: str, use_fp16: bool, device: torch.device, tell: Tell = print) -> str:
    """fp32, bf16 or fp16: `precision` where given, else by `use_fp16`, which the CPU answers with fp32."""
    if precision:
        if precision == "fp16" and device.type == "cpu":
            tell(
                "--precision fp16 on the CPU is some 30 times slower than fp32; doing it all the same, as it was asked for"
            )
        return precision
    if use_fp16 and device.type == "cpu":
        tell("--use_fp16 True: computing in fp32, because float16 convolutions are some 30 times slower on the CPU")
        return "fp32"
    return "fp16" if use_fp16 else "fp32"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build_timesteps(name: str, num_steps: int) -> Timesteps:
    """What draws the steps to train on: "uniform" or "loss-second-moment"."""
    return UniformTimesteps(num_steps) if name == "uniform" else LossSecondMoment(num_steps)


def generator_loss(config: RunConfig, process: Process, timesteps: Timesteps) -> LossFn:
    """The loss of a denoising network on a batch; `process` on the training device."""
    assert isinstance(config.model, (ModelConfig, SuperResConfig))
    model, diffusion = config.model, config.diffusion
    gamma: float = config.train.min_snr_gamma
    weight: dict[str, Any] = {"weight": "min_snr", "min_snr_gamma": gamma} if gamma else {}

    def loss(net: Any, batch: Any, streams: Streams) -> Losses:
        x0 = to_float(batch.images, getattr(batch, "flips", None))
        i, importance = timesteps.draw(streams.uniform().to(x0.device))
        noise = streams.normal(x0.shape[1:])
        cond: dict[str, Tensor] = {"y": batch.labels} if model.class_cond else {}
        if isinstance(model, SuperResConfig):
            cond["low_res"] = low_res(x0, model.small_size)
        terms = training_losses(net, process, x0, i, noise, cond, loss=diffusion.loss, **diffusion.reading, **weight)  # type: ignore[arg-type]
        weighted = {name: value * importance for name, value in terms.items()}
        return Losses(weighted["loss"], weighted, i, len(process), terms["loss"].detach())

    return loss


def classifier_loss(process: Process, timesteps: Timesteps, *, noised: bool = True, prefix: str = "train") -> LossFn:
    """Cross entropy of a classifier on noised images, with accuracies, under the column names of 2021."""

    def loss(net: Any, batch: Any, streams: Streams) -> Losses:
        x = to_float(batch.images, getattr(batch, "flips", None))
        i, _ = timesteps.draw(streams.uniform().to(x.device))
        if noised:
            x = add_noise(process, x, i, streams.normal(x.shape[1:]))
        else:
            i = torch.zeros_like(i)
        logits = net(x, process.time_at(i)).float()
        entropy = F.cross_entropy(logits, batch.labels, reduction="none")
        ranked = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        terms = {
            f"{prefix}_loss": entropy,
            f"{prefix}_acc@1": ranked[:, 0].float(),
            f"{prefix}_acc@5": ranked.any(dim=1).float(),
        }
        return Losses(entropy, terms, i, len(process))

    return loss


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


def split_records(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """(training, validation): a part of the records, drawn by `seed`, is held out."""
    count = len(records)
    order = np.random.RandomState(key_of(seed, TRAIN) & 0xFFFFFFFF).permutation(count)
    held = max(1, round(count * fraction))
    return records.take(sorted(order[held:].tolist())), records.take(sorted(order[:held].tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def build_sample(
    model: Loaded,
    process: Process,
    *,
    critic: Loaded | None = None,
    scale: float = 0.0,
    method: str = "ancestral",
    eta: float = 0.0,
    clip: bool = True,
    compile: bool = False,
    graphs: bool = False,
) -> Sample:
    """(noise, source of noise, conditions) -> images in [-1, 1]. `process` on the sampling device.

    Guidance by `critic` shifts the mean where `method` is ancestral, as algorithm 1 of the paper, and the score
    elsewhere, as algorithm 2. `compile`: network and guidance of a step through torch.compile, as one graph. `graphs`: on
    CUDA, record them (compiled or not) as one CUDA graph. With either, batches of another size cost a graph of their own.
    """
    config, net = model.config, model.net
    assert isinstance(config.model, (ModelConfig, SuperResConfig))
    guidance.check_scale(scale)
    known = (("y",) if config.model.class_cond else ()) + (("low_res",) if config.kind == "super_resolution" else ())
    guide = guidance.classifier_mean if method == "ancestral" else guidance.classifier
    for part in (model, critic):
        if part is not None:
            make_ready(part.net)

    def plain(cond: Mapping[str, Tensor]) -> Denoiser:
        heard = {name: cond[name] for name in known}
        denoise = make_denoiser(net, process, heard, clip=clip, **config.diffusion.reading)  # type: ignore[arg-type]
        if critic is not None and scale:
            denoise = guide(denoise, process, guidance.log_prob_gradient(critic.net, cond["y"]), scale)
        return denoise

    apart: list[nn.Module] = []  # networks compiled by themselves, where a step could not be compiled whole

    def compiled_apart(cond: Mapping[str, Tensor]) -> Denoiser:
        if not apart:
            apart.extend(part.net for part in (model, critic) if part is not None)
            for each in apart:
                compile_network(each)
        return plain(cond)

    denoiser = Compiled(plain, otherwise=compiled_apart) if compile else plain
    kept: dict[str, Tensor] = {}  # the conditions in the memory that a graph reads
    recorded: list[Graphed] = []

    def sample(noise: Tensor, randn_like: Callable[[Tensor], Tensor], cond: dict[str, Tensor]) -> Tensor:
        if graphs and noise.is_cuda:
            if not recorded or any(kept[name].shape != value.shape for name, value in cond.items()):
                kept.update({name: value.clone() for name, value in cond.items()})
                recorded[:] = [Graphed(denoiser(kept))]
            for name, value in cond.items():
                kept[name].copy_(value)
            denoise: Denoiser = recorded[0]
        else:
            denoise = denoiser(cond)
        try:
            return samplers.last(steps_of(denoise, noise, randn_like))
        except samplers.NotFinite as error:
            parts = [part for part in (model, critic) if part is not None]
            raise samplers.NotFinite(error.row, f"{error}; {why_not_finite(parts)}") from None

    def steps_of(denoise: Denoiser, noise: Tensor, randn_like: Callable[[Tensor], Tensor]) -> Iterable[samplers.Step]:
        if method == "ddim":
            return samplers.ddim(denoise, noise, process, eta=eta, noise=randn_like)
        if method == "heun":
            return samplers.heun(denoise, noise, process, noise=randn_like)
        if method == "dpm_solver":
            return samplers.dpm_solver(denoise, noise, process)
        assert method == "ancestral", method
        return samplers.ancestral(denoise, noise, process, noise=randn_like)

    return sample


def why_not_finite(parts: Sequence[Loaded]) -> str:
    """The weights that are not finite themselves, or what else may help."""
    for part in parts:
        for name, value in part.net.state_dict().items():
            bad = int((~value.isfinite()).sum())
            if bad:
                return f"the weights {part.path} hold {bad} such values in {name}: take another file"
    remedies = ["lower the scale of the guidance"] if len(parts) > 1 else []
    wider = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32"}
    for part, flag in zip(parts, ("--precision", "--classifier_precision")):
        if (dtype := getattr(part.net, "dtype", None)) in wider:
            remedies.append(f"give {flag} {wider[dtype]}")
    return "all weights are finite" + (f": {', or '.join(remedies)}" if remedies else "")


def make_ready(net: nn.Module) -> None:
    """Lay a frozen network's weights out as convolutions read them, which saves a transposition per call.

    Networks whose weights ask for gradients are left as they are: they belong to training.
    """
    if not isinstance(net, Torso) or any(parameter.requires_grad for parameter in net.parameters()):
        return
    net.set_compute_dtype(net.dtype, store=True)
    net.apply(lay_out_convolution)
    if next(net.parameters()).device.type != "cpu":  # fewer kernels to start; a CPU starts none
        net.join_embeddings()


def compile_network(net: nn.Module) -> None:
    """Send calls of `net` through torch.compile, as one graph per shape of input; names of parameters stay as they are."""
    net.compile(fullgraph=True, dynamic=False)


def check_pair(model: Loaded, critic: Loaded) -> None:
    """ValueError, in words, unless the classifier was trained for what the diffusion model makes."""
    ours, theirs = model.config, critic.config
    pairs: dict[str, tuple[Any, Any]] = {"image size": (ours.model.size, theirs.model.size)}
    pairs["image channels"] = (ours.model.image_channels, theirs.model.image_channels)
    if classes_of(ours.model):
        pairs["number of classes"] = (classes_of(ours.model), classes_of(theirs.model))
    for name in ("noise_schedule", "diffusion_steps", "rescale_timesteps") if model.certain and critic.certain else ():
        pairs[name] = (getattr(ours.diffusion, name), getattr(theirs.diffusion, name))
    wrong = [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    if model.class_names and critic.class_names and model.class_names != critic.class_names:
        longest = zip_longest(model.class_names, critic.class_names, fillvalue="")
        number, (first, second) = next((k, pair) for k, pair in enumerate(longest) if pair[0] != pair[1])
        wrong.append(f"class names: class {number} is {first or 'none'!r} and {second or 'none'!r}")
    if wrong:
        raise ValueError(
            f"{model.path} (diffusion model) and {critic.path} (classifier) do not belong together; they differ in {'; '.join(wrong)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, and what it is."""

    net: nn.Module
    process: Process
    config: RunConfig
    path: str
    class_names: tuple[str, ...] = ()
    step: int | None = None
    sha256: str = ""
    certain: bool = True
    """Whether the noise process was read from the file, not only assumed."""
    weights: str = ""
    """ "ema" or "model" where the file holds both and one was chosen."""

    @property
    def kind(self) -> str:
        """diffusion, super_resolution or classifier."""
        return self.config.kind


def load(
    path: str,
    *,
    kind: str | None = None,
    flags: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    weights: str = "",
    tell: Tell = print,
) -> Loaded:
    """Read a network from a file or a run folder, ready to use: on `device`, in eval mode, its weights frozen.

    Files written here carry their configuration, released ones are known by their tensors; for others `flags` gives what
    tensors cannot tell, spelled as in 2021. Flags that contradict the file are refused in words, and so is a file of another
    `kind`; flags that do not concern the weights (--timestep_respacing, --use_fp16 ...) are taken over. `precision` ""
    follows use_fp16. `weights`, "ema" or "model", chooses where a file or folder holds both averaged and raw ones; else the
    averaged are taken. On the CPU the network keeps the mapped file as its memory: do not overwrite the file in place.
    """
    device = torch.device(device)
    found, held = read(path, kind=kind, flags=flags, weights=weights, tell=tell)
    config = found.config
    assert config is not None
    net = build_empty(config.model, config.diffusion)
    load_weights_into(net, held.tensors, found.path, assign=True)
    net = net.to(device).eval().requires_grad_(False)
    half = getattr(config.model, "use_fp16", False) or getattr(config.model, "classifier_use_fp16", False)
    chosen = choose_precision(precision, half, device, tell)
    net.set_compute_dtype(DTYPES[chosen], store=chosen != "fp32")  # type: ignore[operator]
    process = build_process(config.diffusion).to(device)
    about = (found.path, found.class_names, found.step, found.sha256, found.certain)
    return Loaded(net, process, config, *about, held.taken)


def save(loaded: Loaded, folder: str) -> str:
    """Write a network with its configuration into `folder`; `load(folder)` reads it back. Returns the path of the JSON file."""
    return save_run(
        folder,
        step=loaded.step or 0,
        model=loaded.net.state_dict(),
        config=loaded.config.to_dict(),
        kind=loaded.kind,
        class_names=loaded.class_names,
    )
