"""What a training run starts from, as its flags say: for the training commands, and for `doctor`, which examines the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import WEIGHTS, RunConfig
from .arguments import Parsed

if TYPE_CHECKING:
    from ..runtime.world import World
    from ..weights.finetuning import Origin
    from ..weights.runs import SavedRun

_NO_FILE = ("", "auto", "none")  # values of --resume_checkpoint that are no path


def check_start(parsed: Parsed, kind: str) -> None:
    """ValueError where flags contradict each other in what training starts from."""
    if parsed.flags["resume_checkpoint"] in _NO_FILE:
        RunConfig.from_flags(kind, parsed.flags)
        for name in ("new_classes", "resume_from", "weights"):
            if parsed.flags[name]:
                raise ValueError(f"--{name} needs --resume_checkpoint FILE, the weights to start from")
    given = {name: parsed.flags[name] for name in ("resume_from", "weights") if parsed.flags[name]}
    if not set(given.values()) <= set(WEIGHTS) or len(set(given.values())) > 1:
        values = " and ".join(f"--{name} is {value!r}" for name, value in given.items())
        raise ValueError(
            f"{values}; it must be ema or model (--weights is an alias of --resume_from: give one of them)"
        )


def configured(
    parsed: Parsed, kind: str, world: World, folder: str, *, script: bool = False
) -> tuple[RunConfig, SavedRun | None, Origin | None]:
    """What a start in `folder` trains with: flags, completed by the save or file that it goes on from; that save, and what is known of
    that file."""
    import torch

    from ..training.saver import find_save
    from ..weights.continuing import configuration, started_from

    resume = parsed.flags["resume_checkpoint"] or "auto"
    saved, start = started_from(
        find_save(folder, resume, kind=kind, world=world), folder, kind, parsed.flags, parsed.typed
    )
    default_bf16 = (
        not script and world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return configuration(kind, parsed.flags, parsed.typed, saved, default_bf16=default_bf16), saved, start
