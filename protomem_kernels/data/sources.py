"""Labelled images from whatever they lie in: a folder, RecordIO, tar files, a table; told by its name and content."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from protomem_kernels.data.decoding import MAX_MEGAPIXELS
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.images import ImageDataset, image_folder
from protomem_kernels.data.left_out import LeftOut
from protomem_kernels.data.recordio import RecordFile
from protomem_kernels.data.records import Collection, labelled
from protomem_kernels.data.tables import SAVED, Table
from protomem_kernels.data.tars import TarFiles


def labelled_images(
    root: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | None = None,
    mode: str = "RGB",
    max_megapixels: float = MAX_MEGAPIXELS,
    image_column: str = "",
    label_column: str = "",
) -> ImageDataset:
    """Return the images of a data set of any of the kinds below. Only what names them is read here.

    - a folder with one sub-folder per identity (:func:`~protomem_kernels.data.images.image_folder`);
    - ``.rec`` with its ``.idx`` beside it, or a folder with one of these, as insightface packs them (:mod:`recordio`);
    - ``.tar``, or a folder with these, as webdataset packs them (:mod:`tars`);
    - ``.parquet``, or a folder that ``save_to_disk`` of Hugging Face's ``datasets`` wrote (:mod:`tables`).

    Args:
        root: the file or folder.
        image_size: (height, width) in pixels; None: as in the files.
        mode: "RGB" or "L".
        max_megapixels: a larger image cannot be read.
        image_column: of a table, the column of images; empty: found by its type or name.
        label_column: of a table, the column of identities, found like that; of tar files, the extension that names
            them (cls).

    Raises:
        DatasetError: it is of none of these kinds, cannot be read, or no identity has two images.

    """
    root = Path(root)
    collection: Collection
    places: Sequence[int]
    left_out = LeftOut()
    inside = _files(root)
    records = [path for path in inside if path.suffix.lower() == ".rec"]
    tars = [path for path in inside if path.suffix.lower() == ".tar"]
    if root.suffix.lower() == ".parquet" or any(path.name in SAVED for path in inside):
        collection = Table(root, image_column, label_column)
        places, whose = range(len(collection)), collection.whose
    elif len(records) == 1:
        collection = RecordFile(records[0])
        places, whose = collection.keys, collection.whose
    elif tars:
        collection = TarFiles(tars, label_column)
        places, whose, left_out = range(len(collection)), collection.whose, collection.left_out
    elif root.is_file():
        raise DatasetError(f"{root}: expected a folder of images, .rec, .tar or .parquet, got a file of another kind")
    else:
        return image_folder(root, image_size=image_size, mode=mode, max_megapixels=max_megapixels)
    return labelled(
        collection,
        places,
        whose,
        str(root),
        left_out,
        image_size=image_size,
        mode=mode,
        max_megapixels=max_megapixels,
    )


def _files(root: Path) -> list[Path]:
    """Return a file itself, or the files right in a folder."""
    if root.is_file():
        return [root]
    try:
        return sorted(path for path in root.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError:  # image_folder says it
        return []
