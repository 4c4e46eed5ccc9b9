"""`convert`: weights in another form (safetensors, diffusers' UNet2DModel), with the largest output difference measured."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import WEIGHTS, WEIGHTS_HELP
from .arguments import Parser

FORMS = ("safetensors", "pt", "diffusers")  # weights.convert.FORMS, here without loading torch


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion convert SOURCE TARGET`: the target's form is that of its name, or --to."""
    parser = Parser(prog="guided-diffusion convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", help="weights: .pt, .safetensors, a run folder, or a folder that diffusers wrote")
    parser.add_argument("target", help="NAME.safetensors, NAME.pt, or a folder for --to diffusers")
    parser.add_argument("--to", choices=FORMS, default="", help="the form; default: by the target's name")
    parser.add_argument(
        "--noise_schedule", default="linear", help="of a diffusers source, which does not carry it (default linear)"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="", help=WEIGHTS_HELP)
    args = parser.parse_args(argv)

    from ..runtime.log import setup_messages
    from ..weights.convert import convert, form_of

    setup_messages()
    form = form_of(args.target, args.to)
    difference = convert(args.source, args.target, form, noise_schedule=args.noise_schedule, weights=args.weights)
    print(f"{args.source} -> {args.target} ({form}); largest output difference on the same input: {difference:.3g}")
    return 0
