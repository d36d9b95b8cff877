"""The images of a run: which identities train, which are never seen until the end, and batches of both."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from protomem_kernels.data.images import DatasetError, ImageDataset, orl_faces, split_by_fold
from protomem_kernels.data.reading import read_all
from protomem_kernels.data.sampling import IdentityBatchSampler
from protomem_kernels.data.sources import labelled_images
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.stopping import outlive_stop_signals

FOLDS, INNER_FOLDS = 4, 3
IN_MEMORY = 1 << 30  # bytes; a data set up to this size is read once, a larger one again and again
EMBED_BATCH = 256  # images
LONGEST_SIDE, SIZES_LOOKED_AT = 112, 100


class Faces:
    """Two disjoint sets of identities of one data set, ``train`` and ``unseen``.

    Images are uint8 files on disk and (B, C, H, W) float32 in [0, 1] in every batch. All are read once before the run
    starts, by ``config.workers``, and what cannot be read is left out. A data set that fits is kept in memory; a larger
    one is read again in every epoch.

    Raises:
        DatasetError: there are no images, or, under ``config.strict``, anything would be left out.
        RunError: too few identities.
    """

    def __init__(self, config: TrainConfig) -> None:
        if config.data:
            dataset = labelled_images(
                config.data,
                image_size=config.image_size,
                max_megapixels=config.max_megapixels,
                image_column=config.image_column,
                label_column=config.label_column,
            )
        else:
            dataset = orl_faces(image_size=config.image_size)
        if config.data and "image_size" not in config.model_fields_set:
            dataset.image_size = usual_size(dataset)
            config = config.model_copy(update={"image_size": dataset.image_size})
        self.config = config
        self.channels = 1 if dataset.mode == "L" else 3
        self.image_size = height, width = config.image_size
        fits = len(dataset) * self.channels * height * width <= IN_MEMORY
        dataset, images = read_all(dataset, keep=fits, workers=config.workers)
        self.left_out = dataset.left_out
        if config.strict:
            self.left_out.refuse(config.data)
        found = len(dataset.identities)
        if found // FOLDS < 2:
            raise RunError(
                f"{config.data} has {found} identities; at least {2 * FOLDS} are needed to keep a quarter of them, "
                "and no fewer than two, for verification" + "".join(f"; {line}" for line in self.left_out.lines())
            )
        self.source = config.data or "ORL faces"
        seed = config.seed if config.data else None  # the four folds of the ORL faces are theirs
        self.train, self.unseen = split_by_fold(dataset, config.fold, FOLDS, seed=seed)
        if config.inner_fold >= 0:  # the fold's own identities take no part at all
            self.train, self.unseen = split_by_fold(self.train, config.inner_fold, INNER_FOLDS, seed=seed)
        self.workers = config.workers
        self._train_images, self._unseen_images = (
            None if images is None else images[torch.isin(dataset.labels, part.identities)]
            for part in (self.train, self.unseen)
        )

    @property
    def summary(self) -> str:
        """One phrase on what trains and what verifies."""
        train, unseen = len(self.train.identities), len(self.unseen.identities)
        height, width = self.image_size
        return (
            f"{self.source}, {train} identities train ({len(self.train)} images), {unseen} unseen ones verify, "
            f"cropped to {height} x {width}"
        )

    def sampler(self, config: TrainConfig) -> IdentityBatchSampler:
        """Return the batch sampler over the training images."""
        return IdentityBatchSampler(
            self.train.labels,
            config.identities_per_batch,
            config.images_per_identity,
            seed=config.seed,
            num_replicas=1,
            rank=0,
        )

    def train_batches(self, order: Iterable[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and (B,) int64 labels for each list of positions in the training set."""
        return self._batches(self.train, self._train_images, order)

    def unseen_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images of the unseen identities once, in order."""
        order = BatchSampler(range(len(self.unseen)), EMBED_BATCH, drop_last=False)
        return self._batches(self.unseen, self._unseen_images, order)

    def _batches(
        self, dataset: ImageDataset, images: Tensor | None, order: Iterable[list[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if images is not None:
            for batch in order:
                yield images[batch].float() / 255, dataset.labels[batch]
            return
        loader = DataLoader(dataset, batch_sampler=order, num_workers=self.workers, worker_init_fn=outlive_stop_signals)
        try:
            for pixels, labels in loader:
                yield pixels.float() / 255, labels
        except DatasetError as error:  # from a worker it comes with the worker's traceback; its own line is the last
            raise DatasetError(str(error).strip().splitlines()[-1]) from error


def usual_size(dataset: ImageDataset) -> tuple[int, int]:
    """Return the (height, width) of the image in the middle, by aspect ratio and by size, no side beyond 112."""
    whole = dataset.subset(torch.linspace(0, len(dataset) - 1, min(len(dataset), SIZES_LOOKED_AT)).long())
    whole.image_size = None
    sizes = []
    for index in range(len(whole)):
        try:
            sizes.append(tuple(whole[index][0].shape[1:]))
        except DatasetError:  # left out, and named, when all are read
            continue
    if not sizes:
        return LONGEST_SIDE, LONGEST_SIDE
    aspect = statistics.median(height / width for height, width in sizes)
    longest = min(LONGEST_SIDE, statistics.median(map(max, sizes)))
    height, width = (longest, longest / aspect) if aspect > 1 else (longest * aspect, longest)
    return max(8, round(height)), max(8, round(width))
