"""Tar files as webdataset packs them: files with one stem are one sample, ``0001.jpg`` beside ``0001.cls``."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from protomem_kernels.data.decoding import image_suffixes
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.left_out import LeftOut

NO_IMAGE, NO_IDENTITY = "samples without an image", "samples that name no identity"
CLASS = "cls"


class TarFiles:
    """The images of some tar files, found by reading each file's headers once; an image is read where it lies.

    An identity is what the sample's ``.cls`` holds, or its file of another extension that is asked for; where no
    sample has a ``.cls``, it is the sample's folder.

    Args:
        paths: uncompressed tar files.
        label_column: the extension of the files that name the identities; empty: ``cls``, else the folders.

    Attributes:
        whose: the name of each image's identity.
        left_out: samples that have no image or name no identity.

    Raises:
        DatasetError: a file cannot be read, is no tar file or a compressed one.

    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], label_column: str = "") -> None:
        self.whose: list[str] = []
        self.left_out = LeftOut()
        self._where: list[tuple[Path, int, int, str]] = []  # file, offset, size, name
        extension = (label_column or CLASS).lstrip(".").lower()
        samples = [sample for path in paths for sample in _samples(Path(path), extension)]
        by_folder = not label_column and not any(identity for _, identity, _ in samples)
        for name, identity, image in samples:
            folder = name.rpartition("/")[0].rpartition("/")[2]
            identity = folder if by_folder else identity
            if image is None:
                self.left_out.add(NO_IMAGE, name)
            elif not identity:
                self.left_out.add(NO_IDENTITY, name)
            else:
                self._where.append(image)
                self.whose.append(identity)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._where)

    def name_of(self, place: int) -> str:
        """Return what an image is called: the tar file and its name in it."""
        path, _, _, name = self._where[place]
        return f"{path.name}/{name}"

    def read(self, place: int) -> bytes:
        """Return one encoded image."""
        path, offset, size, _ = self._where[place]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _samples(path: Path, extension: str) -> list[tuple[str, str, tuple[Path, int, int, str] | None]]:
    """Return the samples of a tar file: the stem, the identity ("": none), and where the image lies."""
    images: dict[str, tuple[Path, int, int, str]] = {}
    identities: dict[str, str] = {}
    stems: dict[str, None] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, ending = name.partition(".")
                stem = f"{folder}{slash}{stem}"
                stems[stem] = None
                last = f".{ending.rpartition('.')[2].lower()}"
                if ending.lower() == extension:
                    content = archive.extractfile(member)
                    assert content is not None
                    identities[stem] = " ".join(content.read().decode("utf-8", "backslashreplace").split())
                elif last in image_suffixes():
                    images.setdefault(stem, (path, member.offset_data, member.size, member.name))
    except OSError as error:
        raise DatasetError(f"{path}: expected a readable file, got {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise DatasetError(f"{path}: expected an uncompressed tar file, got {error}") from error
    return [(stem, identities.get(stem, ""), images.get(stem)) for stem in stems]
