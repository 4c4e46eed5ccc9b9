"""`features`: what a trained classifier sees in clean images, as an npz that the evaluation suite scores (`--features npz`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from . import runs
from .arguments import Parser

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion features`: IMAGES (a folder, or an npz with arr_0) -> npz with `features`, `arr_1` labels and `predicted`."""
    parser = Parser(prog="guided-diffusion features", description=__doc__, allow_abbrev=False)
    parser.add_argument("images", help="a folder of images, or an npz with arr_0")
    parser.add_argument("--classifier_path", required=True, help="weights of a classifier, or the folder of its run")
    parser.add_argument("--out", required=True, help="the npz to write")
    parser.add_argument("--batch_size", type=int, default=64, help="images per pass (default 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    asked = parser.parse_args(argv)

    import io

    import numpy as np

    from ..runtime import storage
    from ..sampling.features import classifier_features, read_images
    from ..weights.load import load

    with runs.session({"device": asked.device, "debug": False}) as world:
        classifier = load(asked.classifier_path, kind="classifier", device=world.device)
        images, labels = read_images(asked.images, classifier, asked.batch_size)
        features, predicted = classifier_features(classifier, images)
        arrays: dict[str, Any] = {"features": features, "predicted": predicted}
        if labels is not None:
            arrays["arr_1"] = labels
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        if world.is_main:
            storage.write_bytes_atomic(asked.out, buffer.getvalue())
            log.info("%s: %d features of %d images", asked.out, features.shape[1], features.shape[0])
    return 0
