"""`features`: what a trained classifier sees in clean images, as an npz that the evaluation suite scores (`--features npz`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from . import runs
from .arguments import Parser

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, program: str = "guided-diffusion features") -> int:
    """`guided-diffusion features`: IMAGES (a folder, or an npz with arr_0) -> npz with `features`, `arr_1` labels and `predicted`."""
    parser = Parser(program, __doc__)
    parser.add_argument("images", help="a folder of images, or an npz with arr_0")
    parser.flag("classifier_path", "", "weights of a classifier, or the folder of its run", required=True)
    parser.flag("out", "", "the npz to write", required=True)
    parser.flag("batch_size", 64, "images per pass")
    parser.flag("device", "auto", "auto, cpu or cuda")
    args = parser.parse_args(argv)

    import io

    import numpy as np

    from ..runtime import storage
    from ..sampling.features import classifier_features, read_images
    from ..weights.load import load

    with runs.session(args.device) as world:
        classifier = load(args.classifier_path, kind="classifier", device=world.device)
        images, labels = read_images(args.images, classifier, args.batch_size)
        features, predicted = classifier_features(classifier, images)
        arrays: dict[str, Any] = {"features": features, "predicted": predicted}
        if labels is not None:
            arrays["arr_1"] = labels
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        if world.is_main:
            storage.write_bytes_atomic(args.out, buffer.getvalue())
            log.info("%s: %d features of %d images", args.out, features.shape[1], features.shape[0])
    return 0
