"""`train`, `train-classifier`, `train-upsampler` and the training scripts of 2021: train as the flags say, into a run folder with
checkpoints, a log and pictures of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import WEIGHTS, RunConfig, Section, flag
from . import arguments, runs


@dataclass(frozen=True)
class StartFlags(Section):
    """Train a network on a folder of images."""

    # These flags concern one start of a run only, and are not stored in its configuration.

    out: str = flag("", "run folder for checkpoints, log and pictures")
    progress: bool = flag(True, "show a progress bar")
    timeout_s: float = flag(600.0, "seconds that a process waits for the others before it ends with an error")
    tensorboard: bool = flag(False, "also write curves for TensorBoard")
    new_classes: bool = flag(
        False,
        "train on the data's classes instead of the checkpoint's; classes with the same name keep their learned weights",
    )
    resume_from: str = flag(
        "", "with --resume_checkpoint: ema or model, these weights alone, at step 0; empty = all of a save"
    )
    weights: str = flag("", "alias of --resume_from")


def main(argv: Sequence[str], program: str, *, kind: str, script: bool = False) -> int:
    """Train as the flags say; exit codes: 0 = finished, 85 = stopped on request and resumable, 130 = Ctrl-C."""
    parsed = flags(argv, kind, program, script=script)
    check_start(parsed, kind)  # before torch is loaded and the processes connect, which takes seconds
    values = parsed.flags
    if not values["data_dir"] and not values["resume_checkpoint"] and not values["out"]:
        raise ValueError("--data_dir is empty; give the folder of training images")

    from ..runtime import signals

    # Stop comes first: a signal that arrives while the processes connect must not be lost.
    with (
        signals.Stop(signals.TRAINING_SIGNALS) as stop,
        runs.session(values["device"], **{name: values[name] for name in ("debug", "timeout_s", "tf32")}) as world,
    ):
        stop.quiet = not world.is_main
        folder, chosen = world.broadcast_object(runs.run_folder(values["out"], kind), name="run folder")
        from . import training_run

        plan = training_run.make_plan(parsed, kind, world, folder, script=script)
        return training_run.run(plan, values, stop, f"{folder} ({chosen})")


def flags(
    argv: Sequence[str], kind: str, program: str, *, script: bool = False, start: type[StartFlags] = StartFlags
) -> arguments.Parsed:
    """Parse the flags of a training command. start: the flags of one start (`doctor` adds some)."""
    # As in 2021, classifiers are trained on random crops.
    defaults: dict[str, Any] = {"random_crop": True} if kind == "classifier" else {}
    if script:
        defaults["out"] = runs.script_folder()
    else:
        defaults["microbatch"] = 0  # auto: a batch too large for the device's memory is split instead of failing
    configs = (start, *RunConfig.sections(kind).values())
    return arguments.parse(argv, configs, program=program, description=str(start.__doc__), defaults=defaults)


def check_start(parsed: arguments.Parsed, kind: str) -> None:
    """ValueError where flags are impossible or contradict each other in what training starts from."""
    if parsed.flags["resume_checkpoint"] in ("", "auto", "none"):
        RunConfig.from_flags(kind, parsed.flags)
        for name in ("new_classes", "resume_from", "weights"):
            if parsed.flags[name]:
                raise ValueError(f"--{name} needs --resume_checkpoint FILE, the weights to start from")
    which = {name: parsed.flags[name] for name in ("resume_from", "weights") if parsed.flags[name]}
    if not set(which.values()) <= set(WEIGHTS) or len(set(which.values())) > 1:
        values = " and ".join(f"--{name} is {value!r}" for name, value in which.items())
        raise ValueError(
            f"{values}; it must be ema or model (--weights is an alias of --resume_from: give one of them)"
        )
