"""A zip of images, with `dataset.json` if it has labels: the data sets of EDM and StyleGAN."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping

from ...runtime import storage
from ..labels import tidy
from .source import Read, Source, add_member


class Zip(Source):
    """The address of an image is its name as it stands in the archive."""

    kind, ending, begins = "zip", ".zip", b"PK"

    def members(self, files: Mapping[str, str], others: list[str]) -> Mapping[str, str]:
        try:
            with storage.open_file(self.root, "rb") as file, zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
        except Exception as error:  # zipfile answers a damaged directory with BadZipFile, struct.error and others
            raise ValueError(f"{self.root!r}: not a readable zip file: {error}") from error
        members: dict[str, str] = {}
        for info in infos:
            if info.flag_bits & 1:
                raise ValueError(f"{self.root!r}: {info.filename!r} is encrypted; make the archive again without")
            if info.file_size > 1032 * info.compress_size + 64:  # deflate cannot do better than 1032:1
                raise ValueError(
                    f"{self.root!r}: {info.filename!r} claims {info.file_size} bytes, which is not possible"
                )
            add_member(members, tidy(info.filename), info.filename, self.root)
        return dict(sorted(members.items(), key=lambda member: member[0].split("/")))

    def open(self) -> Read:
        return zipfile.ZipFile(storage.open_file(self.root, "rb")).read
