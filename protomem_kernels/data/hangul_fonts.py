"""Where Hangul fonts are found: five packages of Debian's, or a folder of the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.left_out import first_few

SUFFIXES = (".otf", ".ttc", ".ttf")
ROOTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")


class Package(NamedTuple):
    """A package of fonts: the folder its files go to, and one of them."""

    folder: str
    witness: str


PACKAGES = {
    "fonts-nanum": Package("nanum", "NanumGothic.ttf"),
    "fonts-nanum-extra": Package("nanum", "NanumPen.ttf"),
    "fonts-baekmuk": Package("baekmuk", "batang.ttf"),
    "fonts-unfonts-core": Package("unfonts-core", "UnBatang.ttf"),
    "fonts-unfonts-extra": Package("unfonts-extra", "UnPen.ttf"),
}


def fonts_of(folder: str | os.PathLike[str]) -> list[Path]:
    """Return all font files of a folder and the folders in it, by name.

    Raises:
        DatasetError: there is none.
    """
    files = _font_files(Path(folder))
    if not files:
        raise DatasetError(f"{folder}: expected font files ({', '.join(SUFFIXES)}), got none")
    return files


def installed_fonts() -> list[Path]:
    """Return the font files of ``PACKAGES``, by name.

    All five have to be there, so that the same images come out everywhere.

    Raises:
        DatasetError: one or more are not; the message says what to install.
    """
    roots = [Path(root).expanduser() for root in ROOTS]
    folders = [folder for root in roots for folder in sorted(root.rglob("*")) if folder.is_dir()]
    missing = []
    found: dict[Path, None] = {}
    for package, (name, witness) in PACKAGES.items():
        holders = [folder for folder in folders if folder.name == name and (folder / witness).is_file()]
        if holders:
            found.update(dict.fromkeys(_font_files(holders[0])))
        else:
            missing.append(package)
    if missing:
        raise DatasetError(
            f"{first_few(ROOTS, len(ROOTS))}: expected the Hangul fonts of five packages, got {len(missing)} missing: "
            f"apt-get install {' '.join(missing)} (or name a folder of fonts)"
        )
    return _by_name(found)


def _font_files(folder: Path) -> list[Path]:
    return _by_name(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _by_name(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (path.name, path))
