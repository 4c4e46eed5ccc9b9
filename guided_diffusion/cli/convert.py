"""`convert`: weights under another roof (safetensors, diffusers' UNet2DModel), each time with the largest output difference measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import WEIGHTS, WEIGHTS_HELP, ModelConfig
from .arguments import Parser

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config import RunConfig
    from ..weights.load import Loaded


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion convert SOURCE TARGET`: the target's form is that of its name, or --to."""
    parser = Parser(prog="guided-diffusion convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", help="weights: .pt, .safetensors, a run folder, or a folder that diffusers wrote")
    parser.add_argument("target", help="NAME.safetensors, NAME.pt, or a folder for --to diffusers")
    parser.add_argument(
        "--to", choices=("safetensors", "pt", "diffusers"), help="the form; default: by the target's name"
    )
    parser.add_argument(
        "--noise_schedule", default="linear", help="of a diffusers source, which does not carry it (default linear)"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="", help=WEIGHTS_HELP)
    args = parser.parse_args(argv)
    to = args.to or {".safetensors": "safetensors", ".pt": "pt"}.get(Path(args.target).suffix)
    if to is None:
        raise ValueError(
            f"cannot tell the form of {args.target!r}; end it in .safetensors or .pt, or say --to diffusers"
        )

    source = Path(args.source)
    if (source / "config.json").is_file() and "UNet2DModel" in (source / "config.json").read_text(encoding="utf-8"):
        loaded, original = load_diffusers(source, args.noise_schedule)
    else:
        from ..weights.load import load

        loaded = load(args.source, weights=args.weights)
        original = loaded.net
    if to == "diffusers":
        converted = save_diffusers(loaded, args.target)
    else:
        save_file(loaded, args.target, to)
        converted = _reload(args.target, loaded.config)
    difference = largest_difference(original, converted, loaded.config)
    print(f"{args.source} -> {args.target} ({to}); largest output difference on the same input: {difference:.3g}")
    return 0


def _flags(config: RunConfig) -> dict[str, Any]:
    return {**config.model.to_dict(), **config.diffusion.to_dict()}


def _reload(path: str, config: RunConfig) -> nn.Module:
    from ..weights.load import load

    return load(path, flags=_flags(config)).net


def metadata_of(loaded: Loaded) -> dict[str, Any]:
    """What a single file must carry to be loaded without a flag."""
    from ..runtime import storage

    return {
        "format": 1,
        "kind": loaded.kind,
        "step": loaded.step or 0,
        "config": loaded.config.to_dict(),
        "class_names": list(loaded.class_names),
        "source": Path(loaded.path).name,
        "source_sha256": loaded.sha256 or (storage.sha256_of(loaded.path) if Path(loaded.path).is_file() else ""),
    }


def save_file(loaded: Loaded, target: str, to: str) -> None:
    """Write one file: safetensors with its configuration inside, or a plain state dict as in 2021, whose flags are printed."""
    import torch

    from ..runtime import storage

    state = {name: value.detach().cpu().contiguous() for name, value in loaded.net.state_dict().items()}
    if to == "safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise ValueError(
                "writing safetensors needs its package: pip install 'guided-diffusion[safetensors]'"
            ) from None
        storage.write_bytes_atomic(
            target, save(state, metadata={"guided_diffusion": storage.to_json(metadata_of(loaded), indent=None)})
        )
        return
    with storage.atomic_write(target) as file:
        torch.save(state, file)
    from ..weights.identify import flag_line

    told = flag_line(_flags(loaded.config))
    print(f"note: a plain state dict as in 2021 carries no configuration; to load {target}, type {told}")


def _architecture(config: RunConfig) -> dict[str, Any]:
    """The arguments that models/diffusers.py asks for, from a configuration."""
    model = config.model
    if not isinstance(model, ModelConfig):
        raise ValueError(
            f"diffusers' UNet2DModel is a plain denoising network; a {config.kind} network has no place in it"
        )
    widths = {
        int(model.num_channels * m) for k, m in enumerate(model.multipliers) if 2**k in model.attention_downsamplings
    }
    widths.add(int(model.num_channels * model.multipliers[-1]))
    head: int | None = model.num_head_channels
    if head == -1:
        per_width = {width // model.num_heads for width in widths}
        head = per_width.pop() if len(per_width) == 1 and model.num_heads_upsample in (-1, model.num_heads) else None
    levels = range(len(model.multipliers))
    return {
        "multipliers": model.multipliers,
        "depth": model.num_res_blocks,
        "attention_ds": [2**k for k in levels if 2**k in model.attention_downsamplings],
        "resblock_updown": model.resblock_updown,
        "head": head,
    }


def save_diffusers(loaded: Loaded, folder: str) -> nn.Module:
    """Write `folder` in diffusers' layout (UNet2DModel.from_pretrained reads it); returns a callable with our signature."""
    from ..runtime import storage
    from ..weights.diffusers import arguments_for_unet2d, to_diffusers

    unet2d = _unet2d_class()
    model, shape = loaded.config.model, _architecture(loaded.config)
    assert isinstance(model, ModelConfig)
    channels = model.image_channels
    arguments = arguments_for_unet2d(
        image_size=model.sample_size,
        in_channels=channels,
        out_channels=channels * (2 if loaded.config.diffusion.learn_sigma else 1),
        model_channels=model.num_channels,
        multipliers=shape["multipliers"],
        depth=shape["depth"],
        attention_ds=shape["attention_ds"],
        attention_head_channels=shape["head"],
        scale_shift=model.use_scale_shift_norm,
        resblock_updown=shape["resblock_updown"],
        num_classes=model.num_classes if model.class_cond else None,
        dropout=model.dropout,
    )
    net = unet2d(**arguments)
    net.load_state_dict(
        to_diffusers(
            {name: value.detach().float().cpu() for name, value in loaded.net.state_dict().items()},
            levels=len(shape["multipliers"]),
            depth=shape["depth"],
            attention_ds=shape["attention_ds"],
            resblock_updown=shape["resblock_updown"],
            head_channels=shape["head"],
            new_order=model.use_new_attention_order,
        )
    )
    net.save_pretrained(folder)
    about = Path(folder) / "guided_diffusion.json"
    storage.write_json_atomic(about, metadata_of(loaded))
    if loaded.config.diffusion.learn_sigma:
        print(
            "note: UNet2DModel.forward also returns the learned variance channels; schedulers of diffusers expect them split off"
        )
    return _as_ours(net.eval())


def load_diffusers(folder: Path, noise_schedule: str) -> tuple[Loaded, nn.Module]:
    """(our network with the weights of a diffusers folder, theirs behind our signature)."""
    import torch

    from .. import build
    from ..config import RunConfig
    from ..training.restore import load_weights_into
    from ..weights.diffusers import from_diffusers
    from ..weights.load import Loaded

    theirs = _unet2d_class().from_pretrained(str(folder), low_cpu_mem_usage=False).eval()
    about = folder / "guided_diffusion.json"
    if about.is_file():
        told = json.loads(about.read_text(encoding="utf-8"))
        config, class_names = RunConfig.from_dict(told["kind"], told["config"]), tuple(told["class_names"])
    else:
        config, class_names = (
            RunConfig.from_flags("diffusion", flags_of_unet2d(dict(theirs.config), noise_schedule)),
            (),
        )
    shape = _architecture(config)
    state = from_diffusers(
        theirs.state_dict(),
        levels=len(shape["multipliers"]),
        depth=shape["depth"],
        attention_ds=shape["attention_ds"],
        resblock_updown=shape["resblock_updown"],
        head_channels=shape["head"],
        new_order=config.model.use_new_attention_order,  # type: ignore[union-attr]
    )
    with torch.device("meta"):
        net = build.build_network(config.model, config.diffusion)
    load_weights_into(net, state, str(folder), assign=True)
    net = net.eval().requires_grad_(False)
    return Loaded(net, build.build_process(config.diffusion), config, str(folder), class_names), _as_ours(theirs)


def flags_of_unet2d(config: dict[str, Any], noise_schedule: str) -> dict[str, Any]:
    """The 2021 flags of a UNet2DModel configuration; ValueError names what our network does not have."""
    widths = config["block_out_channels"]
    attention = [kind == "AttnDownBlock2D" for kind in config["down_block_types"]]
    known = {"AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"}
    wanted = {
        "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu",
        "time_embedding_type": "positional", "center_input_sample": False,
    }  # fmt: skip
    wrong = [
        f"{name}={config[name]!r} (ours: {value!r})"
        for name, value in wanted.items()
        if config.get(name, value) != value
    ]
    wrong += [f"block {kind}" for kind in config["down_block_types"] if kind not in known]
    if config["attention_head_dim"] is None:
        wrong.append("attention_head_dim=None")
    if wrong:
        raise ValueError(f"this UNet2DModel has what our network has not: {', '.join(wrong)}")
    channels, size = config["in_channels"], config["sample_size"]
    return {
        "image_size": size,
        "image_channels": channels,
        "num_channels": widths[0],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": ",".join(f"{width / widths[0]:g}" for width in widths),
        "attention_resolutions": ",".join(str(size // 2**k) for k, attends in enumerate(attention) if attends),
        "num_head_channels": config["attention_head_dim"],
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": config["downsample_type"] == "resnet",
        "class_cond": config["num_class_embeds"] is not None,
        "num_classes": config["num_class_embeds"] or 0,
        "learn_sigma": config["out_channels"] == 2 * channels,
        "dropout": config["dropout"],
        "noise_schedule": noise_schedule,
    }


def _unet2d_class() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise ValueError("this conversion needs diffusers: pip install 'guided-diffusion[diffusers]'") from None
    return UNet2DModel


def _as_ours(unet2d: Any) -> nn.Module:
    from torch import nn

    class Ours(nn.Module):
        """A UNet2DModel behind `net(x, time, y)`."""

        def __init__(self) -> None:
            super().__init__()
            self.net = unet2d

        def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
            out: Tensor = self.net(x, timesteps, class_labels=y).sample
            return out

    return Ours()


def largest_difference(first: nn.Module, second: nn.Module, config: RunConfig) -> float:
    """max |difference| / max |output| of two networks on the same noise, steps and classes, float32 on the CPU."""
    import torch

    from ..runtime.streams import EVALUATE, Streams

    model = config.model
    size = model.sample_size
    x = Streams(0, EVALUATE, ids=range(2)).normal((model.image_channels, size, size))
    time = torch.tensor([10.0, 700.0])
    cond: dict[str, Any] = {}
    if getattr(model, "class_cond", False):
        cond["y"] = torch.tensor([0, max(0, model.num_classes - 1)])
    if config.kind == "super_resolution":
        cond["low_res"] = x[:, :, :: size // model.small_size, :: size // model.small_size].contiguous()  # type: ignore[union-attr]
    with torch.no_grad():
        a, b = first.cpu()(x, time, **cond).float(), second.cpu()(x, time, **cond).float()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
