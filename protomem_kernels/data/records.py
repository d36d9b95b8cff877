"""Images that are no files of their own but parts of larger ones: what all such collections have in common.

:mod:`recordio`, :mod:`tars` and :mod:`tables` each find the images of one kind of collection, and whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from protomem_kernels.data.decoding import MAX_MEGAPIXELS
from protomem_kernels.data.errors import DatasetError, ImageError
from protomem_kernels.data.folders import SINGLE, natural
from protomem_kernels.data.images import ImageDataset
from protomem_kernels.data.left_out import LeftOut


class Collection(Protocol):
    """Encoded images by their place. It opens what it reads at each call, so that processes can share it."""

    def read(self, place: int) -> bytes:
        """Return one encoded image; any error means that it cannot be read."""

    def name_of(self, place: int) -> str:
        """Return what one image is called: one line."""


class Record(NamedTuple):
    """One image of a collection, for :class:`~protomem_kernels.data.images.ImageDataset` in place of a path."""

    collection: Collection
    place: int

    def __str__(self) -> str:
        return self.collection.name_of(self.place)

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            ImageError: it cannot be read.
        """
        try:
            return self.collection.read(self.place)
        except Exception as error:  # whatever reads the collection raises what it likes
            raise ImageError.of(str(self), "expected a readable image", f"{type(error).__name__}: {error}") from error


def labelled(
    collection: Collection,
    places: Sequence[int],
    whose: Sequence[str],
    origin: str,
    left_out: LeftOut,
    *,
    image_size: tuple[int, int] | None,
    mode: str = "RGB",
    max_megapixels: float = MAX_MEGAPIXELS,
) -> ImageDataset:
    """Return the images of a collection as a data set; identities with a single one are left out, and noted.

    Args:
        collection: what holds the images.
        places: of the images in it.
        whose: the name of each image's identity. Labels are their places in natural order.
        origin: what errors call the collection.
        left_out: what of the collection is left out already.
        image_size: as for ``ImageDataset``.
        mode: as for ``ImageDataset``.
        max_megapixels: as for ``ImageDataset``.

    Raises:
        DatasetError: no identity has two images.

    """
    names = sorted(set(whose), key=natural)
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([numbers[name] for name in whose], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(names))
    left_out.add(SINGLE, *(names[label] for label in torch.nonzero(counts == 1).flatten().tolist()))
    several = torch.nonzero(counts > 1).flatten()
    if not len(several):
        raise DatasetError(
            f"{origin}: expected at least two images of each identity, got fewer for all of {len(names)}"
            + "".join(f"; {line}" for line in left_out.lines())
        )
    stay = torch.nonzero(torch.isin(labels, several)).flatten()
    dataset = ImageDataset(
        [Record(collection, places[index]) for index in stay.tolist()],
        torch.searchsorted(several, labels[stay]),
        [names[label] for label in several.tolist()],
        image_size=image_size,
        mode=mode,
        max_megapixels=max_megapixels,
    )
    dataset.left_out = left_out
    return dataset
