"""`features`: what a trained classifier sees in clean images, as an npz that the evaluation suite scores (`--features npz`)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import runs
from .arguments import Parser

if TYPE_CHECKING:
    import numpy as np

    from ..weights.load import Loaded


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion features`: IMAGES (a folder, or an npz with arr_0) -> npz with `features`, `arr_1` labels and `predicted`."""
    parser = Parser(prog="guided-diffusion features", description=__doc__, allow_abbrev=False)
    parser.add_argument("images", help="a folder of images, or an npz with arr_0")
    parser.add_argument("--classifier_path", required=True, help="weights of a classifier, or the folder of its run")
    parser.add_argument("--out", required=True, help="the npz to write")
    parser.add_argument("--batch_size", type=int, default=64, help="images per pass (default 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args(argv)

    import io

    import numpy as np

    from ..runtime import storage
    from ..weights.load import load

    with runs.session({"device": args.device, "debug": False}) as here:
        critic = load(args.classifier_path, kind="classifier", device=here.device)
        if critic.kind != "classifier":
            raise ValueError(f"--classifier_path {critic.path} is a {critic.kind} model, not a classifier")
        images, labels = read_images(args.images, critic, args.batch_size)
        features, predicted = classifier_features(critic, images, here.device)
        arrays: dict[str, Any] = {"features": features, "predicted": predicted}
        if labels is not None:
            arrays["arr_1"] = labels
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        if here.is_main:
            storage.write_bytes_atomic(args.out, buffer.getvalue())
            print(f"{args.out}: {features.shape[1]} features of {features.shape[0]} images")
    return 0


def read_images(path: str, critic: Loaded, batch_size: int) -> tuple[Iterator[np.ndarray], np.ndarray | None]:
    """Batches uint8 `[B, H, W, C]` of the classifier's size, cut as in training, and the labels if the images have any."""
    import numpy as np

    from ..data.images import center_crop
    from ..data.sources import list_source
    from .upsample import read_npz

    model = critic.config.model
    size, channels = model.sample_size, model.image_channels
    if path.endswith(".npz"):
        images, labels = read_npz(path, size, channels, "images")
        return (images[k : k + batch_size] for k in range(0, len(images), batch_size)), labels
    source, labels = list_source(path), None
    try:
        labels = source.labels().numbers
    except ValueError as error:  # features need none
        print(f"without labels: {error}", file=sys.stderr)

    def batches() -> Iterator[np.ndarray]:
        for k in range(0, len(source.paths), batch_size):
            pictures = [center_crop(source.read(p, channels), size) for p in source.paths[k : k + batch_size]]
            yield np.stack(pictures).reshape(len(pictures), size, size, channels)

    return batches(), labels


def classifier_features(critic: Loaded, batches: Iterable[np.ndarray], device: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 `[N, D]` and predicted classes int64 `[N]` of clean images (the network is told step 0).

    A feature is an input of the last layer with weights: what the classifier reads the class from.
    """
    import numpy as np
    import torch

    from ..data.images import to_float
    from ..diffusion.samplers import NotFinite, check_finite
    from ..sampling.pipeline import why_not_finite

    last = [module for module in critic.net.out.modules() if getattr(module, "weight", None) is not None][-1]  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features, predicted = [], []
    try:
        with torch.no_grad():
            for batch in batches:
                x = to_float(torch.from_numpy(np.array(batch)).to(device))
                step = torch.zeros(len(x), dtype=torch.long, device=device)
                logits = critic.net(x, critic.process.time_at(step))
                found = seen.pop().float().flatten(1)
                check_finite(torch.cat([found, logits.float()], dim=1))
                features.append(found.cpu().numpy())
                predicted.append(logits.argmax(1).cpu().numpy())
    except NotFinite as error:
        image = sum(map(len, features)) + error.row
        raise ValueError(f"features of image {image}: {error}; {why_not_finite([critic])}") from None
    finally:
        hook.remove()
    return np.concatenate(features), np.concatenate(predicted).astype(np.int64)
