"""The base class of image sources, with what each kind must define, and folders of image files."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ...runtime import storage
from .. import images
from .. import labels as tables

if TYPE_CHECKING:
    from PIL import Image as PILImage

EXTENSIONS = tuple(
    "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff ppm pgm pbm pnm jp2 j2k jpx jpf avif ico tga".split()
)
_CLUTTER = ("__MACOSX", "Thumbs.db", "desktop.ini")  # written by file managers, like names that begin with a dot
_SHOWN = 8
_WINDOW = 32  # images per thread that are decoded ahead
T = TypeVar("T")
Read = Callable[[str], bytes | np.ndarray]
Progress = Callable[[int], None] | None  # is called with the number of images done since the last call


class Source:
    """The images below a root, in a fixed order. A kind of source is a subclass in the table `sources.SOURCES`.

    It defines how it is recognised (`ending`, `begins`, `marker`), what it holds (`members`) and how to read it (`open`). Sources may
    go to threads and other processes: files are opened on first use in each.
    """

    kind = ""
    ending = ""  # a file with this ending is such a source
    begins = b""  # so is a file that begins with these bytes
    marker = ""  # a folder is such a source if it holds a file of this name; `*` stands for anything
    all_images = False  # every member is an image, whatever its name ends with
    labels_beside = True  # `.cls` and `.json` members with the key of an image hold its label (WebDataset)
    threads_share = False  # all threads of a process share what `open` returned; else each thread calls `open`
    fatal: tuple[type[Exception], ...] = ()  # errors that mean that the source is damaged, not only one image
    preprocessing = ""  # what was done to the images already; see `images.preprocessing_id`
    stored_size: tuple[int, int] | None = None  # (height, width), where it is the same for all

    def __init__(self, root: str) -> None:
        self.root = root
        self.names: tuple[str, ...] = ()  # of the images, relative to the root
        self.paths: tuple[str, ...] = ()  # their addresses; of a file, its path
        self.left_out = ""  # a sentence about the files that are not read
        self._label_files: dict[str, str] = {}
        self._opened: dict[tuple[int, int], Read] = {}
        self._lock = threading.Lock()

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        """Name relative to the root, `/` between parts -> address, of all that the source holds.

        `files`: name -> path of the files below the root if it is a folder. A short description of each that cannot be read goes to
        `others`.
        """
        raise NotImplementedError

    def open(self) -> Read:
        """A function of an address that reads the encoded file, or an image as uint8 `[H, W, C]`."""
        raise NotImplementedError

    def describe(self, path: str) -> str:
        """A name for error messages."""
        return f"{self.root}: {path}"

    def own_labels(self) -> tables.Labels | None:
        """Read the labels that the source brings along; None if it has none."""
        return tables.from_members(self.root, self._label_files, self.names, self.encoded)

    def folder_names(self, wanted: bool) -> Sequence[str]:
        """Names whose folders may be classes; `wanted`: whether folders were asked for, not only tried."""
        return self.names

    def fill(self, files: Mapping[str, str]) -> Source:
        """List the members: images and their addresses, files with labels, and the kinds of files left out; returns self."""
        others: list[str] = []
        members = self.members(files, others)
        self.names = tuple(name for name in members if self.all_images or is_image(name))
        self.paths = tuple(members[name] for name in self.names)
        found = tables.label_files(members, self.names, beside=self.labels_beside)
        self._label_files = {name: members[name] for name in found}
        used = {*self.names, *found}
        counts = Counter([*others, *(file_type(name) for name in members if name not in used)])
        shown = ", ".join(f"{what} {count}" for what, count in counts.most_common(_SHOWN))
        if counts:
            were = "1 file was" if counts.total() == 1 else f"{counts.total()} files were"
            self.left_out = f"{were} left out: {shown}{', ...' if len(counts) > _SHOWN else ''}"
        return self

    def __reduce__(self) -> tuple[type[Source], tuple[str]]:
        return type(self), (self.root,)

    def labels(self, wanted: str = "auto") -> tables.Labels:
        """The class of each image, as `wanted` (see `labels` of `listing.list_records`)."""
        if wanted == "none":
            return tables.NONE
        if wanted == "prefix":
            return tables.by_prefix(self.names)
        if wanted == "folders":
            return tables.by_folder(self.folder_names(True))
        if wanted != "auto":
            return tables.from_file(wanted, self.names)
        return self.own_labels() or tables.detect(self.folder_names(False))

    def read(self, path: str, channels: int = 3) -> np.ndarray:
        """One image, uint8 `[H, W, channels]`: 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA. ValueError names one that cannot be read.

        As in 2021, EXIF rotation is not applied and the first frame of an animation is taken.
        """
        content = self._content(path)
        if isinstance(content, np.ndarray) and content.shape[2] == channels:
            return content
        with self._image(path, content) as image:
            return images.as_array(image, channels)

    def opened(self, path: str) -> contextlib.AbstractContextManager[PILImage.Image]:
        """One image as stored, not yet decoded by PIL. Errors inside the `with`, of decoding too, become those of `read`."""
        return self._image(path, self._content(path))

    @contextlib.contextmanager
    def _image(self, path: str, content: bytes | np.ndarray) -> Iterator[PILImage.Image]:
        from PIL import Image

        with (
            self._errors(path),
            Image.open(io.BytesIO(content)) if isinstance(content, bytes) else images.from_array(content) as image,
        ):
            yield image

    def size(self, path: str) -> tuple[int, int]:
        """(height, width) of one image, from its header alone."""
        with self.opened(path) as image:
            return image.height, image.width

    def encoded(self, path: str) -> bytes:
        """The bytes of the file at an address; of an array, its pixels."""
        content = self._content(path)
        return content.tobytes() if isinstance(content, np.ndarray) else content

    def each(
        self, paths: Sequence[str], use: Callable[[PILImage.Image], T], workers: int, progress: Progress
    ) -> Iterator[T | ValueError]:
        """The results of `use(image)` in order, by `workers` threads; for an image that cannot be read, the error.

        Threads suffice: PIL decodes and resizes without holding the interpreter lock. `progress(1)` is called after each.
        """

        def result(path: str) -> T | ValueError:
            try:
                with self.opened(path) as image:
                    return use(image)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(workers) as pool:
            # One map() over all paths would queue the whole data set, and keep every result until it is its turn.
            for start in range(0, len(paths), _WINDOW * workers):
                for one in pool.map(result, paths[start : start + _WINDOW * workers]):
                    if progress is not None:
                        progress(1)
                    yield one

    def _content(self, path: str) -> bytes | np.ndarray:
        # An open file has one read position, so every process and thread needs its own.
        key = (os.getpid(), 0 if self.threads_share else threading.get_ident())
        with self._errors(path):
            with self._lock:
                if key not in self._opened:
                    self._opened[key] = self.open()
            return self._opened[key](path)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Errors inside the `with` become a ValueError that names the image."""
        try:
            yield
        except self.fatal:
            raise
        except (
            Exception
        ) as error:  # broken bytes are answered with two dozen kinds: BadZipFile, zlib.error, struct.error, ...
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if type(error).__name__ == "UnidentifiedImageError":
                reason = "not an image that PIL knows"
            raise ValueError(f"cannot read image {self.describe(path)!r}: {reason}") from error


class Folder(Source):
    """A folder of image files, at any depth; local or remote. The address of an image is its path."""

    kind = "files"
    labels_beside, threads_share = False, True

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        # A broken link may stand for the folder of a class, so it is reported. Broken links to images and tables fail when read.
        links = [name for name, path in files.items() if not is_image(name) and os.path.islink(path)]
        broken = {name for name in links if not os.path.exists(files[name])}
        broken -= set(tables.label_files(broken, (), beside=False))
        others += [f"broken link {name!r}" for name in sorted(broken)]
        return {name: path for name, path in files.items() if name not in broken}

    def open(self) -> Read:
        return storage.read_bytes

    def describe(self, path: str) -> str:
        return path


def walk(root: str) -> Iterator[tuple[str, str]]:
    """(path, name relative to the root) of all files below a folder that are not hidden, in the order of 2021."""
    base = root.rstrip("/" + os.sep) or root
    for path in storage.walk_files(base):
        name = path[len(base.rstrip("/" + os.sep)) :].replace(os.sep, "/").lstrip("/")
        if not is_hidden(name):
            yield path, name


def is_image(name: str) -> bool:
    """Whether a file is named like an image."""
    return "." in name and name.rpartition(".")[2].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden (a leading dot) or clutter of a file manager."""
    return any(part.startswith(".") or part in _CLUTTER for part in name.split("/"))


def file_type(name: str) -> str:
    """What kind of file a name seems to be, for messages: ".txt", ".tar.gz"."""
    found = re.search(r"(\.tar)?\.[^./]+$", name.lower())
    return found[0] if found else "without an ending"
