"""`upsample`: small images -> large ones, by a model trained for it. Also the command that trains one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import ClassifierConfig, DiffusionConfig, SampleConfig, SuperResConfig
from . import arguments, making, runs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..runtime.world import World

EXTRA: dict[str, tuple[Any, str]] = {
    "base_samples": ("", "what is enlarged: an npz (arr_0 uint8 NHWC, arr_1 labels), or a folder of images"),
    "out": ("", "folder for the npz, the picture and the receipt"),
}
_CONFIGS = (SampleConfig, SuperResConfig, DiffusionConfig, ClassifierConfig)
# Base model and upsampler use one seed; without this their first noise would begin with the same numbers.
_NOISE_OF_UPSAMPLERS = 256


def main(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion upsample`."""
    return run(argv, program="guided-diffusion upsample")


def main_train(argv: Sequence[str] | None = None) -> int:
    """`guided-diffusion train-upsampler`."""
    from . import train

    return train.run(argv, "super_resolution", program="guided-diffusion train-upsampler")


def super_res_sample(argv: Sequence[str] | None = None) -> int:
    """`scripts/super_res_sample.py`, with the flags and defaults of 2021."""
    return runs.guarded(lambda words: run(words, program="super_res_sample.py", script=True), argv)


def flags(argv: Sequence[str] | None, *, program: str, script: bool = False) -> arguments.Parsed:
    """The flags of an upsampling command."""
    defaults = {"out": runs.script_folder()} if script else {}
    return arguments.parse(
        argv, _CONFIGS, program=program, description="Enlarge images.", extra=EXTRA, defaults=defaults
    )


def run(argv: Sequence[str] | None, *, program: str, script: bool = False) -> int:
    """Enlarge as the flags say; returns the exit code: 0, or 85 where it was asked to stop early and start again later."""
    parsed = flags(argv, program=program, script=script)
    for name, what in (("model_path", "the weights of an upsampler"), ("base_samples", "the images to enlarge")):
        if not parsed.flags[name]:
            raise ValueError(f"--{name} is empty; give {what}")
    every = not script and "num_samples" not in parsed.typed  # the scripts of 2021 make 10000 images
    return making.session(parsed, lambda world, stop: work(parsed, world, stop, every=every))


def work(parsed: arguments.Parsed, world: World, stop: Any, *, every: bool = False) -> str:
    """Enlarge and return the path of the npz; `every` makes as many images as there are small ones."""
    from ..runtime.streams import key_of
    from ..sampling.generate import LabelPlan

    config = SampleConfig.from_flags(parsed.flags)
    pieces = making.prepare(parsed, config, "super_resolution", world)
    model = pieces.model.config.model
    assert isinstance(model, SuperResConfig)
    wanted = "auto" if pieces.num_classes and not config.classes else "none"
    base = open_base(parsed.flags["base_samples"], model.small_size, model.image_channels, labels=wanted)
    making.teller(world)(f"enlarging {len(base)} images of {parsed.flags['base_samples']} ({base.about})")
    config = replace(config, num_samples=len(base) if every else config.num_samples)
    labels: LabelPlan
    if config.classes:
        classes = making.choose_classes(config.classes, pieces.num_classes, pieces.names)
        labels = LabelPlan(classes, config.labels == "balanced", config.seed)
    elif base.labels is not None:
        found, note = base.labels_for(pieces.num_classes, pieces.names, pieces.model.path)
        if note:
            making.teller(world)(note)
        labels = given_labels(found)
    elif pieces.num_classes:
        raise ValueError(
            f"--base_samples {parsed.flags['base_samples']} has no labels (arr_1), and the networks want classes; "
            f"give --classes with one or more of 0 to {pieces.num_classes - 1}"
        )
    else:
        labels = LabelPlan()
    return making.make(
        parsed,
        config,
        pieces,
        labels,
        world,
        stop,
        folder="upsampled",
        seed=key_of(config.seed, _NOISE_OF_UPSAMPLERS),
        conditions=base.conditions,
        depends={"base_samples": base.identity, "small_size": model.small_size},
    )


def given_labels(labels: np.ndarray) -> Any:
    """A LabelPlan that repeats these labels; image `i` has that of small image `i` modulo their number."""
    import numpy as np

    from ..sampling.generate import LabelPlan

    @dataclass(frozen=True)
    class Given(LabelPlan):
        def of(self, ids: Sequence[int]) -> np.ndarray | None:
            return np.asarray(labels)[np.asarray(ids) % len(labels)].astype(np.int64)

    return Given(tuple(np.unique(labels).tolist()))


@dataclass(frozen=True)
class Base:
    """Small images of `path`. `pixels(k)` is image k, uint8 `[H, W, C]`; `labels` int64 `[N]` or None, each the place of its
    class in `class_names`, where they have names; `identity` names the content."""

    pixels: Callable[[int], np.ndarray]
    count: int
    labels: np.ndarray | None
    identity: str
    about: str
    path: str = ""
    class_names: tuple[str, ...] = ()
    label_source: str = "npz"

    def labels_for(self, count: int, names: Sequence[str], whose: str) -> tuple[np.ndarray, str]:
        """(labels as the class numbers of networks with `count` classes called `names`, what was done)."""
        from ..data.classes import renumber
        from ..data.listing import Records

        assert self.labels is not None
        if not count:
            return self.labels, ""
        wrong = self.labels[(self.labels < 0) | (self.labels >= max(count, len(self.class_names)))]
        if len(wrong):
            raise ValueError(
                f"--base_samples {self.path} has the label {int(wrong[0])}; the networks know the classes 0 to {count - 1}"
            )
        own = Records(("",) * len(self), self.labels, self.class_names, self.label_source, root=self.path)
        found, note = renumber(own, names, count, whose)
        return found.require_labels(), note

    def __len__(self) -> int:
        return self.count

    def conditions(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """`low_res` [B, C, H, W] in [-1, 1] of the images `ids`; the small ones are read in turn, again and again."""
        import numpy as np
        import torch

        from ..data.images import to_float

        return {"low_res": to_float(torch.from_numpy(np.stack([self.pixels(i % self.count) for i in ids])))}


def open_base(path: str, size: int, channels: int, *, labels: str = "auto") -> Base:
    """The images to enlarge, none of them in memory yet. ValueError where they are not `size` x `size` with these channels.

    `labels`: where the classes of a folder come from, as --labels says it for data.
    """
    from ..runtime import storage

    if not storage.exists(path):
        raise FileNotFoundError(f"--base_samples {path}: there is no such file or folder")
    return _folder(path, size, channels, labels) if storage.isdir(path) else _npz(path, size, channels)


def read_npz(path: str, size: int, channels: int, whose: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 [N, size, size, channels], mapped where they can be; labels int64 [N] or None). ValueError begins with `whose`."""
    import io
    import zipfile

    import numpy as np

    from ..runtime import storage

    try:
        source: Any = io.BytesIO(storage.read_bytes(path)) if storage.is_remote(path) else path
        with np.load(source, allow_pickle=False) as found:
            labels = found["arr_1"] if "arr_1" in found.files else None
            if "arr_0" not in found.files:
                raise ValueError(f"it has {', '.join(found.files) or 'nothing'} and no arr_0")
            images = _mapped(path) if isinstance(source, str) else None
            images = found["arr_0"] if images is None else images
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(
            f"{whose} {path} cannot be read as an npz of samples ({error}); sample commands write one"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, channels) or not len(images):
        raise ValueError(
            f"{whose} {path} holds {images.dtype} images {list(images.shape)}; the model takes uint8 images "
            f"[N, {size}, {size}, {channels}]"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{whose} {path} has {len(images)} images and labels arr_1 of shape {list(labels.shape)} and type {labels.dtype}; labels "
            "are whole numbers, one for each image"
        )
    return images, None if labels is None else labels.astype(np.int64)


def _npz(path: str, size: int, channels: int) -> Base:
    import numpy as np

    from ..runtime import storage

    images, labels = read_npz(path, size, channels, "--base_samples")
    about = f"labels of {len(set(labels.tolist()))} classes" if labels is not None else "no labels"
    names = _names_beside(path) if labels is not None else ()
    return Base(lambda k: np.asarray(images[k]), len(images), labels, storage.sha256_of(path), about, path, names)


def _names_beside(path: str) -> tuple[str, ...]:
    """The class names in the receipt that the sampling commands write beside their npz; () where it is another file's."""
    import json
    import os

    from ..runtime import storage
    from ..sampling.generate import RECEIPT

    receipt = storage.join(os.path.dirname(path), RECEIPT)
    if not storage.exists(receipt):
        return ()
    try:
        told = json.loads(storage.read_bytes(receipt))
        same = os.path.basename(told["file"]) == os.path.basename(path)
        return tuple(told.get("class_names", ())) if same else ()
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()  # a file of another program


def _mapped(path: str) -> np.ndarray | None:
    """`arr_0` of a local npz as a memory map: no process holds 50,000 images. None where it is compressed."""
    import zipfile

    import numpy as np

    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("arr_0.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read: Any = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(file)
            header = file.tell()
    if dtype.hasobject or fortran:
        return None
    with open(path, "rb") as raw:  # the name's and the extra field's lengths stand at 26 and 28 of the local header
        raw.seek(member.header_offset + 26)
        lengths = raw.read(4)
    start = member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return np.memmap(path, dtype=dtype, mode="r", offset=start + header, shape=shape)


def _folder(path: str, size: int, channels: int, labels: str) -> Base:
    import hashlib

    import torch

    from ..data.images import center_crop, read_image
    from ..data.listing import list_records
    from ..runtime import storage

    records = list_records(path, labels=labels)
    if records.kind != "files":
        raise ValueError(f"--base_samples {path} is {records.kind} data; give an npz, or a folder of picture files")

    def pixels(k: int) -> np.ndarray:
        found = center_crop(read_image(records.paths[k], channels), size)
        return torch.from_numpy(found.copy()).reshape(size, size, channels).numpy()

    about = f"cut and scaled to {size}x{size}; labels: {records.label_source}"
    content = "".join(storage.sha256_of(name) for name in records.paths)
    identity = hashlib.sha256((content + records.digest()).encode()).hexdigest()
    return Base(pixels, len(records), records.labels, identity, about, path, records.class_names, records.label_source)
