"""Base class of the networks: a compute dtype apart from the stored one, the time embedding, a check of image sizes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .casts import WeightCopies
from .kernels.layout import channels_last, plain_layout, recorded
from .layers import GroupNorm32, hooked, lay_out_convolution, store_convolution, timestep_embedding


class Network(nn.Module):
    """Base of the networks. The torso computes in `dtype`; time embedding and output stay in full precision.

    Subclasses have input_blocks, middle_block, perhaps output_blocks (together the torso), and time_embed. num_levels: number of
    resolutions. dims: number of spatial dimensions.
    """

    dtype: torch.dtype
    dims: int
    model_channels: int
    num_classes: int | None
    num_levels: int
    time_embed: nn.Sequential
    label_emb: nn.Embedding
    _copies: WeightCopies | None = None

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
        if not recorded() and timesteps.shape[0] == 1:  # a compiled or traced expand would fix the number of images
            emb = emb.expand(num_images, -1)
        if self.num_classes is None:
            return emb
        if y is None:
            raise ValueError(f"this network is conditioned on {self.num_classes} classes: give labels y.")
        if y.shape != (num_images,):
            raise ValueError(f"labels y have shape {tuple(y.shape)}; one per image is needed: {(num_images,)}.")
        return emb + self.label_emb(y)

    def store_channels_last(self) -> None:
        """Store the weights of convolutions as convolutions of this package read them. Call it before optimizers take them."""
        self.apply(lay_out_convolution)

    def weights_cast_once(self) -> contextlib.AbstractContextManager[None]:
        """A block in which weights are cast to the compute dtype once, at its begin, instead of at each use: a training step.

        From the second block on; the first one notes what is cast. Costs the copies' memory. The numbers are the same.
        """
        if self._copies is None:
            self._copies = WeightCopies()
            module: Any
            for module in self.modules():
                if hasattr(module, "copies"):
                    module.copies = self._copies
        return self._copies.made()

    def set_fused_norm(self, wanted: bool = True) -> None:
        """Whether residual blocks may compute norm, scale, shift and SiLU as one fused operation (they may, unless told otherwise).

        They do so in eager mode, for layers without hooks. See models/kernels/norm.py.
        """
        for module in self.modules():
            if isinstance(module, GroupNorm32):
                module.fused = wanted

    def set_recompute_norms(self, wanted: bool = True) -> None:
        """Whether blocks keep only the inputs of their norms for backward, and recompute norms and SiLUs there.

        Less memory, the same numbers, and no convolution over images runs twice: recomputation ends before the convolution that
        follows (torch.utils.checkpoint stops at the last tensor that backward needs). Compiled networks ignore this, as do blocks
        that recompute as a whole (use_checkpoint).
        """
        module: Any
        for module in self.modules():
            if hasattr(module, "recompute_norms"):
                module.recompute_norms = wanted

    def enter(self, x: Tensor) -> Tensor:
        """x in the torso's dtype and memory layout. ValueError if its size cannot be halved at every level.

        The layout is channels_last; but contiguous where hooks or modules of the user see activations and may rely on it. All
        modules of this package keep the layout of their input. The gradient of x is contiguous.
        """
        divisor = 2 ** (self.num_levels - 1)
        sizes = tuple(x.shape[-min(self.dims, 2) :])
        if any(size % divisor for size in sizes):
            raise ValueError(
                f"images of {' x '.join(map(str, sizes))} cannot be halved {self.num_levels - 1} times: "
                f"height and width must be multiples of {divisor}. Resize or pad the images, or use fewer levels."
            )
        # compute dtype float32 means "as stored": a network moved to float64 computes in float64
        dtype = self._stored_dtype if self.dtype == torch.float32 else self.dtype
        x = plain_layout(x.to(dtype))
        return x if torch.jit.is_tracing() or looked_at(self) else channels_last(x)


def warn_of_missing_levels(image_size: int, attention_resolutions: Collection[int], levels: int) -> None:
    """Warn if attention is requested at downsampling factors that no level has, where the code of 2021 silently had none.

    A factor of 0 stands for resolutions above the image size. Defaults made for larger images contain it, so it is reported only if
    no requested factor exists.
    """

    def pixels(factors: Iterable[int]) -> str:
        return ", ".join(f"{image_size // f} ({f})" if f else "above the image size (0)" for f in factors)

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


# Modules whose hooks only measure (torch, this package), and modules whose layers take any memory layout (torch, this folder).
_HARMLESS_HOOKS = ("torch.", f"{__package__.split('.models')[0]}.")
_ANY_LAYOUT = ("torch.", f"{__package__}.")


def looked_at(net: nn.Module) -> bool:
    """Whether code of the user sees activations within `net`: a hook, a replaced `forward`, or a module class of their own."""
    torch_module = torch.nn.modules.module
    hook_dicts = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    hook_dicts += [torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks]
    classes, pending = set(), list(net._modules.values())
    while pending:  # faster than net.modules(), and this runs at every call
        module = pending.pop()
        if module is None:
            continue
        if "forward" in module.__dict__:
            return True
        if hooked(module):
            hook_dicts += [module._forward_hooks, module._forward_pre_hooks]
            hook_dicts += [module._backward_hooks, module._backward_pre_hooks]
        classes.add(type(module))
        pending += module._modules.values()
    hooks = (hook for hook_dict in hook_dicts for hook in hook_dict.values())
    if any(not getattr(hook, "__module__", "").startswith(_HARMLESS_HOOKS) for hook in hooks):
        return True
    # `__globals__` names the module that defines a function; decorators such as functools.wraps copy `__module__`.
    return any(not getattr(c.forward, "__globals__", {}).get("__name__", "").startswith(_ANY_LAYOUT) for c in classes)
