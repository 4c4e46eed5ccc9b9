"""`convert`: weights in another form (safetensors, diffusers' UNet2DModel), with the largest output difference measured."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import WEIGHTS, WEIGHTS_HELP
from .arguments import Parser

FORMS = ("safetensors", "pt", "diffusers")  # weights.convert.FORMS, here without loading torch


def main(argv: Sequence[str] | None = None, program: str = "guided-diffusion convert") -> int:
    """`guided-diffusion convert SOURCE TARGET`: the target's form is that of its name, or --to."""
    parser = Parser(program, __doc__)
    parser.add_argument("source", help="weights: .pt, .safetensors, a run folder, or a folder that diffusers wrote")
    parser.add_argument("target", help="NAME.safetensors, NAME.pt, or a folder for --to diffusers")
    parser.flag("to", "", "the form; default: by the target's name", choices=FORMS)
    parser.flag("noise_schedule", "linear", "of a diffusers source, which does not carry it")
    parser.flag("weights", "", WEIGHTS_HELP, choices=WEIGHTS)
    args = parser.parse_args(argv)

    from ..runtime.log import setup_messages
    from ..weights.convert import convert, form_of

    setup_messages()
    form = form_of(args.target, args.to)
    difference = convert(args.source, args.target, form, noise_schedule=args.noise_schedule, weights=args.weights)
    print(f"{args.source} -> {args.target} ({form}); largest output difference on the same input: {difference:.3g}")
    return 0
