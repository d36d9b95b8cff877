"""The images of a folder with one sub-folder per identity, by their names alone, and what else lies there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from natsort import natsort_keygen, ns

from protomem_kernels.data.decoding import PLUG_INS, image_suffixes
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.left_out import LeftOut

# What archives, disks and network storage put beside one's own folders; and files that nobody has put anywhere.
SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}
)
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})

LOOSE = "images beside the folders of identities"
DEEPER = "images deeper than one folder down"
NO_IMAGE = "files that are no images"
EMPTY = "empty files"
WITHOUT = "folders without an image"
SINGLE = "identities with a single image"
SYSTEM = "folders of the system's"
CLOSED = "folders that cannot be read"


class Listing(NamedTuple):
    """Identities that have at least two image files.

    Attributes:
        names: of the identities' folders, in natural order.
        files: of each identity, in natural order.
        left_out: all else, but for hidden files and folders (``.name``).
    """

    names: list[str]
    files: list[list[Path]]
    left_out: LeftOut


def list_identities(root: Path) -> Listing:
    """List ``root/<identity>/<image>``. Nothing is opened.

    Raises:
        DatasetError: ``root`` is missing, no folder, or cannot be read; no identity has two images.

    """
    if not root.is_dir():
        came = "a file" if root.exists() else "nothing there"
        raise DatasetError(f"{root}: expected a folder with one sub-folder per identity, got {came}")
    left_out = LeftOut()
    try:
        folders, loose = _sorted_out(root, root, left_out)
    except OSError as error:
        raise DatasetError(f"{root}: expected a readable folder, got {error.strerror or error}") from error
    if not folders:
        raise DatasetError(
            f"{root}: expected one sub-folder per identity, got no sub-folder and {len(loose)} image files"
        )
    left_out.add(LOOSE, *(path.name for path in loose))
    names, files = [], []
    for folder in folders:
        try:
            deeper, images = _sorted_out(folder, root, left_out)
        except OSError:
            left_out.add(CLOSED, folder.name)
            continue
        left_out.add(DEEPER, *(_name(path, root) for below in deeper for path in _images_below(below)))
        if len(images) < 2:
            left_out.add(SINGLE if images else WITHOUT, folder.name)
        else:
            names.append(folder.name)
            files.append(images)
    if not names:
        raise DatasetError(_nobody(root, len(folders), left_out))
    return Listing(names, files, left_out)


def _nobody(root: Path, folders: int, left_out: LeftOut) -> str:
    """Say that no identity has two images, and what there is instead."""
    if left_out.names(SINGLE):
        return (
            f"{root}: expected at least two images of each identity, got fewer for all of {folders} sub-folders: "
            + "; ".join(left_out.lines())
        )
    deeper = left_out.names(DEEPER)
    hint = f"; is {root / Path(deeper[0]).parts[0]} the folder of identities?" if deeper else ""
    what = f" and {len(deeper)} deeper down" if deeper else ""
    return (
        f"{root}: expected images ({' '.join(sorted(image_suffixes()))}) in the sub-folders, "
        f"got none in {folders}{what}{hint}"
    )


def _sorted_out(folder: Path, root: Path, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """Return the sub-folders and the image files of a folder, in natural order, and note what else is in it."""
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: natural(entry.name)):
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                continue
            if entry.is_dir():
                if entry.name in SYSTEM_FOLDERS:
                    left_out.add(SYSTEM, _name(path, root))
                else:
                    folders.append(path)
            elif path.suffix.lower() not in image_suffixes():
                plug_in = PLUG_INS.get(path.suffix.lower())
                kind = f"{path.suffix.lower()} files (pip install '{plug_in[0]}')" if plug_in else NO_IMAGE
                left_out.add(kind, _name(path, root))
            elif _is_empty(entry):
                left_out.add(EMPTY, _name(path, root))
            else:
                images.append(path)
    return folders, images


def _is_empty(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.stat().st_size == 0
    except OSError:  # a link to nowhere: reading it says so
        return False


def _images_below(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        yield from (Path(where, name) for name in sorted(names) if Path(name).suffix.lower() in image_suffixes())


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def natural(name: str) -> tuple[Any, str]:
    """Sort key under which s2 comes before s10, whatever the case; equal ones in the order of their characters."""
    return _natural(name), name


_natural = natsort_keygen(alg=ns.IGNORECASE)
