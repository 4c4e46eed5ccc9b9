"""Find, check and load the weights of the 2015 Inception graph.

Two published files hold the same numbers: the TensorFlow graph of the original evaluator
(`classify_image_graph_def.pb`) and its conversion for PyTorch. Either serves. Files are looked for in the working
directory first (as the 2021 evaluator did), then in the cache folder; only then is one downloaded.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .graphdef import read_graph
from .inception import BATCHNORM_EPS, InceptionV3


class Published(NamedTuple):
    """A published weights file and what it must look like."""

    name: str
    url: str
    size: int
    algorithm: str
    digest: str


_PTH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLISHED = (
    Published(
        "classify_image_graph_def.pb",
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
        95_673_916,
        "md5",
        "e6bb154e85f5d4331c22abcddb5dcf31",
    ),
    Published(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        95_628_359,
        "sha256",
        _PTH_SHA256,
    ),
    Published(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        95_628_359,
        "sha256",
        _PTH_SHA256,
    ),
)
# The PyTorch file first: its published hash is the stronger one.
DOWNLOAD_ORDER = (PUBLISHED[1], PUBLISHED[2], PUBLISHED[0])

_EXPECTED = f"expected the 2015 Inception network as in {PUBLISHED[0].name} or {PUBLISHED[1].name}"

_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BRANCHES_35 = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
_REDUCE_35 = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
_BRANCHES_17 = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
_REDUCE_17 = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
_BRANCHES_8 = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
_BY_BLOCK = [_BRANCHES_35] * 3 + [_REDUCE_35] + [_BRANCHES_17] * 4 + [_REDUCE_17] + [_BRANCHES_8] * 2


def scope_names() -> dict[str, str]:
    """Scope of each of the 94 convolutions in the TensorFlow graph -> its module name here."""
    names = {f"conv_{i}" if i else "conv": name for i, name in enumerate(_STEM)}
    for i, (block, branches) in enumerate(zip(_BLOCKS, _BY_BLOCK)):
        scope = f"mixed_{i}" if i else "mixed"
        names |= {f"{scope}/{tail}": f"Mixed_{block}.{branch}" for tail, branch in branches.items()}
    return names


def cache_folder() -> Path:
    """`GUIDED_DIFFUSION_CACHE`, else `~/.cache/guided_diffusion`."""
    chosen = os.environ.get("GUIDED_DIFFUSION_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "guided_diffusion"


def load_inception(
    weights: str | os.PathLike[str] | None = None,
    *,
    folded: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_unknown: bool = False,
    download: bool = True,
    progress: bool = True,
) -> InceptionV3:
    """The network with its weights, in evaluation mode, without gradients.

    `weights`: a `.pb` or `.pth` file; None looks in the working directory, then in the cache folder, then downloads
    (unless `download` is False). A file that is not a published one raises ValueError unless `allow_unknown`, and is
    then marked: `net.verified` is False. `net.source` and `net.sha256` say what was read. `folded`: see
    `InceptionV3.fold`.
    """
    path = Path(weights) if weights is not None else find_weights(download=download, progress=progress)
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
    with torch.device("meta"):  # no time and memory for numbers that are replaced at once
        net = InceptionV3()
    _load_strictly(net, state, path)
    net.source, net.sha256, net.verified = str(path), sha256, verified
    if folded:
        net.fold()
    return net.to(device=device, dtype=dtype)


def check_file(path: Path) -> tuple[str, bool, str]:
    """sha256 of the file, whether it is a published one, and if not what differs."""
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            for digest in digests.values():
                digest.update(block)
    sha256 = digests["sha256"].hexdigest()
    candidates = [known for known in PUBLISHED if (Path(known.name).suffix == ".pb") == (path.suffix == ".pb")]
    for known in candidates:
        if size == known.size and digests[known.algorithm].hexdigest() == known.digest:
            return sha256, True, ""
    known = candidates[0]
    found = digests[known.algorithm].hexdigest()
    told = f"{size} bytes, {known.algorithm} {found}; published {known.size} bytes, {known.algorithm} {known.digest}"
    return sha256, False, told


def find_weights(*, download: bool = True, progress: bool = True) -> Path:
    """The first published file name in the working directory or the cache folder; else download one to the cache."""
    for folder in (Path.cwd(), cache_folder()):
        for known in PUBLISHED:
            if (folder / known.name).is_file():
                return folder / known.name
    if not download:
        raise ValueError(f"no Inception weights found. {_where_to_put()}")
    failures = []
    for known in DOWNLOAD_ORDER:
        try:
            return fetch(known, cache_folder(), progress=progress)
        except OSError as error:  # noqa: PERF203 - three tries; URLError is an OSError
            failures.append(f"{known.url}: {error}")
    raise ValueError(
        f"no Inception weights found and none could be downloaded: {'; '.join(failures)}. {_where_to_put()}"
    )


def fetch(known: Published, folder: Path, *, progress: bool = True, timeout_s: float = 30.0) -> Path:
    """Download one published file into `folder`: to a temporary name, checked, then renamed. OSError when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.new(known.algorithm, usedforsecurity=False)
    handle, partial = tempfile.mkstemp(prefix=known.name + ".", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(known.url, timeout=timeout_s) as answer:
            done = 0
            for block in iter(lambda: answer.read(1 << 18), b""):
                done += len(block)
                if done > known.size:
                    raise OSError(f"more than the published {known.size} bytes came")
                digest.update(block)
                file.write(block)
                if progress and sys.stderr.isatty():
                    print(f"\rdownloading {known.name}: {100 * done // known.size:3d} %", end="", file=sys.stderr)
            file.flush()
            os.fsync(file.fileno())
        if progress and sys.stderr.isatty():
            print(file=sys.stderr)
        if done != known.size or digest.hexdigest() != known.digest:
            found = digest.hexdigest()
            raise OSError(
                f"{done} bytes with {known.algorithm} {found} came, expected {known.size} with {known.digest}"
            )
        os.replace(partial, folder / known.name)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return folder / known.name


def _where_to_put() -> str:
    files = [f"{known.name} from {known.url} ({known.algorithm} {known.digest})" for known in PUBLISHED]
    places = f"the working directory ({Path.cwd()}) or {cache_folder()}"
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
    graph = read_graph(path)

    def constant(name: str) -> np.ndarray:
        if name not in graph.constants:
            raise ValueError(f"{path} has no constant {name!r}: it is not the 2015 Inception graph")
        return graph.constants[name]

    state: dict[str, torch.Tensor] = {}
    for scope, prefix in scope_names().items():
        kernel, norm = constant(f"{scope}/conv2d_params"), f"{scope}/batchnorm"
        if kernel.ndim != 4:
            raise ValueError(f"{path}: {scope}/conv2d_params has shape {kernel.shape}, expected four dimensions")
        state[f"{prefix}.conv.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        epsilon = graph.variance_epsilon.get(norm, BATCHNORM_EPS)
        if not np.isclose(epsilon, BATCHNORM_EPS, rtol=1e-6):
            raise ValueError(f"{path}: {norm} adds {epsilon} to the variance, expected {BATCHNORM_EPS}")
        gamma = constant(f"{norm}/gamma")
        if not graph.scale_after_normalization.get(norm, True) and not np.all(gamma == 1):
            # The graph carries a gamma and says not to use it: do as it says.
            warnings.warn(f"{path}: {norm} stores a gamma that the graph does not use; ignored", stacklevel=2)
            gamma = np.ones_like(gamma)
        state[f"{prefix}.bn.weight"] = torch.from_numpy(gamma)
        state[f"{prefix}.bn.bias"] = torch.from_numpy(constant(f"{norm}/beta"))
        state[f"{prefix}.bn.running_mean"] = torch.from_numpy(constant(f"{norm}/moving_mean"))
        state[f"{prefix}.bn.running_var"] = torch.from_numpy(constant(f"{norm}/moving_variance"))
    state["fc.weight"] = torch.from_numpy(np.ascontiguousarray(constant("softmax/weights").T))
    state["fc.bias"] = torch.from_numpy(constant("softmax/biases"))
    return state


def _load_strictly(net: InceptionV3, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load, naming what is missing, unknown or of another shape; numbers must be finite floats."""
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
