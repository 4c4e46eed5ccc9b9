"""`zoo`: the fifteen models released in 2021, by name: what they are, where they are, what they should score."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime import storage
from ..weights.released import PRESETS, Preset, get
from .arguments import Parser


def main(argv: Sequence[str] | None = None, program: str = "guided-diffusion zoo") -> int:
    """`guided-diffusion zoo [list]`, `zoo show NAME`, `zoo get NAME`."""
    parser = Parser(program, __doc__)
    actions = ("list", "show", "get")
    parser.add_argument("action", nargs="?", default="list", choices=actions, help="what to do (default list)")
    parser.add_argument("name", nargs="?", default="", help="a model's name, for show and get")
    parser.flag("cache", "", "folder of downloads (default: $GUIDED_DIFFUSION_CACHE or ~/.cache/guided_diffusion)")
    args = parser.parse_args(argv)
    if args.action == "list":
        print(table())
        return 0
    if not args.name:
        raise ValueError(f"zoo {args.action} needs a name; there are {', '.join(PRESETS)}")
    preset = get(args.name)
    if args.action == "show":
        print(card(preset))
        return 0

    from ..runtime.log import setup_messages
    from ..weights.download import fetch

    setup_messages()
    print(fetch(preset, args.cache or storage.cache_folder()))
    return 0


def table() -> str:
    """One line per published way of sampling."""
    head = f"{'name':26s} {'what':34s} {'classifier':20s} {'scale':>5s} {'steps':>15s} {'FID':>6s} {'sFID':>6s} {'Prec':>5s} {'Rec':>5s}"
    lines = [head]
    for preset in PRESETS.values():
        if not preset.recipes:
            lines.append(f"{preset.name:26s} {preset.title:34s}")
        for recipe in preset.recipes:
            classifier = preset.classifier if recipe.scale else "-"
            steps = recipe.respacing or str(preset.flags["diffusion_steps"])
            row = f"{preset.name:26s} {preset.title:34s} {classifier:20s} {recipe.scale:5g} {steps:>15s}"
            if recipe.expected:
                e = recipe.expected
                row += f" {e.fid:6.2f} {e.sfid:6.2f} {e.precision:5.2f} {e.recall:5.2f}"
            lines.append(row)
    lines.append(f"files: {next(iter(PRESETS.values())).url.rpartition('/')[0]}/NAME.pt")
    return "\n".join(lines)


def card(preset: Preset) -> str:
    """Everything known of one model."""
    lines = [f"{preset.name}: {preset.title} ({preset.kind})", f"file   {preset.url}"]
    lines.append("flags  " + " ".join(f"--{name} {value}" for name, value in preset.flags.items()))
    for recipe in preset.recipes:
        how = f"{'DDIM, ' if recipe.use_ddim else ''}{recipe.respacing or preset.flags['diffusion_steps']} steps"
        guide = f", {preset.classifier} at scale {recipe.scale:g}" if recipe.scale else ", unguided"
        e = recipe.expected
        scores = (
            f": FID {e.fid}, sFID {e.sfid}, precision {e.precision}, recall {e.recall}"
            if e
            else ": no published figure"
        )
        lines.append(f"recipe {how}{guide}{scores}{' (' + recipe.note + ')' if recipe.note else ''}")
    return "\n".join(lines)
