"""All images of a data set, read once before it is used: what cannot be read is left out and named."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from protomem_kernels.data.errors import DatasetError, ImageError
from protomem_kernels.data.images import ImageDataset, image_name

BROKEN = "images that cannot be read"
NO_LONGER = "identities with fewer than two readable images"


class _Attempts(Dataset[tuple[Tensor | None, str]]):
    """Each image of a data set, or why it cannot be read."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return self.dataset[index][0], ""
        except ImageError as error:
            return None, error.reason


def read_all(
    dataset: ImageDataset, *, keep: bool = True, workers: int = 0, at_least: int = 2
) -> tuple[ImageDataset, Tensor | None]:
    """Read every image; return the data set of those that can be read, and their pixels.

    What is left out (unreadable images, and then identities that have too few) stands in its ``left_out``, with
    what was left out before.

    Args:
        dataset: with an ``image_size``.
        keep: whether to return the pixels, (N, C, H, W) uint8; else None is returned for them.
        workers: processes that read; 0: this one.
        at_least: readable images that an identity needs, 1 or 2.

    Raises:
        DatasetError: no identity has so many readable images.

    """
    good: list[int] = []
    broken: list[str] = []
    pixels = torch.empty(0, dtype=torch.uint8)
    for index, (image, reason) in enumerate(_attempts(dataset, workers)):
        if image is None:
            broken.append(f"{image_name(dataset.paths[index])}: {reason}")
            continue
        if keep and not good:
            pixels = torch.empty((len(dataset), *image.shape), dtype=torch.uint8)
        if keep:
            pixels[len(good)] = image
        good.append(index)
    dataset.left_out.add(BROKEN, *broken)
    labels = dataset.labels[good]
    counts = torch.bincount(labels, minlength=len(dataset.names))
    few = torch.nonzero((counts < at_least) & (torch.bincount(dataset.labels, minlength=len(counts)) > 0)).flatten()
    if at_least > 1:
        dataset.left_out.add(NO_LONGER, *(dataset.names[label] for label in few.tolist()))
    stay = torch.nonzero(~torch.isin(labels, few)).flatten()
    if not len(stay):
        what = "identities with two readable images" if at_least > 1 else "readable images"
        raise DatasetError(f"expected {what}, got none: {'; '.join(dataset.left_out.lines())}")
    if len(stay) < len(dataset):
        dataset = dataset.subset(torch.tensor(good)[stay])
        pixels = pixels[stay] if keep else pixels
    return dataset, pixels if keep else None


def _attempts(dataset: ImageDataset, workers: int) -> Iterator[tuple[Tensor | None, str]]:
    attempts = _Attempts(dataset)
    if not workers:
        return (attempts[index] for index in range(len(attempts)))
    return iter(DataLoader(attempts, batch_size=None, num_workers=workers))
