"""Find, check and load the weights of the 2015 Inception graph.

Two published files hold the same numbers: the TensorFlow graph of the original evaluator (`classify_image_graph_def.pb`) and its
conversion for PyTorch. Either can be used. They are looked for in the working directory first (as the 2021 evaluator did), then in
the cache folder; only if there is none, one is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from guided_diffusion.runtime import storage

from .graphdef import read_constants
from .inception import Block, InceptionV3


class Published(NamedTuple):
    """A published weights file, its size and its digest (of the hash `algorithm`)."""

    name: str
    url: str
    size: int
    algorithm: str
    digest: str


# Size and digest of the PyTorch file, which two projects publish.
_PTH = (95_628_359, "sha256", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
PUBLISHED = (
    Published(
        "classify_image_graph_def.pb",
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
        *(95_673_916, "md5", "e6bb154e85f5d4331c22abcddb5dcf31"),
    ),
    Published(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        *_PTH,
    ),
    Published(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        *_PTH,
    ),
)
# The PyTorch files first: they are published with a SHA-256, the graph only with an MD5.
DOWNLOAD_ORDER = (PUBLISHED[1], PUBLISHED[2], PUBLISHED[0])

_EXPECTED = f"expected the 2015 Inception network as in {PUBLISHED[0].name} or {PUBLISHED[1].name}"

_BATCHNORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")


def scope_names() -> dict[str, str]:
    """Scope of each of the 94 convolutions in the TensorFlow graph -> its module name here, in the order of the graph."""
    with torch.device("meta"):
        net = InceptionV3()
    names = {_numbered("conv", i): name for i, name in enumerate(_STEM)}
    blocks = [(name, block) for name, block in net.named_children() if isinstance(block, Block)]
    for i, (module, block) in enumerate(blocks):
        # The graph calls branches "tower", "tower_1", ...; but a first branch of a single convolution has no such scope.
        without_tower = len(next(iter(block.chains.values()))) == 1
        for tower, chain in enumerate(block.chains.values(), -without_tower):
            scope = _numbered("mixed", i) + (f"/{_numbered('tower', tower)}" if tower >= 0 else "")
            for k, layer in enumerate(chain):
                is_split = len(layer) > 1  # two parallel convolutions, see `inception.SPLIT`
                scopes = [f"mixed/{_numbered('conv', j)}" for j in range(2)] if is_split else [_numbered("conv", k)]
                names |= {f"{scope}/{conv}": f"{module}.{name}" for conv, name in zip(scopes, layer)}
    return names


def _numbered(name: str, number: int) -> str:
    """A scope name as TensorFlow numbers it: the first one has no number."""
    return f"{name}_{number}" if number else name


def load_inception(
    weights: str | os.PathLike[str] | None = None,
    *,
    folded: bool = True,
    device: str | torch.device = "cpu",
    allow_unknown: bool = False,
    progress: bool = True,
) -> InceptionV3:
    """The network with its weights, in evaluation mode, without gradients.

    `weights`: a `.pb` or `.pth` file; None looks in the working directory, then in the cache folder, then downloads. A file that is
    not a published one raises ValueError unless `allow_unknown`, and is then marked: `net.verified` is False. `folded`: see
    `InceptionV3.fold`.
    """
    path = Path(weights) if weights is not None else find_weights(progress=progress)
    if not path.is_file():
        raise ValueError(f"there is no Inception weights file {str(path)!r}. {_where_to_put()}")
    sha256, verified, complaint = check_file(path)
    if not verified:
        if not allow_unknown:
            raise ValueError(
                f"{path} is not a published Inception weights file: {complaint}. Scores from it cannot be compared with "
                f"anyone's. {'Delete it' if weights is None else 'Leave --weights out'} to fetch a good copy, or allow it "
                "expressly (--allow_other_weights, allow_unknown=True)"
            )
        warnings.warn(f"scores rest on unknown Inception weights: {path} ({complaint})", stacklevel=2)
    state = state_from_graph(path) if path.suffix == ".pb" else _state_from_torch(path)
    with torch.device("meta"):  # no random initial weights, which would be replaced at once
        net = InceptionV3()
    _load_strictly(net, state, path)
    net.sha256, net.verified = sha256, verified
    if folded:
        net.fold()
    return net.to(device)


def check_file(path: Path) -> tuple[str, bool, str]:
    """(sha256 of the file, whether it is a published one, "" or how it differs from the published one)."""
    kind = [known for known in PUBLISHED if (Path(known.name).suffix == ".pb") == (path.suffix == ".pb")]
    size, sha256, digest = path.stat().st_size, storage.sha256_of(path), _digest(path, kind[0].algorithm)
    if any(size == known.size and digest == known.digest for known in kind):
        return sha256, True, ""
    known = kind[0]
    published = f"published {known.size} bytes, {known.algorithm} {known.digest}"
    return sha256, False, f"{size} bytes, {known.algorithm} {digest}; {published}"


def _digest(path: str | os.PathLike[str], algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_weights(*, progress: bool = True) -> Path:
    """The first published file name in the working directory or the cache folder; else download one to the cache."""
    cache = Path(storage.cache_folder())
    for folder in (Path.cwd(), cache):
        for known in PUBLISHED:
            if (folder / known.name).is_file():
                return folder / known.name
    failures = []
    for known in DOWNLOAD_ORDER:
        try:
            return fetch(known, cache, progress=progress)
        except (OSError, ValueError) as error:  # noqa: PERF203 - three tries; URLError is an OSError
            failures.append(f"{known.url}: {error}")
    raise ValueError(
        f"no Inception weights found and none could be downloaded: {'; '.join(failures)}. {_where_to_put()}"
    )


def fetch(known: Published, folder: Path, *, progress: bool = True) -> Path:
    """Download one published file into `folder`; OSError when that fails, ValueError for another digest than the published one."""

    def check(part: str) -> None:
        if (found := _digest(part, known.algorithm)) != known.digest:
            raise ValueError(f"a file with {known.algorithm} {found} came, expected {known.digest}")

    storage.download(known.url, str(folder / known.name), check=check, size=known.size, progress=progress)
    return folder / known.name


def _where_to_put() -> str:
    files = [f"{known.name} from {known.url} ({known.algorithm} {known.digest})" for known in PUBLISHED]
    places = f"the working directory ({Path.cwd()}) or {storage.cache_folder()}"
    return f"Put one of these files into {places}, or name its path: {', or '.join(files)}"


def _state_from_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means that the file is not a plain state dict
        raise ValueError(
            f"{path} cannot be read as a PyTorch file of tensors ({type(error).__name__}); {_EXPECTED}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a plain dictionary of tensors; {_EXPECTED}")
    return {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}


def state_from_graph(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """State dict of `InceptionV3` from the TensorFlow graph: kernels HWIO -> OIHW, classifier transposed."""
    constants = read_constants(path)

    def constant(name: str) -> np.ndarray:
        if name not in constants:
            raise ValueError(f"{path} has no constant {name!r}: it is not the 2015 Inception graph")
        return constants[name]

    state: dict[str, torch.Tensor] = {}
    for scope, prefix in scope_names().items():
        kernel = constant(f"{scope}/conv2d_params")
        if kernel.ndim != 4:
            raise ValueError(f"{path}: {scope}/conv2d_params has shape {kernel.shape}, expected four dimensions")
        state[f"{prefix}.conv.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        for ours, theirs in _BATCHNORM.items():
            state[f"{prefix}.bn.{ours}"] = torch.from_numpy(constant(f"{scope}/batchnorm/{theirs}"))
    state["fc.weight"] = torch.from_numpy(np.ascontiguousarray(constant("softmax/weights").T))
    state["fc.bias"] = torch.from_numpy(constant("softmax/biases"))
    return state


def _load_strictly(net: InceptionV3, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict. ValueError naming tensors that are missing, unknown, of another shape or not finite floats."""
    wanted = net.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(
            f"{path} holds other weights than the 2015 Inception graph: {len(missing)} tensors are missing "
            f"(first: {missing[:3]}), {len(unknown)} are unknown (first: {unknown[:3]})"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}"
            raise ValueError(f"{path}: {name} has shape {shapes}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite floating-point numbers")
    net.load_state_dict({name: value.to(torch.float32) for name, value in state.items()}, assign=True)
    net.requires_grad_(False)
