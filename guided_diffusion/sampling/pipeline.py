"""Network, process, guidance and sampler together: noise -> images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..diffusion import guidance, samplers
from ..diffusion.denoiser import Denoiser, make_denoiser
from ..diffusion.process import Process
from ..models.layers import lay_out_convolution
from ..models.network import Network as Torso
from .execution import Compiled, Graphed

if TYPE_CHECKING:
    from ..weights.load import Loaded

Sample = Callable[[Tensor, Callable[[Tensor], Tensor], dict[str, Tensor]], Tensor]


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
    guidance.check_scale(scale)
    assert config.kind != "classifier"
    known = (("y",) if getattr(config.model, "class_cond", False) else ()) + (
        ("low_res",) if config.kind == "super_resolution" else ()
    )
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


def compile_network(net: nn.Module) -> None:
    """Send calls of `net` through torch.compile, as one graph per shape of input; names of parameters stay as they are."""
    net.compile(fullgraph=True, dynamic=False)
