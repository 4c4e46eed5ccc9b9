"""The settings of a receipt: all that images depend on besides seed and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..diffusion.samplers import SAMPLERS
from ..runtime import storage
from ..weights.load import Loaded

# Fields of the configurations that are not copied into the receipt, and why. All others are, also those added later.
NOT_IN_RECEIPT = frozenset(
    (
        "model_path classifier_path weights "  # recorded instead: the file's hash, and which of its weights were taken
        "precision classifier_precision use_fp16 classifier_use_fp16 "  # recorded instead: the precision of each network
        "num_samples batch_size grid "  # image i does not depend on them
        "compile cuda_graphs "  # the same computation up to rounding
        "seed classes labels "  # added by the job
        "use_ddim "  # an older flag for sampler, which is recorded
        "dropout use_checkpoint use_kl rescale_learned_sigmas"  # for training only
    ).split()
)
# Flags that receipts name only where they have other values than these, by which earlier versions computed: their jobs go on.
_LATER = {"tf32": True, "deterministic": False}


def receipt_of(flags: Mapping[str, Any], method: str, model: Loaded, classifier: Loaded | None) -> dict[str, Any]:
    """The configurations of model, process, classifier and sampler. flags: of `SampleConfig`; method: the sampler that they choose."""
    own = {name: value for name, value in _in_receipt(flags).items() if name not in _LATER or value != _LATER[name]}
    return {
        **own,
        "sampler": method,
        "eta": flags["eta"] if "eta" in SAMPLERS[method].options else None,
        "steps": len(model.process),
        # `to_dict` leaves out --architecture for U-Nets: their receipts equal those of older versions.
        "model": {**_identity(model), **_in_receipt(model.config.model.to_dict())},
        "diffusion": _in_receipt(model.config.diffusion.to_dict()),
        # Without the classifier's own noise process: it gets the model's noisy images and times.
        "classifier": {**_identity(classifier), **_in_receipt(classifier.config.model.to_dict())}
        if classifier
        else None,
        "classifier_scale": flags["classifier_scale"] if classifier else 0.0,
    }


def _in_receipt(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in NOT_IN_RECEIPT}


def _identity(loaded: Loaded) -> dict[str, Any]:
    # Hash a local file anew: the hash in the JSON beside it may be of an earlier content.
    recorded = loaded.sha256 if storage.is_remote(loaded.path) else ""
    precision = str(getattr(loaded.net, "dtype", "torch.float32")).removeprefix("torch.")
    identity = {"sha256": recorded or storage.sha256_of(loaded.path), "step": loaded.step, "precision": precision}
    return {**identity, **({"weights": loaded.weights} if loaded.weights else {})}
