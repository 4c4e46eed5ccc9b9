"""What every network has: a compute dtype apart from the stored one, a time embedding, a check of image sizes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.layout import channels_last, plain_layout, recorded
from .layers import GroupNorm32, hooked, store_convolution, timestep_embedding


class Network(nn.Module):
    """Base of the networks. The torso computes in `dtype`; time embedding and output stay in full precision.

    Subclasses have input_blocks, middle_block, maybe output_blocks, and time_embed; num_levels is how many sizes they
    work at and dims the number of space dimensions.
    """

    dtype: torch.dtype
    dims: int
    model_channels: int
    num_classes: int | None
    num_levels: int
    time_embed: nn.Sequential
    label_emb: nn.Embedding

    def set_compute_dtype(self, dtype: torch.dtype, *, store: bool = False) -> None:
        """Compute the torso in `dtype` from now on: float32, bfloat16 or float16.

        Weights are cast where they are used; gradients arrive in the dtype of the stored weights. `store` also keeps
        the torso's convolutions in `dtype`: half the memory and no cast per call, for networks that are not trained.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"cannot compute in {dtype}; choose torch.float32, torch.bfloat16 or torch.float16.")
        self.dtype = dtype
        if store:
            for name in ("input_blocks", "middle_block", "output_blocks"):
                getattr(self, name, nn.Identity()).apply(lambda module: store_convolution(module, dtype))

    def convert_to_fp16(self) -> None:
        """Compute in float16 and store the torso's convolutions in it."""
        self.set_compute_dtype(torch.float16, store=True)

    def convert_to_fp32(self) -> None:
        """Compute in float32 and store the torso's convolutions in it."""
        self.set_compute_dtype(torch.float32, store=True)

    @property
    def _stored_dtype(self) -> torch.dtype:
        return next(self.time_embed.parameters()).dtype

    def embed(self, timesteps: Tensor, num_images: int, y: Tensor | None = None) -> Tensor:
        """timesteps [N] or one for all, and, if class-conditional, labels y [N] -> time embedding [N, 4 * model_channels]."""
        if y is not None and self.num_classes is None:
            raise ValueError("labels y were given to a network that is not class-conditional.")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self._stored_dtype))
        if not recorded() and timesteps.shape[0] == 1:  # a recording would hold for this number of images only
            emb = emb.expand(num_images, -1)
        if self.num_classes is None:
            return emb
        if y is None:
            raise ValueError(f"this network is conditioned on {self.num_classes} classes: give labels y.")
        if y.shape != (num_images,):
            raise ValueError(f"labels y have shape {tuple(y.shape)}; one per image is needed: {(num_images,)}.")
        return emb + self.label_emb(y)

    def set_fused_norm(self, wanted: bool = True) -> None:
        """Let residual blocks compute norm, scale, shift and SiLU as one operation where that fits, as they do, or never.

        It fits in eager mode where nobody looks at what is inside the network. See models/kernels/norm.py.
        """
        for module in self.modules():
            if isinstance(module, GroupNorm32):
                module.fused = wanted

    def set_recompute_norms(self, wanted: bool = True) -> None:
        """Let blocks keep for backward only what goes into their norms, and compute norms and SiLUs again there, or no longer.

        Less memory, the same numbers, and no convolution or product over images is done twice: recomputation ends before the
        convolution that would follow (torch.utils.checkpoint stops at the last tensor that backward waits for). Compiled
        networks ignore it, as do blocks that recompute as a whole (use_checkpoint).
        """
        module: Any
        for module in self.modules():
            if hasattr(module, "recompute_norms"):
                module.recompute_norms = wanted

    def enter(self, x: Tensor) -> Tensor:
        """x in the torso's dtype and memory layout, refused if a level would have an odd size.

        The layout is channels_last, and plain where others see activations and may count on it. All modules keep the layout
        that they are given. Gradients of x are plain.
        """
        divisor = 2 ** (self.num_levels - 1)
        sizes = tuple(x.shape[-min(self.dims, 2) :])
        if any(size % divisor for size in sizes):
            raise ValueError(
                f"images of {' x '.join(map(str, sizes))} cannot be halved {self.num_levels - 1} times: "
                f"height and width must be multiples of {divisor}. Resize or pad the images, or use fewer levels."
            )
        # float32 stands for "as stored": a network moved to float64 computes in float64
        dtype = self._stored_dtype if self.dtype == torch.float32 else self.dtype
        x = plain_layout(x.to(dtype))
        return x if torch.jit.is_tracing() or looked_at(self) else channels_last(x)


def warn_of_missing_levels(image_size: int, attention_resolutions: Collection[int], levels: int) -> None:
    """Warn where attention is asked for at downsampling factors that no level has: 2021 left it out in silence.

    0 stands for sizes above the image's, which defaults for larger images ask for: named only where none of the factors is there.
    """

    def pixels(factors: Iterable[int]) -> str:
        return ", ".join(f"{image_size // factor} ({factor})" if factor else "more than all (0)" for factor in factors)

    factors = [2**level for level in range(levels)]
    missing = set(attention_resolutions).difference(factors)
    if missing != set(attention_resolutions):
        missing.discard(0)
    if missing:
        warnings.warn(
            f"no level of this network has the attention resolution {pixels(sorted(missing))}, so it gets no attention there. "
            f"Its levels in pixels, and the downsampling factors: {pixels(factors)}.",
            stacklevel=4,
        )


# Hooks of torch and of this package measure without changing anything; modules of this folder take any memory layout.
_MEASURING = ("torch.", f"{__package__.split('.models')[0]}.")
_OWN = ("torch.", f"{__package__}.")


def looked_at(net: nn.Module) -> bool:
    """Whether somebody sees what the modules within `net` take and give: by a hook, or by code of their own in one of them."""
    everywhere = torch.nn.modules.module
    held = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    held += [everywhere._global_backward_hooks, everywhere._global_backward_pre_hooks]
    kinds, waiting = set(), list(net._modules.values())
    while waiting:  # faster than net.modules(), at every call
        module = waiting.pop()
        if module is None:
            continue
        if "forward" in module.__dict__:
            return True
        if hooked(module):
            held += [module._forward_hooks, module._forward_pre_hooks]
            held += [module._backward_hooks, module._backward_pre_hooks]
        kinds.add(type(module))
        waiting += module._modules.values()
    if any(not getattr(hook, "__module__", "").startswith(_MEASURING) for hooks in held for hook in hooks.values()):
        return True
    # Where a function was written; `__module__` is copied by decorators.
    return any(not getattr(kind.forward, "__globals__", {}).get("__name__", "").startswith(_OWN) for kind in kinds)
