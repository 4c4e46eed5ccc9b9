"""The fifteen models released in July 2021, as data: URLs, flags, published ways of sampling and their scores.

Scores are FID, sFID, precision, recall of 50,000 samples, from Tables 5, 6 and 14 of Dhariwal & Nichol (2021),
https://arxiv.org/abs/2105.05233. Table 10 prints 3.85 for the stack to 256; Table 6 and the evaluator's log say 3.94.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from ..config import NETWORKS, DiffusionConfig, Network
from ..runtime import storage

_log = logging.getLogger(__name__)
BASE_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"


class Scores(NamedTuple):
    """Published quality of 50,000 samples."""

    fid: float
    sfid: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Recipe:
    """One published way of sampling: `scale` 0 is unguided; `respacing` as in --timestep_respacing.

    `base`: of an upsampler, how the model `small` makes the small images first; the scores are those of both stages.
    """

    respacing: str
    scale: float
    expected: Scores | None
    use_ddim: bool = False
    note: str = ""
    base: Recipe | None = None
    small: str = ""


@dataclass(frozen=True)
class Preset:
    """One released file. `flags` are those of 2021, spelled out where they differ from the defaults."""

    name: str
    kind: str
    flags: Mapping[str, Any]
    classifier: str = ""
    recipes: tuple[Recipe, ...] = ()
    title: str = ""

    def figure(self, recipe: Recipe) -> str:
        """The short name of a published score: imagenet256-guided, lsun-cat-sweep. Of 250 steps, which are the rule except for LSUN,
        the name says nothing; of two stages it is imagenet512-stack-guided-250-ddim25."""
        guided, steps = "guided" if (recipe.base or recipe).scale else "unguided", recipe.respacing
        if recipe.base:
            both = "" if steps == "250" else f"-{recipe.base.respacing}-{steps}"
            return f"imagenet{self.flags['large_size']}-stack-{guided}{both}"
        lsun = self.name.startswith("lsun_")
        if not steps or (steps == "250" and not lsun):
            end = ""
        else:
            end = "-sweep" if "," in steps else f"-{steps}"
        if lsun:
            return self.name.replace("_", "-") + end
        plain = "" if self.flags["class_cond"] else "-uncond"
        return f"imagenet{self.flags['image_size']}{plain}-{guided}{end}"

    @property
    def file(self) -> str:
        return f"{self.name}.pt"

    @property
    def url(self) -> str:
        return BASE_URL + self.file

    @property
    def model(self) -> Network:
        """The network's configuration."""
        return NETWORKS[self.kind].from_flags(self.flags)

    @property
    def diffusion(self) -> DiffusionConfig:
        """The noise process the network was trained on; a classifier has that of the diffusion models of its image size."""
        return DiffusionConfig.from_flags(self.flags)


# Only the base model is guided. Which scale the stacks had is not published; these are the paper's best ones of the base models alone.
_STACK = "the scale of the base is that of the base model alone"
_OTHER = f"by another classifier than Table 12's; whether the released one is it is not known; {_STACK}"


def _stack(small: str, base: tuple[str, float], respacing: str, expected: Scores, note: str = "") -> Recipe:
    """Both stages; `base` is the respacing and scale of the first."""
    first = Recipe(*base, None, use_ddim=base[0].startswith("ddim"))
    return Recipe(respacing, 0.0, expected, respacing.startswith("ddim"), note, first, small)


# Each model's main result in the paper comes first.
_RECIPES = (
    ("64x64_diffusion", Recipe("250", 0.0, Scores(2.07, 4.29, 0.74, 0.63))),
    ("64x64_diffusion", Recipe("250", 1.0, None, note="guidance makes this size worse in FID")),
    ("128x128_diffusion", Recipe("250", 0.5, Scores(2.97, 5.09, 0.78, 0.59))),
    ("128x128_diffusion", Recipe("250", 0.0, Scores(5.91, 5.09, 0.70, 0.65))),
    ("128x128_diffusion", Recipe("ddim25", 1.25, Scores(5.98, 7.04, 0.78, 0.51), use_ddim=True)),
    ("256x256_diffusion", Recipe("250", 1.0, Scores(4.59, 5.25, 0.82, 0.52))),
    ("256x256_diffusion", Recipe("250", 0.0, Scores(10.94, 6.02, 0.69, 0.63))),
    ("256x256_diffusion", Recipe("ddim25", 2.5, Scores(5.44, 5.32, 0.81, 0.49), use_ddim=True)),
    ("256x256_diffusion_uncond", Recipe("250", 10.0, Scores(12.00, 10.40, 0.76, 0.44))),
    ("256x256_diffusion_uncond", Recipe("250", 0.0, Scores(26.21, 6.35, 0.61, 0.63))),
    ("512x512_diffusion", Recipe("250", 4.0, Scores(7.72, 6.57, 0.87, 0.42))),
    ("512x512_diffusion", Recipe("250", 0.0, Scores(23.24, 10.19, 0.73, 0.60))),
    ("512x512_diffusion", Recipe("ddim25", 9.0, Scores(8.41, 9.67, 0.83, 0.47), use_ddim=True)),
    ("64_256_upsampler", _stack("64x64_diffusion", ("250", 1.0), "250", Scores(3.94, 6.14, 0.83, 0.53), _STACK)),
    ("64_256_upsampler", _stack("64x64_diffusion", ("250", 0.0), "250", Scores(7.49, 5.13, 0.72, 0.63))),
    ("128_512_upsampler", _stack("128x128_diffusion", ("250", 0.5), "250", Scores(3.85, 5.86, 0.84, 0.53), _OTHER)),
    ("128_512_upsampler", _stack("128x128_diffusion", ("250", 0.0), "250", Scores(9.96, 5.62, 0.75, 0.64))),
    ("128_512_upsampler", _stack("128x128_diffusion", ("250", 0.5), "ddim25", Scores(4.11, 9.57, 0.83, 0.55), _OTHER)),
    (
        "128_512_upsampler",
        _stack("128x128_diffusion", ("ddim25", 1.25), "ddim25", Scores(5.96, 12.10, 0.81, 0.54), _OTHER),
    ),
    ("lsun_bedroom", Recipe("", 0.0, Scores(1.90, 5.59, 0.66, 0.51))),
    ("lsun_bedroom", Recipe("90,60,60,20,20", 0.0, Scores(2.02, 6.12, 0.67, 0.50))),
    ("lsun_bedroom", Recipe("250", 0.0, Scores(2.31, 6.12, 0.65, 0.50))),
    ("lsun_cat", Recipe("", 0.0, Scores(5.57, 6.69, 0.63, 0.52))),
    ("lsun_cat", Recipe("90,60,60,20,20", 0.0, Scores(5.94, 7.43, 0.62, 0.52))),
    ("lsun_cat", Recipe("250", 0.0, Scores(7.03, 8.24, 0.60, 0.53))),
    ("lsun_horse", Recipe("", 0.0, Scores(2.57, 6.81, 0.71, 0.55))),
    ("lsun_horse", Recipe("90,60,60,20,20", 0.0, Scores(2.83, 7.08, 0.69, 0.56))),
    ("lsun_horse", Recipe("250", 0.0, Scores(3.45, 7.55, 0.68, 0.56))),
    ("lsun_horse_nodropout", Recipe("", 0.0, Scores(2.95, 5.94, 0.69, 0.55))),
)
_COMMON = {
    "diffusion_steps": 1000, "learn_sigma": True, "noise_schedule": "linear", "num_classes": 1000, "num_res_blocks": 2,
    "resblock_updown": True, "use_scale_shift_norm": True, "attention_resolutions": "32,16,8",
}  # fmt: skip
_BIG = {**_COMMON, "num_channels": 256, "num_head_channels": 64, "use_fp16": True}
_DEEP: dict[str, Any] = {
    "num_channels": 192, "num_res_blocks": 3, "dropout": 0.1, "noise_schedule": "cosine", "use_new_attention_order": True,
}  # fmt: skip
_UPSAMPLER = {"class_cond": True, "num_channels": 192, "use_fp16": True}
_CLASSIFIER = {
    "classifier_width": 128, "classifier_depth": 2, "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True, "classifier_pool": "attention",
    "num_classes": 1000, "learn_sigma": True, "diffusion_steps": 1000, "noise_schedule": "linear",
}  # fmt: skip


def _preset(name: str, kind: str, title: str, flags: dict[str, Any], classifier: str = "") -> Preset:
    recipes = tuple(recipe for model, recipe in _RECIPES if model == name)
    return Preset(name, kind, MappingProxyType(flags), classifier, recipes, title)


def _imagenet(size: int, *, class_cond: bool = True, **flags: Any) -> Preset:
    name, title = f"{size}x{size}_diffusion", f"ImageNet {size}"
    if not class_cond:
        name, title = f"{name}_uncond", f"{title}, unconditional"
    flags = {**_BIG, "image_size": size, "class_cond": class_cond, "num_classes": 1000 * class_cond, **flags}
    return _preset(name, "diffusion", title, flags, f"{size}x{size}_classifier")


def _upsampler(small: int, large: int, **flags: Any) -> Preset:
    flags = {**_COMMON, **_UPSAMPLER, "small_size": small, "large_size": large, **flags}
    return _preset(f"{small}_{large}_upsampler", "super_resolution", f"ImageNet {small} to {large}", flags)


def _lsun(what: str, *, dropout: float = 0.1) -> Preset:
    flags = {**_BIG, "image_size": 256, "class_cond": False, "dropout": dropout, "num_classes": 0}
    title = f"LSUN {what.partition('_')[0]} 256{'' if dropout else ', no dropout'}"
    return _preset(f"lsun_{what}", "diffusion", title, flags)


def _classifier(size: int, **flags: Any) -> Preset:
    flags = {**_CLASSIFIER, "image_size": size, **flags}
    return _preset(f"{size}x{size}_classifier", "classifier", f"ImageNet {size} classifier", flags)


_ALL = (
    _imagenet(64, **_DEEP),
    _imagenet(128, num_heads=4, num_head_channels=-1),
    _imagenet(256),
    _imagenet(256, class_cond=False),
    _imagenet(512, use_fp16=False),
    _upsampler(64, 256, num_heads=4),
    _upsampler(128, 512, attention_resolutions="32,16", num_head_channels=64),
    _lsun("bedroom"),
    _lsun("cat"),
    _lsun("horse"),
    _lsun("horse_nodropout", dropout=0.0),
    _classifier(64, classifier_depth=4, noise_schedule="cosine"),
    _classifier(128),
    _classifier(256),
    _classifier(512),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})
# sha256 over the sorted "name shape" lines of each released file, first 16 digits. Files with equal layouts have equal digits.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "af57c12d0be8b4f4": ("64x64_diffusion",),
    "44eb5c6a285f9d17": ("128x128_diffusion",),
    "6d41483df3735902": ("256x256_diffusion",),
    "86f5708ebb91ab69": ("256x256_diffusion_uncond", "lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"),
    "90cfe02eac79fe24": ("512x512_diffusion",),
    "2171275097dc629a": ("64_256_upsampler",),
    "0379ba7ff3ffeb4f": ("128_512_upsampler",),
    "98f9cbaa7b28a2c4": ("64x64_classifier",),
    "b2e8e68f3386213b": ("128x128_classifier",),
    "3524443c57fd1ae5": ("256x256_classifier",),
    "04d1005b8a050740": ("512x512_classifier",),
}


def get(name: str) -> Preset:
    """The preset with this name or file name; ValueError lists the names."""
    preset = PRESETS.get(name.removesuffix(".pt"))
    if preset is None:
        raise ValueError(f"no released model is called {name!r}; there are {', '.join(PRESETS)}")
    return preset


def listing() -> str:
    """The text of `zoo list`: one line per model and published way of sampling."""
    lines = [f"{'name':26s} {'what':34s} {'classifier':20s} {'scale':>5s} {'steps':>15s}    FID   sFID  Prec   Rec"]
    for preset in PRESETS.values():
        named = f"{preset.name:26s} {preset.title:34s}"
        lines += [] if preset.recipes else [named]
        for recipe in preset.recipes:
            steps = recipe.respacing or str(preset.flags["diffusion_steps"])
            guided, by = recipe, preset
            if recipe.base:  # of a stack the base is guided
                guided, by, steps = recipe.base, get(recipe.small), f"{recipe.base.respacing} + {steps}"
            classifier = by.classifier if guided.scale else "-"
            scores = "".join(f" {value:{width}.2f}" for value, width in zip(recipe.expected or (), (6, 6, 5, 5)))
            lines.append(f"{named} {classifier:20s} {guided.scale:5g} {steps:>15s}{scores}")
    return "\n".join([*lines, f"files: {BASE_URL}NAME.pt"])


def describe(preset: Preset) -> str:
    """The text of `zoo show`: file, flags, ways of sampling and published scores of one model."""
    lines = [f"{preset.name}: {preset.title} ({preset.kind})", f"file   {preset.url}"]
    lines.append("flags  " + " ".join(f"--{name} {value}" for name, value in preset.flags.items()))
    for recipe in preset.recipes:
        scores, note = "no published figure", f" ({recipe.note})" if recipe.note else ""
        if e := recipe.expected:
            scores = f"FID {e.fid}, sFID {e.sfid}, precision {e.precision}, recall {e.recall}"
        lines.append(f"recipe {_way(preset, recipe)}: {scores}{note}")
    return "\n".join(lines)


def _way(preset: Preset, recipe: Recipe) -> str:
    """How a recipe samples: "DDIM, ddim25 steps, 256x256_classifier at scale 2.5"."""
    steps = f"{'DDIM, ' if recipe.use_ddim else ''}{recipe.respacing or preset.flags['diffusion_steps']} steps"
    if recipe.base:
        return f"{steps}, of images by {recipe.small}, {_way(get(recipe.small), recipe.base)}"
    return f"{steps}, {f'{preset.classifier} at scale {recipe.scale:g}' if recipe.scale else 'unguided'}"


def fetch(preset: Preset, cache: str) -> str:
    """The path of the released file in the folder `cache`, after a download with a progress bar if it is not there.

    A download is checked twice: its length against the server's, and its tensors' names and shapes against the released layout
    (2021 published no checksums; the SHA-256 of the download is logged). ConnectionError says which file to place where.
    """
    target = os.path.join(cache, preset.file)
    if not os.path.isfile(target):
        try:
            storage.download(preset.url, target, check=lambda path: check(path, preset))
        except OSError as error:
            raise ConnectionError(
                f"cannot download {preset.url} ({error}). Bring the file from a machine that can, and place it at {target}"
            ) from None
    return target


def check(path: str, preset: Preset) -> str:
    """sha256 of a released file; ValueError unless its tensors have the names and shapes of that release."""
    from .files import load_weights
    from .recognise import signature

    shapes = {name: tuple(value.shape) for name, value in load_weights(path).items()}
    if preset.name not in SIGNATURES.get(signature(shapes), ()):
        raise ValueError(
            f"{path} does not have the names and shapes of {preset.file}; the download is damaged or another file"
        )
    digest = storage.sha256_of(path)
    _log.info("%s: sha256 %s, names and shapes as released", preset.file, digest)
    return digest
