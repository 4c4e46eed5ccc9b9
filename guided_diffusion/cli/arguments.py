"""Command-line flags: the parser that is made from configuration dataclasses. Does not load torch."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..config import Section, changed, flag, flatten, laid_over
from ..config.fields import SWITCH, SWITCHES, present_name
from ..runtime import launchers, storage

_HELP = partial(argparse.HelpFormatter, max_help_position=36, width=120)
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
LAST = "for weights that carry no configuration"  # the last group of a command that reads weights: all flags in no other group
# Groups of --help: title -> flags. A command lists those of its own; all its flags in no group come into the last one.
SAMPLING = {
    "what is made": "num_samples seed classes labels base_samples invert requests",
    "guidance": "classifier_path classifier_scale guidance guidance_scale guidance_interval guidance_options guide_path entropy_scale "
    "rescale epsilon_scale threshold clip upsampler_classifier_path upsampler_classifier_scale",
    "sampler": "sampler use_ddim steps grid nodes timestep_respacing sigma_max sigma_min rho order final_order exact eta tau churn "
    "churn_min churn_max noise_scale restart clip_denoised upsampler_use_ddim upsampler_timestep_respacing",
    "speed": "batch_size upsampler_batch_size device precision classifier_precision use_fp16 classifier_use_fp16 compile cuda_graphs "
    "tf32 deterministic",
    "files": "model_path weights upsampler_path out picture config upsampler_flags debug",
    LAST: "",
}
MEASURING = {
    "what is measured": "data_dir num_samples seed labels on_error workers",
    **{title: names for title, names in SAMPLING.items() if title not in ("what is made", "guidance", LAST)},
    "for training only, without effect here": "val_data_dir val_fraction random_crop random_flip",
    LAST: "",
}
TRAINING = {
    "data": "data_dir val_data_dir val_fraction labels new_classes random_crop random_flip on_error noised",
    "optimization": "lr weight_decay lr_anneal_steps anneal_lr warmup_steps iterations max_steps batch_size global_batch_size grad_clip "
    "ema_rate ema_sigma_rel dropout class_dropout schedule_sampler min_snr_gamma loss_weight use_kl rescale_learned_sigmas seed "
    "fp16_scale_growth",
    "speed and memory": "microbatch recompute memory_limit_gb use_checkpoint device precision "
    "use_fp16 classifier_use_fp16 compile tf32 workers shard_optimizer shard_ema compress_gradients static_graph timeout_s",
    "files and log": "out resume_checkpoint resume_from weights config save_interval keep_last keep_every log_interval eval_interval "
    "sample_interval sample_steps progress tensorboard debug",
    "network and noise process": "",
}


class _ImportProgram(argparse.Action):
    """`--import FILE.py` or `--import MODULE`: import it while the command line is parsed."""

    def __call__(self, parser: Any, namespace: Any, program: Any, option_string: Any = None) -> None:
        if program.endswith(".py"):
            _import_file(program)
            return
        try:
            importlib.import_module(program)
        except ModuleNotFoundError as error:
            # What is missing may not be the program, but what it imports.
            if not f"{program}.".startswith(f"{error.name}."):
                raise
            raise ValueError(f"--import {program}: there is no such module; give FILE.py or an installed one") from None


def _import_file(path: str) -> None:
    name = os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise ValueError(f"--import {path}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    # pickle looks up what the file defines by its module name, here and in the data loader's processes.
    sys.modules[name] = module
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    spec.loader.exec_module(module)


@dataclass(frozen=True)
class Common(Section):
    """Flags of every command that computes on a device."""

    device: str = flag("auto", "auto, cpu or cuda")
    debug: bool = flag(False, "show where an error came from")


class Parsed(NamedTuple):
    """The values of a command's flags."""

    flags: dict[str, Any]  # all flags: as typed, else from --config, else the default
    typed: dict[str, Any]  # only those on the command line or in --config


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process, with the flag `--import`."""

    def __init__(self, program: str = "", description: str | None = None, **options: Any) -> None:
        super().__init__(program, description=description, **{"allow_abbrev": False, **options})
        help = "program (FILE.py, or a module's name) to run first: it may add to ARCHITECTURES, SCHEDULES ... (docs/extending.md)"
        self.add_argument("--import", action=_ImportProgram, default=argparse.SUPPRESS, metavar="FILE", help=help)

    def flag(self, name: str, default: Any, help: str, **options: Any) -> None:
        """Add `--NAME VALUE`, with the type of its default; or `--NAME` without a value if the default is False."""
        if default is False:
            self.add_argument(f"--{name}", action="store_true", help=help)
        else:
            help += f" (default {default})" if default not in ("", None) else ""
            self.add_argument(f"--{name}", default=default, help=help, **{"type": type(default), **options})

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def parse(
    argv: Sequence[str],
    configs: Sequence[type],
    *,
    program: str,
    description: str,
    defaults: Mapping[str, Any] | None = None,
    groups: Mapping[str, str] = TRAINING,
) -> Parsed:
    """Read the flags of the dataclasses `configs` and of `Common`; where two have a field of the same name, the first counts.

    `--config FILE` gives values from a JSON file: flags, sections, or the file beside a checkpoint. Typed flags win over the file,
    the file over `defaults`, `defaults` over those of the configs. `--save-interval` is the same as `--save_interval`.
    groups: those of --help, title -> flags; the last one has all other flags.
    """
    known: dict[str, Field[Any]] = {}
    for field in (field for config in (*configs, Common) for field in fields(config) if "help" in field.metadata):
        known.setdefault(field.name, field)
    default = {name: (defaults or {}).get(name, field.default) for name, field in known.items()}
    parser = Parser(program, description, formatter_class=_HELP)
    in_help = not {"-h", "--help"}.isdisjoint(argv)  # only --help lists the keys of tables, whose import takes time
    grouped = " ".join(groups.values()).split()
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names.split() or [name for name in known if name not in grouped]:
            if name == "config":
                group.add_argument("--config", metavar="FILE", help="JSON file with values for these flags")
            elif name in known:
                _add(group, known[name], default[name], in_help)
    arguments, unknown = parser.parse_known_args(_present_names(argv, known))
    if unknown:
        raise ValueError(_unknown(unknown[0], known))
    # Defaults are suppressed in `_add`.
    typed = {key: value for key, value in vars(arguments).items() if key != "config"}
    if arguments.config:
        stored, typed_now = _from_file(arguments.config, known), typed
        typed = laid_over(stored, typed_now)
        if launchers.is_local_main(os.environ):
            for sentence in changed(stored, typed_now, {**default, **typed}):
                print(f"note: --config {arguments.config}: {sentence}", file=sys.stderr)
    for name, value in typed.items():
        auto, no_auto, choices = (known[name].metadata[key] for key in ("auto", "no_auto", "choices"))
        if (no_auto or auto is not None) and str(value).lower() == "auto":
            if no_auto:
                raise ValueError(f"--{name} is 'auto', but {no_auto}")
            typed[name] = auto
        elif choices and value not in choices:
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"--{name} is {value!r}; it must be one of {listed}{near(value, choices)}")
    return Parsed({**default, **typed}, typed)


def str2bool(v: str | bool) -> bool:
    """Read a boolean as the 2021 scripts did: yes true t y 1, no false f n 0, in any case."""
    if isinstance(v, bool):
        return v
    if v.lower() in _TRUE + _FALSE:
        return v.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"boolean value expected, not {v!r}; give one of {' '.join(_TRUE + _FALSE)}")


def switch(text: str) -> str:
    """auto, on or off; or a boolean, for on or off as in earlier versions."""
    if text.lower() in SWITCH:
        return text.lower()
    try:
        return "on" if str2bool(text) else "off"
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be one of {', '.join(SWITCH)}") from None


def int_or_auto(text: str) -> int | str:
    """A whole number, or the word auto as it is."""
    if text.lower() == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def _add(group: Any, field: Field[Any], default: Any, in_help: bool) -> None:
    help, choices, auto, no_auto, table = (
        field.metadata[key] for key in ("help", "choices", "auto", "no_auto", "table")
    )
    if in_help and table:
        choices = tuple(name for each in table.split() for name in _keys(each))
    listed = f" [{', '.join(str(choice) or 'empty' for choice in choices)}]" if choices else ""
    if isinstance(default, bool):  # a bare --flag means True
        options: dict[str, Any] = {"type": str2bool, "metavar": "bool", "nargs": "?", "const": True}
    elif field.name in SWITCHES:  # a bare --flag means on
        options = {"type": switch, "metavar": "str", "nargs": "?", "const": "on"}
    elif no_auto or auto is not None:
        options = {"type": int_or_auto, "metavar": "int" if no_auto else "int|auto"}
    else:
        options = {"type": type(default), "metavar": type(default).__name__}
    text = f"{help}{listed} (default {default!r})".replace("%", "%%")
    group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **options)


def _keys(table: str) -> list[str]:
    """The keys of a dict given as MODULE:NAME. A module that is not loaded is read as text, for its import may take seconds."""
    module, _, name = table.partition(":")
    module = f"{__package__.rpartition('.')[0]}.{module}"
    if module in sys.modules:
        return list(getattr(sys.modules[module], name))
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if getattr(target, "id", "") == name:
                return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    raise AssertionError(f"{table} is no dict with its keys written out")


def _present_names(argv: Sequence[str], known: Mapping[str, Field[Any]]) -> list[str]:
    """Replace hyphens in flag names by underscores, and earlier names of renamed flags by the present ones; values stay."""
    words = []
    for word, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--") and " " not in name:  # with a space it is the quoted value of --upsampler_flags
            name = name[2:].replace("-", "_")
            present = present_name(name, value if equals else following)
            name = "--" + (present if present in known else name)
        words.append(name + equals + value)
    return words


def _from_file(path: str, known: Mapping[str, Field[Any]]) -> dict[str, Any]:
    try:
        values = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {path}: there is no such file") from None
    except ValueError as error:
        raise ValueError(f"--config {path} is no JSON file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold an object of flags or sections, not a {type(values).__name__}")
    values = values["config"] if isinstance(values.get("config"), dict) else values
    # A training run's file may be given to a command without such flags, such as `sample`: ignore its sections data and train.
    if set(values) <= {"model", "diffusion", "data", "train"} and "data_dir" not in known:
        for name in {"data", "train"}.intersection(values):
            if isinstance(values[name], dict) and not set(values[name]) <= set(known):
                values = {other: section for other, section in values.items() if other != name}
    flat = {name: storage.expand(value) if isinstance(value, str) else value for name, value in flatten(values).items()}
    if isinstance(values.get("train"), dict):  # of a stored run; what that started from is not to be used again
        flat.pop("resume_checkpoint", None)
    if unknown := [name for name in flat if name not in known]:
        raise ValueError(f"--config {path}: {_unknown('--' + unknown[0], known)}")
    return flat


def _unknown(word: str, known: Mapping[str, Field[Any]]) -> str:
    name = word.partition("=")[0]
    if not name.startswith("--"):
        return f"{word!r} is neither a flag nor the value of one; flags are spelled --name value"
    return f"there is no flag {name}{near(name[2:], known, '--')}"


def near(value: object, allowed: Iterable[object], prefix: str = "") -> str:
    """ " (did you mean ...?)" if one of the `allowed` is similar, else nothing."""
    similar = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {prefix}{similar[0]}?)" if similar else ""
