"""Guided diffusion: train, guide and sample image diffusion models (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233).

Importing this package loads neither torch nor MPI; each name below is loaded when it is first touched.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build_classifier as build_classifier
    from .build import build_model as build_model
    from .build import build_process as build_process
    from .config import ClassifierConfig as ClassifierConfig
    from .config import DataConfig as DataConfig
    from .config import DiffusionConfig as DiffusionConfig
    from .config import ModelConfig as ModelConfig
    from .config import RunConfig as RunConfig
    from .config import SampleConfig as SampleConfig
    from .config import SuperResConfig as SuperResConfig
    from .config import TrainConfig as TrainConfig
    from .data.sources import SOURCES as SOURCES
    from .diffusion import grids as grids
    from .diffusion import guidance as guidance
    from .diffusion.combining import interval as interval
    from .diffusion.denoiser import Denoised as Denoised
    from .diffusion.denoiser import make_denoiser as make_denoiser
    from .diffusion.grids import GRIDS as GRIDS
    from .diffusion.guidance import GUIDANCES as GUIDANCES
    from .diffusion.process import Process as Process
    from .diffusion.process import at_nodes as at_nodes
    from .diffusion.process import make_process as make_process
    from .diffusion.process import respace as respace
    from .diffusion.process import space_timesteps as space_timesteps
    from .diffusion.samplers import SAMPLERS as SAMPLERS
    from .diffusion.samplers import adams as adams
    from .diffusion.samplers import ancestral as ancestral
    from .diffusion.samplers import ancestral_euler as ancestral_euler
    from .diffusion.samplers import ddim as ddim
    from .diffusion.samplers import ddim_invert as ddim_invert
    from .diffusion.samplers import deis as deis
    from .diffusion.samplers import dpm2 as dpm2
    from .diffusion.samplers import dpm_sde as dpm_sde
    from .diffusion.samplers import dpm_solver as dpm_solver
    from .diffusion.samplers import dpm_solver_s as dpm_solver_s
    from .diffusion.samplers import euler as euler
    from .diffusion.samplers import heun as heun
    from .diffusion.samplers import ipndm as ipndm
    from .diffusion.samplers import last as last
    from .diffusion.samplers import plms as plms
    from .diffusion.samplers import restart as restart
    from .diffusion.samplers import sa as sa
    from .diffusion.samplers import sde_dpm_solver as sde_dpm_solver
    from .diffusion.samplers import unipc as unipc
    from .diffusion.schedules import SCHEDULES as SCHEDULES
    from .diffusion.weighting import WEIGHTS as WEIGHTS
    from .models.architectures import ARCHITECTURES as ARCHITECTURES
    from .sampling.guiding import Guidance as Guidance
    from .sampling.guiding import classifier as classifier
    from .sampling.guiding import threshold as threshold
    from .sampling.jobs import Job as Job
    from .sampling.jobs import LabelPlan as LabelPlan
    from .sampling.jobs import Request as Request
    from .sampling.pipeline import make_pipeline as make_pipeline
    from .sampling.pipeline import sample as sample
    from .sampling.queue import answers as answers
    from .sampling.queue import generate as generate
    from .training.trainer import Trainer as Trainer
    from .weights import released as presets  # noqa: F401
    from .weights.load import Loaded as Loaded
    from .weights.load import load as load
    from .weights.load import save as save

# The public names: module -> what it gives to the package. The block above says the same to editors and type checkers.
_API = {
    "build": ("build_classifier", "build_model", "build_process"),
    "config": (
        "ClassifierConfig", "DataConfig", "DiffusionConfig", "ModelConfig", "RunConfig", "SampleConfig", "SuperResConfig",
        "TrainConfig",
    ),
    "diffusion.combining": ("interval",),
    "diffusion.denoiser": ("Denoised", "make_denoiser"),
    "diffusion.grids": ("GRIDS",),
    "diffusion.guidance": ("GUIDANCES",),
    "diffusion.process": ("Process", "at_nodes", "make_process", "respace", "space_timesteps"),
    "diffusion.samplers": (
        "SAMPLERS",
        "adams", "ancestral", "ancestral_euler", "ddim", "ddim_invert", "deis", "dpm2", "dpm_sde", "dpm_solver", "dpm_solver_s",
        "euler", "heun", "ipndm", "last", "plms", "restart", "sa", "sde_dpm_solver", "unipc",
    ),
    "data.sources": ("SOURCES",),
    "diffusion.schedules": ("SCHEDULES",),
    "diffusion.weighting": ("WEIGHTS",),
    "models.architectures": ("ARCHITECTURES",),
    "sampling.jobs": ("Job", "LabelPlan", "Request"),
    "sampling.guiding": ("Guidance", "classifier", "threshold"),
    "sampling.pipeline": ("make_pipeline", "sample"),
    "sampling.queue": ("answers", "generate"),
    "training.trainer": ("Trainer",),
    "weights.load": ("Loaded", "load", "save"),
}  # fmt: skip
_HOME = {name: module for module, names in _API.items() for name in names}
_MODULES = {
    "grids": "diffusion.grids",
    "guidance": "diffusion.guidance",
    "presets": "weights.released",
}  # names of modules themselves


def __getattr__(name: str) -> Any:
    """Load a public name on first touch (PEP 562)."""
    if name in _MODULES:
        value: Any = import_module(f".{_MODULES[name]}", __name__)
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "respace":
        # `respace` is a function and a module of 2021. Importing that module would replace the function here, so it is always the module,
        # which can be called as the function; the function itself where the module is not there.
        with suppress(ModuleNotFoundError):
            value = import_module(".respace", __name__)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
