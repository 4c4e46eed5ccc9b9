"""The twelve doors still have the 131 names of 2021, called as they were; the scripts still have its flags and defaults."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_forked

from guided_diffusion.cli import sample, train

ROOT = Path(__file__).resolve().parents[2]
FROZEN = json.loads(Path(__file__).with_name("names.json").read_text())
NAMES = [(door, name, parameters) for door, names in FROZEN["names"].items() for name, parameters in names.items()]


def door(name: str) -> Any:
    return importlib.import_module(f"guided_diffusion.{name}")


def test_there_are_131_in_twelve() -> None:
    assert len(FROZEN["names"]) == 12 and len(NAMES) == 131


@pytest.mark.parametrize(("module", "name", "parameters"), NAMES, ids=lambda value: str(value)[:30])
def test_name_is_there_and_is_called_as_before(module: str, name: str, parameters: str | None) -> None:
    value = getattr(door(module), name)
    if parameters is None:
        return
    namespace: dict[str, Any] = {}
    exec(f"def frozen({parameters}): pass", namespace)
    before, now = (inspect.signature(f).parameters for f in (namespace["frozen"], value))
    kinds = inspect.Parameter
    positional = [
        [p.name for p in found.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)]
        for found in (before, now)
    ]
    generic = {p.kind for p in now.values()} >= {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD} and len(now) <= 4
    if positional[1] or not generic:  # a wrapper that passes everything on has no list to compare
        assert positional[0] == positional[1]
    for p in before.values():
        if p.default is not kinds.empty:
            assert now[p.name].default == p.default, f"the default of {p.name} changed"
        elif p.kind == kinds.KEYWORD_ONLY:
            assert p.name in now or generic
        elif p.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            assert any(other.kind == p.kind for other in now.values())
    for p in now.values():
        if p.name not in before and p.kind == kinds.KEYWORD_ONLY:
            assert p.default is not kinds.empty, f"{p.name} is new and must have a default"


@pytest.mark.parametrize("module", FROZEN["names"])
def test_doors_define_no_all(module: str) -> None:
    """Programs rely on what a star import leaves behind, such as `th` and `np`."""
    assert not hasattr(door(module), "__all__")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = door(module).nothing


def test_aliases_are_the_same_objects() -> None:
    for name, room in {"unet": "models.unet", "losses": "diffusion.densities"}.items():
        assert door(name) is door(room)
    for name in FROZEN["names"]["unet"]:
        assert pickle.loads(f"cguided_diffusion.unet\n{name}\n.".encode()) is getattr(door("models.unet"), name)
    log = door("logger")
    assert log.record_tabular is log.logkv and log.dump_tabular is log.dumpkvs
    assert (log.DEBUG, log.INFO, log.WARN, log.ERROR, log.DISABLED) == (10, 20, 30, 40, 50)
    assert (door("dist_util").GPUS_PER_NODE, door("dist_util").SETUP_RETRY_COUNT) == (8, 3)
    assert door("nn").checkpoint is door("models.layers").checkpoint


@pytest.mark.parametrize("name", FROZEN["defaults"])
def test_defaults_have_exactly_the_keys_and_values_of_2021(name: str) -> None:
    assert getattr(door("script_util"), name)() == FROZEN["defaults"][name]


KINDS = {"image_train": "diffusion", "classifier_train": "classifier", "super_res_train": "super_resolution"}
SCRIPTS = [*KINDS, "image_sample", "classifier_sample"]


def parsed(script: str, words: list[str]) -> Any:
    if script in KINDS:
        return train.flags(words, KINDS[script], script, script=True)
    return sample.Sampling.flags(words, script, script=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_keep_their_flags_and_defaults(script: str) -> None:
    flags = parsed(script, []).flags
    assert {name: flags.get(name, "missing") for name in FROZEN["flags"][script]} == FROZEN["flags"][script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_can_be_typed(script: str) -> None:
    """Spelled out at its default, as a saved command line of 2021 would."""
    words = [word for name, value in FROZEN["flags"][script].items() for word in (f"--{name}", str(value))]
    assert parsed(script, words).typed == FROZEN["flags"][script]


def test_the_page_on_switching_names_every_module_that_a_fork_may_collide_with() -> None:
    package = Path(importlib.import_module("guided_diffusion").__file__ or "").parent
    modules = {path.stem for path in package.iterdir() if not path.name.startswith(("__", "py.typed"))}
    page = (package.parent / "docs" / "switching.md").read_text(encoding="utf-8")
    missing = [name for name in sorted(modules - set(FROZEN["names"])) if f"`{name}`" not in page]
    assert not missing


# What `from guided_diffusion.X import *` gave in 2021 beside the names above: modules and names that it had imported itself.
LEFT_BY_STAR = {
    "dist_util": "MPI bf dist io os socket th",
    "fp16_util": "logger nn np th",
    "gaussian_diffusion": "discretized_gaussian_log_likelihood enum math mean_flat normal_kl np th",
    "image_datasets": "DataLoader Dataset Image MPI bf math np random",
    "logger": "contextmanager datetime defaultdict json os osp shutil sys tempfile time warnings",
    "losses": "np th",
    "nn": "math nn th",
    "resample": "ABC abstractmethod dist np th",
    "respace": "GaussianDiffusion np th",
    "script_util": "EncoderUNetModel SpacedDiffusion SuperResModel UNetModel argparse gd inspect space_timesteps",
    "train_util": "AdamW DDP LossAwareSampler MixedPrecisionTrainer UniformSampler bf copy dist dist_util functools logger os th "
    "update_ema",
    "unet": "F abstractmethod avg_pool_nd checkpoint conv_nd convert_module_to_f16 convert_module_to_f32 linear math nn normalization np "
    "th timestep_embedding zero_module",
}


@pytest.mark.parametrize("module", FROZEN["names"])
def test_a_star_import_leaves_what_it_left(module: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"from guided_diffusion.{module} import *", namespace)
    public = {name for name in FROZEN["names"][module] if not name.startswith("_")}
    assert {*LEFT_BY_STAR[module].split(), *public} <= set(namespace)


def test_names_that_are_modules_work() -> None:
    from guided_diffusion.dist_util import MPI
    from guided_diffusion.fp16_util import _flatten_dense_tensors, _unflatten_dense_tensors
    from guided_diffusion.image_datasets import Image, math

    assert MPI.COMM_WORLD.Get_size() == 1 and Image.new("RGB", (2, 2)).size == (2, 2) and math.pi > 3
    pieces = [torch.ones(2), torch.zeros(1)]
    again = _unflatten_dense_tensors(_flatten_dense_tensors(pieces), pieces)
    assert [piece.tolist() for piece in again] == [[1, 1], [0]]


# Not needed before something is made, drawn or written.
LATER = "blobfile mpi4py scipy sympy torch._dynamo torchvision pandas matplotlib tensorboard safetensors".split()
ROOMS = "build sampling config training.trainer weights.released weights.load".split()
LATER += [f"guided_diffusion.{name}" for name in ROOMS]


@pytest.fixture(scope="module")
def loaded_by_doors() -> dict[str, list[str]]:
    program = """
import importlib, json, sys
before = set(sys.modules)
importlib.import_module("guided_diffusion.{0}")
print(json.dumps(["{0}", sorted(set(sys.modules) - before)]))
"""
    printed = run_forked(*(program.format(name) for name in FROZEN["names"]))
    return dict(json.loads(line) for line in printed.splitlines())


@pytest.mark.parametrize("module", FROZEN["names"])
def test_doors_load_nothing_heavy(module: str, loaded_by_doors: dict[str, list[str]]) -> None:
    loaded = loaded_by_doors[module]
    assert f"guided_diffusion.{module}" in loaded
    heavy = [*LATER, "PIL"] if module == "image_datasets" else [*LATER, "PIL", "guided_diffusion.data"]
    if module in ("script_util", "gaussian_diffusion", "respace", "unet"):
        heavy += [f"guided_diffusion.diffusion.{room}" for room in ("process", "denoiser", "likelihood", "guidance")]
    assert not [name for name in loaded for other in heavy if name == other or name.startswith(f"{other}.")]
