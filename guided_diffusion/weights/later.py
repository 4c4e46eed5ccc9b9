"""Figures published after 2021 for the released models, by other sampling or guidance and without training the diffusion model.

Nothing here was measured with this package. What a source says of its own setting is given as it is said there; what could not be
read there, or contradicts other reports, stands in the caveat.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Later(NamedTuple):
    """One figure.

    model     name of the released model
    before    FID of the method of 2021 at as many steps
    expected  the published scores, as the fields of `released.Scores`
    cost      calls per image
    flags     of `sample`, which run it besides the paths of weights; "" where the package has no such method or lacks its weights
    """

    name: str
    model: str
    technique: str
    setting: str
    before: float | None
    expected: Mapping[str, float]
    cost: str
    source: str
    caveat: str
    flags: str = ""

    @property
    def guided(self) -> bool:
        """Whether the released classifier of the model's size is part of it."""
        return "--classifier_scale" in self.flags


_EDM = "Karras et al. 2022 (arXiv 2206.00364), abstract; values as five other code bases cite its table 5"
_ES = "Ning et al. 2024, ADM-ES (arXiv 2308.15321), picture in its repository"
_SAG = "Hong et al. 2023 (arXiv 2210.00939), its repository"
_EDS = "Zheng et al. 2022, entropy-driven sampling (arXiv 2206.11474)"
_EULER = "Ma et al. 2023, EluCD (arXiv 2310.11311), its repository"


def _epsilon(size: int, steps: int, before: float, fid: float, scale: str, guide: str = "") -> Later:
    how = f"predicted noise divided by {scale if ',' not in scale else '{} n + {}'.format(*scale.split(','))}, {steps} steps"
    flags = f"--timestep_respacing {steps} --epsilon_scale {scale}{guide}"
    caveat = "read off a picture"
    name = f"imagenet{size}-epsilon{steps}"
    return Later(
        name, f"{size}x{size}_diffusion", "epsilon scaling", how, before, {"fid": fid}, f"{steps}", _ES, caveat, flags
    )


_STEPS_250 = "--timestep_respacing 250"
_ALL = (
    Later(
        "imagenet64-churn", "64x64_diffusion", "stochastic Heun solver",
        "churn 80 at noise levels 0.05 to 50, noise 1.003, found by a search", 2.07, {"fid": 1.55},
        "several hundred to 1000, not confirmed", _EDM,
        "the least of three runs, against another reference file; number of steps and grid were not read, those in the flags are ours; "
        "EDM's own network of this size uses churn 40",
        "--sampler heun --grid karras --steps 256 --churn 80 --churn_min 0.05 --churn_max 50 --noise_scale 1.003",
    ),
    _epsilon(64, 100, 2.71, 2.39, "1.006"),
    _epsilon(64, 50, 3.75, 3.07, "1.006"),
    _epsilon(64, 20, 10.96, 7.37, "0.0002,1.0041"),
    Later(
        "imagenet64-pfdiff4", "64x64_diffusion", "reuse of past and future noise (PFDiff)", "guided, 4 calls", 138.81, {"fid": 16.46},
        "4", "Wang et al. 2024, PFDiff, abstract", "before: DDIM with 4 steps",
    ),
    Later(
        "imagenet128-classifier-x0-divergence", "128x128_diffusion", "off-the-shelf classifier on x0",
        "ResNet-101 and a divergence term", 2.97, {"fid": 2.13}, "250 and 250 of the ResNet", "workshop paper of 2025, abstract",
        "another version of the same abstract says 2.29",
    ),
    Later(
        "imagenet128-classifier-x0", "128x128_diffusion", "off-the-shelf classifier on x0", "ResNet-101 with softplus instead of ReLU",
        2.97, {"fid": 2.19, "precision": 0.79, "recall": 0.58}, "250 and 250 of the ResNet", _EULER,
        "FID by pytorch-fid; with ResNet-50 2.36; the ResNet's weights are torchvision's",
    ),
    Later(
        "imagenet128-sag", "128x128_diffusion", "self-attention guidance", "scale 0.1, with the classifier at 0.5", 2.97,
        {"fid": 2.58, "sfid": 4.35, "precision": 0.79, "recall": 0.59}, "500 and 250 of the classifier", _SAG,
        "the script there makes 10,000 samples",
        f"{_STEPS_250} --guidance classifier,sag --classifier_scale 0.5 --guidance_scale 0.1",
    ),
    Later(
        "imagenet128-sag-unguided", "128x128_diffusion", "self-attention guidance", "scale 0.1, without the classifier", 5.91,
        {"fid": 5.11, "sfid": 4.09}, "500", _SAG, "the script there makes 10,000 samples",
        f"{_STEPS_250} --guidance sag --guidance_scale 0.1",
    ),
    Later(
        "imagenet128-entropy", "128x128_diffusion", "classifier scaled by the entropy of its answer", "scale 0.4", 2.97, {"fid": 2.63},
        "250 and 250 of the classifier", f"{_EDS}, table of results", "IS 159.7; with their retrained classifier 2.68 and IS 169.2",
        f"{_STEPS_250} --classifier_scale 0.4 --entropy_scale True",
    ),
    _epsilon(128, 100, 3.55, 3.37, "1.004", " --classifier_scale 0.5"),
    _epsilon(128, 50, 5.15, 4.33, "1.004", " --classifier_scale 0.5"),
    _epsilon(128, 20, 12.48, 9.86, "0.00022,1.00291", " --classifier_scale 0.5"),
    Later(
        "imagenet256-discriminator", "256x256_diffusion", "discriminator guidance (ADM-G++)",
        "with the classifier; a small discriminator of real and made images is trained", 4.59, {"fid": 3.18, "sfid": 4.53},
        "250 and 250 of the discriminator", "Kim et al. 2023 (arXiv 2211.17091), its repository", "tuned for recall 4.45",
    ),
    Later(
        "imagenet256-entropy-ect", "256x256_diffusion", "classifier scaled by the entropy of its answer",
        "with a classifier retrained for it, whose weights are released there", 4.59, {"fid": 4.09}, "250 and 250 of the classifier",
        f"{_EDS}, abstract", "with the classifier of 2021 they use scale 0.75; its FID was not read",
    ),
    Later(
        "imagenet256-unipc10", "256x256_diffusion", "UniPC solver", "guided, 10 calls", None, {"fid": 7.51}, "10",
        "Zhao et al. 2023 (arXiv 2302.04867), abstract", "scale 8 and 10,000 samples, not confirmed",
        "--sampler unipc --steps 10 --classifier_scale 8",
    ),
    Later(
        "imagenet256-dpm-solver20", "256x256_diffusion", "DPM-Solver++ (2M)", "scale 8, uniform steps, dynamic threshold, 20 calls", 9.37,
        {"fid": 9.10}, "20", "Lu et al. 2022 (arXiv 2211.01095), a copy of its table",
        "before: DDIM with 250 calls at the same scale; 9.46 with 15 calls; 10,000 samples. Users with 50,000 disagree (dpm-solver #50)",
        "--sampler dpm_solver --grid respaced --steps 20 --classifier_scale 8 --threshold 0.995",
    ),
    Later(
        "imagenet256-sag-unguided", "256x256_diffusion", "self-attention guidance", "scale 0.2, without the classifier", 10.94,
        {"fid": 9.41}, "500", _SAG, "the script there makes 10,000 samples", f"{_STEPS_250} --guidance sag --guidance_scale 0.2",
    ),
    Later(
        "imagenet256-uncond-sag", "256x256_diffusion_uncond", "self-attention guidance", "scale 0.8, without the classifier", 26.21,
        {"fid": 20.08}, "500", _SAG, "perturbed-attention guidance (scale 3, four layers) reports less; its number was not read",
        f"{_STEPS_250} --guidance sag --guidance_scale 0.8",
    ),
    Later(
        "imagenet256-uncond-entropy-ect", "256x256_diffusion_uncond", "classifier scaled by the entropy of its answer",
        "scale 4, with a classifier retrained for it, whose weights are released there", 12.00, {"fid": 6.78},
        "250 and 250 of the classifier", f"{_EDS}, abstract", "settings from its repository",
    ),
)  # fmt: skip
LATER: Mapping[str, Later] = MappingProxyType({later.name: later for later in _ALL})


def listing() -> str:
    """The text of `zoo later`."""
    lines = [
        "Published later for the released models, without training them; nothing here was measured with this package.",
        "`guided-diffusion reproduce NAME` runs those that have flags.",
        "",
    ]
    for later in LATER.values():
        scores = ", ".join(f"{name} {value:g}" for name, value in later.expected.items())
        before = "" if later.before is None else f" (before: FID {later.before:g})"
        lines += [
            f"{later.name}: {later.technique}; {later.setting}",
            f"  published  {scores}{before}; calls per image: {later.cost}",
            f"  source     {later.source}",
            f"  caveat     {later.caveat}",
            f"  flags      {later.flags or 'none: not a method of this package, or weights that are not released'}",
            "",
        ]
    return "\n".join([*lines, "Of the stacks to 256 and 512 and of the 512 pixel model no better figure was found."])
