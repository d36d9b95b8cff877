"""The images of a run: which identities train, which are never seen until the end, and batches of both."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from protomem_kernels.data.bins import PairFile
from protomem_kernels.data.decoding import size_of
from protomem_kernels.data.images import DatasetError, ImageDataset, image_name, orl_faces, split_by_fold
from protomem_kernels.data.left_out import LeftOut, first_few
from protomem_kernels.data.pair_lists import check_enough, read_pairs
from protomem_kernels.data.pairs import Pairs
from protomem_kernels.data.reading import read_all
from protomem_kernels.data.sampling import IdentityBatchSampler
from protomem_kernels.data.sources import labelled_images
from protomem_kernels.training.config import NOBODY, TrainConfig
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.preprocessing import Transform
from protomem_kernels.training.stopping import outlive_stop_signals

FOLDS, INNER_FOLDS = 4, 3
IN_MEMORY = 1 << 30  # bytes; a data set up to this size is read once, a larger one again and again
EMBED_BATCH = 256  # images
LONGEST_SIDE, SIZES_LOOKED_AT = 112, 100


class Faces:
    """Two disjoint sets of identities, ``train`` and ``unseen``; the second is None where nothing verifies.

    Images are uint8 files on disk and (B, C, H, W) float32 in [0, 1] in every batch. All are read once before the run
    starts, by ``config.workers``, and what cannot be read is left out. A data set that fits is kept in memory; a larger
    one is read again in every epoch.

    Attributes:
        config: with the size of the images, where that follows the data.
        notes: what was left out, a line each.
        pairs: of ``unseen`` that verify; None: all.
        identities_known: whether the labels of ``unseen`` say whose the images are; of a ``.bin`` they do not.

    Raises:
        DatasetError: there are no images, or, under ``config.strict``, anything would be left out.
        RunError: too few identities.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.source, self.workers, self.notes = config.data or "ORL faces", config.workers, list[str]()
        dataset = _images(config, config.data) if config.data else orl_faces(image_size=config.image_size)
        if config.data and "image_size" not in config.model_fields_set:
            dataset.image_size = usual_size(dataset)
            config = config.model_copy(update={"image_size": dataset.image_size})
        self.config, self.image_size = config, config.image_size
        self.transform = Transform(dataset.mode, config.image_size)
        self.channels = len(dataset.mode)
        dataset, images = self._read(dataset, self.source)
        unseen: ImageDataset | None = None
        pixels: Tensor | None = None
        self.pairs: Pairs | None = None
        self.identities_known = not config.validation_is_pairs
        if not config.validation:
            seen, unseen = self._split(dataset)
            pixels = _of(images, dataset, unseen)
            dataset, images = seen, _of(images, dataset, seen)
        elif config.validation_is_pairs:
            file = PairFile(config.validation)
            packed = file.images(mode=dataset.mode, max_megapixels=config.max_megapixels)
            unseen, pixels = self._read(packed, config.validation, at_least=1)
            self._take_pairs(*file.pairs(unseen), config.validation)
        elif config.validation != NOBODY:
            unseen, pixels = self._read(_images(config, config.validation, dataset.mode), config.validation)
            both = sorted(set(_names(dataset)) & set(_names(unseen)))
            if both:
                self.notes.append(
                    f"{len(both)} names are in {self.source} and in {config.validation} ({first_few(both)}): of "
                    "identities that trained, the figures are too good"
                )
        if config.pairs and unseen is not None:
            self._take_pairs(*read_pairs(config.pairs, unseen), config.pairs)
        self.train, self.unseen = dataset, unseen
        self._train_images, self._unseen_images = images, pixels

    def _read(self, dataset: ImageDataset, source: str, at_least: int = 2) -> tuple[ImageDataset, Tensor | None]:
        """Return what can be read of a data set, and its pixels if they fit into memory."""
        height, width = dataset.image_size = self.image_size
        fits = len(dataset) * self.channels * height * width <= IN_MEMORY
        dataset, images = read_all(dataset, keep=fits, workers=self.workers, at_least=at_least)
        self._say(dataset.left_out, source)
        return dataset, images

    def _take_pairs(self, pairs: Pairs, left_out: LeftOut, source: str) -> None:
        """Verify on these pairs."""
        self._say(left_out, source)
        check_enough(pairs, source, left_out)
        self.pairs = pairs

    def _say(self, left_out: LeftOut, source: str) -> None:
        """Note what of a source is left out, or refuse it."""
        if self.config.strict:
            left_out.refuse(source)
        self.notes += [line if source == self.source else f"{source}: {line}" for line in left_out.lines()]

    def _split(self, dataset: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
        """Return who trains and who verifies, of one data set: those that a file names, or a fold."""
        config = self.config
        if config.held_out:
            unseen = _named(dataset, Path(config.held_out), self.source)
            seen = dataset.identities[~torch.isin(dataset.identities, unseen)]
            if len(unseen) < 2 or not len(seen):
                raise RunError(
                    f"{config.held_out} must name two identities of {self.source} or more, and not all of its "
                    f"{len(dataset.identities)}, got {len(unseen)}"
                )
            return dataset.subset_of_identities(seen), dataset.subset_of_identities(unseen)
        found = len(dataset.identities)
        if found // FOLDS < 2:
            raise RunError(
                f"{self.source} has {found} identities; at least {2 * FOLDS} are needed to keep a quarter of them, "
                "and no fewer than two, for verification"
                + "".join(f"; {line}" for line in self.notes)
                + "; --validation FOLDER brings others, --validation none does without"
            )
        seed = config.seed if config.data else None  # the four folds of the ORL faces are theirs
        train, other = split_by_fold(dataset, config.fold, FOLDS, seed=seed)
        if config.inner_fold >= 0:  # the fold's own identities take no part at all
            train, other = split_by_fold(train, config.inner_fold, INNER_FOLDS, seed=seed)
        return train, other

    @cached_property
    def trained_on(self) -> list[Any]:
        """Which images train, for a checkpoint: how many, of how many identities, and a digest of their names."""
        digest, train = hashlib.sha256(), self.train
        for path, label in zip(train.paths, train.labels.tolist(), strict=True):
            digest.update(f"{label}\0{image_name(path)}\0".encode("utf-8", "surrogateescape"))
        return [len(train), len(train.identities), digest.hexdigest()]

    @property
    def summary(self) -> str:
        """One phrase on what trains and what verifies."""
        height, width = self.image_size
        verifies = "nothing verifies"
        if self.unseen is not None:
            where = f" of {self.config.validation}" if self.config.validation else ""
            if self.pairs is None:
                verifies = f"{len(self.unseen.identities)} unseen ones{where} verify"
            elif self.identities_known:
                among = f"{len(self.unseen.identities)} unseen ones{where}"
                verifies = f"{len(self.pairs.same)} pairs among {among} verify"
            else:
                verifies = f"{len(self.pairs.same)} pairs{where} verify"
        return (
            f"{self.source}, {len(self.train.identities)} identities train ({len(self.train)} images), {verifies}, "
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
        assert self.unseen is not None
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


def _images(config: TrainConfig, source: str, mode: str = "RGB") -> ImageDataset:
    """Return the images of a source, as the configuration says they are read."""
    return labelled_images(
        source,
        image_size=config.image_size,
        mode=mode,
        max_megapixels=config.max_megapixels,
        image_column=config.image_column,
        label_column=config.label_column,
    )


def _of(images: Tensor | None, dataset: ImageDataset, part: ImageDataset) -> Tensor | None:
    """Return the pixels of some identities of a data set."""
    return None if images is None else images[torch.isin(dataset.labels, part.identities)]


def _names(dataset: ImageDataset) -> list[str]:
    """Return the names of a data set's identities."""
    return [dataset.names[label] for label in dataset.identities.tolist()]


def _named(dataset: ImageDataset, file: Path, source: str) -> Tensor:
    """Return the identities that a file names, one a line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read held_out {file}: {getattr(error, 'strerror', None) or error}") from error
    label = dict(zip(_names(dataset), dataset.identities.tolist(), strict=True))
    found = []
    for number, name in enumerate(map(str.strip, lines), 1):
        if name and name not in label:
            raise RunError(f"{file}, line {number}: expected the name of an identity of {source}, got {name!r}")
        if name:
            found.append(label[name])
    return torch.tensor(sorted(set(found)), dtype=torch.int64)


def usual_size(dataset: ImageDataset) -> tuple[int, int]:
    """Return the (height, width) of the image in the middle, by aspect ratio and by size, no side beyond 112."""
    sizes = []
    for index in torch.linspace(0, len(dataset) - 1, min(len(dataset), SIZES_LOOKED_AT)).long().tolist():
        path = dataset.paths[index]
        try:
            sizes.append(size_of(path if isinstance(path, Path) else path.read()))
        except DatasetError:  # left out, and named, when all are read
            continue
    if not sizes:
        return LONGEST_SIDE, LONGEST_SIDE
    aspect = statistics.median(height / width for height, width in sizes)
    longest = min(LONGEST_SIDE, statistics.median(map(max, sizes)))
    height, width = (longest, longest / aspect) if aspect > 1 else (longest * aspect, longest)
    return max(8, round(height)), max(8, round(width))
