"""Door: the factory functions and flag helpers of 2021, on config, build.py and cli/arguments.py.

The keys of the dicts and the positional parameters are frozen: programs build calls from them by inspection. What is new is keyword-only.
"""

import argparse
import inspect  # noqa: F401
from collections.abc import Iterable, Mapping
from typing import Any

from . import gaussian_diffusion as gd
from .models.unet import EncoderUNetModel, SuperResModel, UNetModel
from .respace import SpacedDiffusion, space_timesteps

# Read when a class-conditional network is made, so that assigning to it has an effect.
NUM_CLASSES = 1000

_DIFFUSION = (
    "learn_sigma", "diffusion_steps", "noise_schedule", "timestep_respacing", "use_kl", "predict_xstart",
    "rescale_timesteps", "rescale_learned_sigmas",
)  # fmt: skip
_CLASSIFIER = (
    "image_size", "classifier_use_fp16", "classifier_width", "classifier_depth", "classifier_attention_resolutions",
    "classifier_use_scale_shift_norm", "classifier_resblock_updown", "classifier_pool",
)  # fmt: skip
_SUPER_RES = (
    "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample", "num_head_channels", "attention_resolutions",
    "dropout", "class_cond", "use_checkpoint", "use_scale_shift_norm", "resblock_updown", "use_fp16",
)  # fmt: skip
_MODEL = (
    "image_size", "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample", "num_head_channels",
    "attention_resolutions", "channel_mult", "dropout", "class_cond", "use_checkpoint", "use_scale_shift_norm",
    "resblock_updown", "use_fp16", "use_new_attention_order",
)  # fmt: skip

_FIRST = ("image_size", "num_channels", "num_res_blocks")  # handed on by position, as in 2021


def _defaults(kind: str, names: tuple[str, ...]) -> dict[str, Any]:
    from . import config

    defaults = getattr(config, kind)()
    return {name: getattr(defaults, name) for name in names}


def _options(kind: str, values: dict[str, Any], learn_sigma: bool = False) -> dict[str, Any]:
    """The arguments of the network that these values of a config describe. Rooms are loaded here: importing the door costs little."""
    from . import build, config

    return build.network_options(getattr(config, kind)(**values), config.DiffusionConfig(learn_sigma=learn_sigma))


def _given(**options: Any) -> dict[str, Any]:
    """Of the options that 2021 did not have, those that were given: a program may have put its own function in place of one of these."""
    default: dict[str, Any] = {"channel_mult": "", "use_new_attention_order": False, "image_channels": 3}
    return {name: value for name, value in options.items() if value != default.get(name)}


def diffusion_defaults() -> dict[str, Any]:
    """The flags of `create_gaussian_diffusion`, with `diffusion_steps` for its `steps`."""
    return _defaults("DiffusionConfig", _DIFFUSION)


def classifier_defaults() -> dict[str, Any]:
    """The flags of `create_classifier`."""
    return _defaults("ClassifierConfig", _CLASSIFIER)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of `create_model_and_diffusion`."""
    return {**_defaults("ModelConfig", _MODEL), **diffusion_defaults()}


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of `create_classifier_and_diffusion`."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of `sr_create_model_and_diffusion`."""
    return {
        **_defaults("SuperResConfig", _SUPER_RES),
        **diffusion_defaults(),
        **_defaults("SuperResConfig", ("large_size", "small_size")),
    }


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
    *,
    num_classes: int | None = None,
    image_channels: int = 3,
) -> tuple[UNetModel, SpacedDiffusion]:
    """A network and its diffusion from the flags of `model_and_diffusion_defaults`."""
    given = locals()
    flags = {name: given[name] for name in (*_MODEL, "learn_sigma") if name not in _FIRST}
    flags |= _given(num_classes=num_classes, image_channels=image_channels)
    model = create_model(image_size, num_channels, num_res_blocks, **flags)
    return model, _diffusion(given)


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    *,
    num_classes: int | None = None,
    image_channels: int = 3,
) -> UNetModel:
    """The denoising network; class-conditional ones have `num_classes`, else NUM_CLASSES, classes."""
    given = locals()
    classes = (num_classes or NUM_CLASSES) if class_cond else 0
    values = {**{name: given[name] for name in _MODEL}, "num_classes": classes, "image_channels": image_channels}
    return UNetModel(**_options("ModelConfig", values, learn_sigma))


def create_classifier_and_diffusion(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    learn_sigma: bool,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    *,
    num_classes: int | None = None,
    image_channels: int = 3,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """A classifier and the diffusion it is trained for, from the flags of `classifier_and_diffusion_defaults`."""
    given = locals()
    flags = (given[name] for name in _CLASSIFIER)
    classifier = create_classifier(*flags, **_given(num_classes=num_classes, image_channels=image_channels))
    return classifier, _diffusion(given)


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    *,
    num_classes: int = 1000,
    image_channels: int = 3,
) -> EncoderUNetModel:
    """The classifier of noised images. As in 2021 it has 1000 outputs whatever NUM_CLASSES says; `num_classes` changes that."""
    return EncoderUNetModel(**_options("ClassifierConfig", locals()))


def sr_create_model_and_diffusion(
    large_size: int,
    small_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    *,
    channel_mult: str = "",
    use_new_attention_order: bool = False,
    num_classes: int | None = None,
    image_channels: int = 3,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """A super-resolution network and its diffusion from the flags of `sr_model_and_diffusion_defaults`."""
    given = locals()
    flags = {name: given[name] for name in (*_SUPER_RES, "learn_sigma") if name not in _FIRST}
    more = ("channel_mult", "use_new_attention_order", "num_classes", "image_channels")
    flags |= _given(**{name: given[name] for name in more})
    return sr_create_model(large_size, small_size, num_channels, num_res_blocks, **flags), _diffusion(given)


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
    *,
    channel_mult: str = "",
    use_new_attention_order: bool = False,
    num_classes: int | None = None,
    image_channels: int = 3,
) -> SuperResModel:
    """The network that makes `large_size` images from `small_size` ones."""
    given = {name: value for name, value in locals().items() if name != "learn_sigma"}
    given["num_classes"] = (num_classes or NUM_CLASSES) if class_cond else 0
    return SuperResModel(**_options("SuperResConfig", given, learn_sigma))


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: Any = "",
) -> SpacedDiffusion:
    """The diffusion of these flags. `timestep_respacing` may be a string, a whole number or a list; "" keeps every step."""
    fixed = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    mse = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),  # looked up at each call: programs replace it
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=gd.LossType.RESCALED_KL if use_kl else mse,
        rescale_timesteps=rescale_timesteps,
    )


def _diffusion(given: dict[str, Any]) -> SpacedDiffusion:
    flags = {name: given[name] for name in _DIFFUSION}
    return create_gaussian_diffusion(steps=flags.pop("diffusion_steps"), **flags)


def str2bool(v: str | bool) -> bool:
    """Read a boolean: yes true t y 1, no false f n 0, in any case."""
    from .cli import arguments

    return arguments.str2bool(v)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add one `--key` per entry, of the type of its default; None reads as text, booleans through `str2bool`."""
    for key, default in default_dict.items():
        read: Any = str2bool if isinstance(default, bool) else str if default is None else type(default)
        parser.add_argument(f"--{key}", default=default, type=read)


def args_to_dict(args: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The attributes `keys` of parsed arguments (or any object) as a dict."""
    return {key: getattr(args, key) for key in keys}
