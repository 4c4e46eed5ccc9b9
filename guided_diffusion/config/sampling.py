"""Configuration of sampling (networks, sampler, grid, guidance, and how fast), and of measuring likelihoods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fields import SWITCH, Section, flag
from .runs import PRECISIONS, TF32_HELP, WEIGHTS, WEIGHTS_HELP

_FEW = 100  # from so many steps on, ancestral sampling is the default of --steps and --nodes
# Flags that are passed on, by these names, to the sampler or the grid that has them.
CHAIN_OPTIONS = "nodes sigma_max sigma_min rho order final_order exact eta tau churn churn_min churn_max noise_scale restart".split()


@dataclass(frozen=True)
class SampleConfig(Section):
    """How images are sampled."""

    model_path: str = flag("", "weights of the diffusion model: a file, or a run folder (its newest EMA is taken)")
    weights: str = flag("", WEIGHTS_HELP, choices=WEIGHTS)
    classifier_path: str = flag("", "weights of the classifier: a file or a run folder")
    classifier_scale: float = flag(1.0, "strength of the guidance; 0 = none, below 0 = away from the class")
    guidance: str = flag(
        "",
        "which guidances, separated by commas; empty = classifier where --classifier_path is given",
        table="diffusion.guidance:GUIDANCES",
    )
    guidance_scale: str = flag(
        "", "strength of the guidances other than by a classifier; empty = the usual one of each (docs/guidance.md)"
    )
    guidance_interval: str = flag("", "LOW,HIGH: guide at noise levels LOW < sigma/alpha <= HIGH only")
    guidance_options: str = flag("", "further options of the guidances: name=value,... (docs/guidance.md)")
    guide_path: str = flag(
        "", "weights of a second network: without classes for classifier_free, a weaker one for autoguidance"
    )
    entropy_scale: bool = flag(
        False, "scale the classifier's gradient by log(classes) / entropy of its answer, per image"
    )
    rescale: float = flag(0.0, "bring the contrast of a guided image back: 0 = not, 1 = fully", low=0.0, high=1.0)
    epsilon_scale: str = flag("1", "divide predicted noise by this: 1.004; or by K*n + B at the n-th last step: K,B")
    threshold: float = flag(
        0.0,
        "dynamic threshold: the quantile of |x0| that is brought to 1, such as 0.995; 0 = clip at 1",
        low=0.0,
        high=1.0,
    )
    clip: str = flag(
        "",
        "clip x0 before guidance, after it, or not; empty = before where a classifier alone guides ancestral or ddim, as in 2021, "
        "else after",
        choices=("", "before", "after", "none"),
    )
    clip_denoised: bool = flag(True, "keep every predicted clean image within [-1, 1]; False = --clip none")
    num_samples: int = flag(10000, "how many images", low=1)
    batch_size: int = flag(
        16, "images per pass and process; auto (or 0) = as many as fit, found by trying", low=0, auto=0
    )
    use_ddim: bool = flag(False, "sample with DDIM instead of the ancestral chain")
    sampler: str = flag(
        "",
        "empty = by --use_ddim, or with --steps or --nodes: ancestral from 100 steps on, else ddim; fast = few steps, unipc on "
        "the quadratic grid",
        table="diffusion.samplers:SAMPLERS diffusion.samplers:ALIASES",
    )
    steps: int = flag(0, "how many steps, placed by --grid; 0 = those of --timestep_respacing or --nodes", low=0)
    grid: str = flag("", "where the steps are; empty = as fits the sampler", table="diffusion.grids:GRIDS")
    nodes: str = flag("", "the steps themselves, falling: 999,850,736 ... or as noise levels: sigma:14.6,6.4 ...")
    sigma_max: float = flag(
        0.0,
        "noise level sigma/alpha where the grid starts at most; 0 = 164, or no limit for ancestral and ddim",
        low=0.0,
    )
    sigma_min: float = flag(0.0, "noise level at which the grid ends at least; 0 = the process's last", low=0.0)
    rho: float = flag(7.0, "exponent of the karras grid", low=0.0)
    order: int = flag(0, "order of a multistep or single-step solver; 0 = its default", low=0)
    final_order: int = flag(
        1, "order of the move into the last step at most; lower is safer where steps are few", low=1
    )
    exact: bool = flag(False, "dpm_solver of order 3 with exact weights instead of the published ones")
    eta: float = flag(
        -1.0,
        "fresh noise: 0 = none, 1 = as much as the ancestral chain; -1 = 0 for ddim, 1 for other samplers",
        low=-1.0,
    )
    tau: float = flag(1.0, "fresh noise of sa: 0 = none, 1 = as much as the reverse process", low=0.0)
    churn: float = flag(0.0, "noise added again before each step of heun or euler (S_churn of EDM)", low=0.0)
    churn_min: float = flag(0.0, "only from this noise level on", low=0.0)
    churn_max: float = flag(1e9, "only up to this noise level", low=0.0)
    noise_scale: float = flag(1.0, "factor of the noise of churn and restart (S_noise of EDM)", low=0.0)
    restart: str = flag("", "of restart: steps,times,low,high;... between noise levels; empty = none")
    seed: int = flag(0, "image i depends on the seed and i; other batch sizes change it by rounding only", low=0)
    classes: str = flag("", "only these classes, by number or name: 3,7")
    labels: str = flag("random", "how classes are assigned to images", choices=("random", "balanced"))
    precision: str = flag("", "arithmetic of the networks; empty = by --use_fp16", choices=PRECISIONS)
    classifier_precision: str = flag("", "arithmetic of the classifier; empty = as --precision", choices=PRECISIONS)
    picture: int = flag(64, "images in the overview picture; 0 = none", low=0)
    compile: str = flag(
        "auto",
        "compile networks by torch.compile: minutes at first, then faster on a GPU; auto = where the images that are left "
        "take so long that it pays",
        choices=tuple(SWITCH),
    )
    cuda_graphs: str = flag(
        "auto",
        "each guided step as one CUDA graph, which is faster where batches are small; auto = there, from 20 steps on",
        choices=tuple(SWITCH),
    )
    tf32: bool = flag(True, TF32_HELP)
    deterministic: bool = flag(
        False, "image i is the same to the bit for every --batch_size, as networks always get 8 images at a time"
    )

    @property
    def chain_options(self) -> dict[str, Any]:
        """The options of sampler and grid that are not at their defaults, by name."""
        given = {name: getattr(self, name) for name in CHAIN_OPTIONS}
        return {name: value for name, value in given.items() if value != getattr(SampleConfig, name)}

    @property
    def method(self) -> str:
        """The sampler's name, a key of `SAMPLERS`."""
        count = self.steps or len([node for node in self.nodes.split(",") if node.strip()])
        return self.sampler or ("ddim" if self.use_ddim or 0 < count < _FEW else "ancestral")

    def _check(self) -> None:
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise ValueError(
                f"--use_ddim True and --sampler {self.sampler!r} are two ways to say one thing; leave one of the two out"
            )
        if self.nodes and (self.steps or self.grid):
            other = f"--steps {self.steps}" if self.steps else f"--grid {self.grid!r}"
            raise ValueError(
                f"--nodes {self.nodes!r} and {other} are two ways to say where steps are; leave one of the two out"
            )
        if self.grid in ("sections", "nodes"):
            instead = "--nodes 999,850,736" if self.grid == "nodes" else "--timestep_respacing 90,60,60,20,20"
            raise ValueError(f"--grid {self.grid} is said with its steps: give {instead} instead")
        if not self.clip_denoised and self.clip not in ("", "none"):
            raise ValueError(
                f"--clip_denoised False and --clip {self.clip!r} contradict each other; leave one of the two out"
            )
        if self.grid and not self.steps:
            raise ValueError(f"--grid is {self.grid!r}, and --steps is 0; say how many steps, as in --steps 25")
        if self.deterministic and self.compile == "on":
            raise ValueError(
                "--deterministic True computes without a compiler, and --compile is 'on'; leave one of the two out"
            )


@dataclass(frozen=True)
class LikelihoodConfig(Section):
    """How the bits per dimension of images are measured."""

    model_path: str = flag("", "weights of the diffusion model: a file, or a run folder (its newest EMA is taken)")
    weights: str = flag("", WEIGHTS_HELP, choices=WEIGHTS)
    clip_denoised: bool = flag(True, "keep every predicted clean image within [-1, 1]")
    num_samples: int = flag(1000, "how many images", low=1)
    batch_size: int = flag(1, "images per pass and process", low=1)
    seed: int = flag(0, "seed of the choice of images and of the noise", low=0)
    precision: str = flag("", "arithmetic of the network; empty = by --use_fp16", choices=PRECISIONS)
    tf32: bool = flag(True, TF32_HELP)
    out: str = flag("", "folder for the bound's terms and the summary")
