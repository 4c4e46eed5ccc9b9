"""The settings of a receipt: all that images depend on besides seed and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime import storage
from ..weights.load import Loaded
from .chains import Chain
from .guiding import Guided

# Fields of the configurations that are not copied into the receipt, and why. All others are, also those added later.
NOT_IN_RECEIPT = frozenset(
    (
        "model_path classifier_path guide_path weights "  # recorded instead: the file's hash, and which of its weights were taken
        "precision classifier_precision use_fp16 classifier_use_fp16 "  # recorded instead: the precision of each network
        "num_samples batch_size picture "  # image i does not depend on them
        "compile cuda_graphs "  # the same computation up to rounding
        "seed classes labels "  # added by the job
        "sampler use_ddim steps grid nodes timestep_respacing sigma_max sigma_min rho "  # recorded instead: sampler and nodes
        "order final_order exact eta tau churn churn_min churn_max noise_scale restart "  # recorded instead: the sampler's options
        "guidance classifier_scale guidance_scale guidance_interval guidance_options entropy_scale rescale "  # each guidance
        "epsilon_scale threshold clip clip_denoised "  # recorded with the guidances
        "dropout use_checkpoint use_kl rescale_learned_sigmas"  # for training only
    ).split()
)
# Flags that receipts name only where they have other values than these, by which earlier versions computed: their jobs go on.
_LATER = {"tf32": True, "deterministic": False}


def receipt_of(flags: Mapping[str, Any], chain: Chain, guided: Guided) -> dict[str, Any]:
    """The settings of networks, noise process, sampler and guidance, with the number of calls of each network. flags: of `SampleConfig`."""
    own = {name: value for name, value in _in_receipt(flags).items() if name not in _LATER or value != _LATER[name]}
    return {
        **own,
        **chain.describe(),
        # Network and classifier: their configurations (`to_dict` leaves out --architecture for U-Nets).
        "model": {**_identity(guided.model), **_in_receipt(guided.model.config.model.to_dict())},
        "diffusion": _in_receipt(guided.model.config.diffusion.to_dict()),
        # Of another network without its own noise process: see `guiding`.
        **guided.describe(lambda network: {**_identity(network), **_in_receipt(network.config.model.to_dict())}),
        "calls": guided.calls(chain.levels()),
    }


def _in_receipt(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in NOT_IN_RECEIPT}


def _identity(loaded: Loaded) -> dict[str, Any]:
    # Hash a local file anew: the hash in the JSON beside it may be of an earlier content.
    recorded = loaded.sha256 if storage.is_remote(loaded.path) else ""
    precision = str(getattr(loaded.net, "dtype", "torch.float32")).removeprefix("torch.")
    identity = {"sha256": recorded or storage.sha256_of(loaded.path), "step": loaded.step, "precision": precision}
    return {**identity, **({"weights": loaded.weights} if loaded.weights else {})}
