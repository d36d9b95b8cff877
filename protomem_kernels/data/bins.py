"""insightface's ``.bin``: pairs of images to verify, pickled as (2 P encoded images, P answers: the same or not).

A pickle is a program. This one is run by an unpickler that knows bytes, numbers, lists and tuples, and of all functions
in the world the few below, which make bytes and arrays of plain numbers; any other name ends it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomem_kernels.data.decoding import MAX_MEGAPIXELS
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.images import ImageDataset
from protomem_kernels.data.left_out import LeftOut
from protomem_kernels.data.pairs import Pairs
from protomem_kernels.data.records import Record

WITHOUT = "pairs with an image that cannot be read"

# How bytes and arrays of numbers stand in pickles of all protocols, of Python 2 and 3, of numpy 1 and 2.
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")


class PairFile:
    """Pairs of images: number p is image 2 p beside image 2 p + 1, as :class:`~protomem_kernels.data.records.Record`.

    Args:
        path: the ``.bin``; all of it is kept in memory.

    Attributes:
        same: (P,) bool, whether a pair shows one identity.

    Raises:
        DatasetError: it cannot be read, or is a pickle of anything else.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                content = _PlainUnpickler(file, encoding="bytes").load()
        except OSError as error:
            raise DatasetError(f"{self.path}: expected a readable file, got {error.strerror or error}") from error
        except Exception as error:  # a damaged pickle raises what it likes
            raise DatasetError(f"{self.path}: expected pickled pairs of images, got {_line(error)}") from error
        self._images, self.same = self._checked(content)

    def __len__(self) -> int:
        """How many images there are, twice the pairs."""
        return len(self._images)

    def name_of(self, place: int) -> str:
        """Return what an image is called: the file, its pair and which of the two."""
        return f"{self.path.name}/{place // 2}{'ab'[place % 2]}"

    def read(self, place: int) -> bytes:
        """Return one encoded image."""
        return self._images[place]

    def images(
        self, *, image_size: tuple[int, int] | None = None, mode: str = "RGB", max_megapixels: float = MAX_MEGAPIXELS
    ) -> ImageDataset:
        """Return the images as a data set, its options those of ``ImageDataset``.

        Nobody knows whose they are: each has a label and a name of its own, which say nothing.
        """
        return ImageDataset(
            [Record(self, place) for place in range(len(self))],
            range(len(self)),
            [self.name_of(place) for place in range(len(self))],
            image_size=image_size,
            mode=mode,
            max_megapixels=max_megapixels,
        )

    def pairs(self, dataset: ImageDataset) -> tuple[Pairs, LeftOut]:
        """Return the pairs as positions in ``images()``, or in what can be read of it, and those that are left out."""
        places = np.full(len(self), -1)
        places[dataset.labels.numpy()] = np.arange(len(dataset))
        first, second = places.reshape(-1, 2).T
        there = (first >= 0) & (second >= 0)
        left_out = LeftOut()
        left_out.add(WITHOUT, *(f"{self.path.name}/{pair}" for pair in np.flatnonzero(~there).tolist()))
        return Pairs(first[there], second[there], self.same[there]), left_out

    def _checked(self, content: Any) -> tuple[list[bytes], npt.NDArray[np.bool_]]:
        if type(content) not in (tuple, list) or len(content) != 2:
            raise DatasetError(f"{self.path}: expected images and whether they are the same, got {_kind(content)}")
        images, same = content
        same = same.values.reshape(-1).tolist() if isinstance(same, _Array) else same
        if not isinstance(images, (list, tuple)) or not isinstance(same, (list, tuple)):
            raise DatasetError(f"{self.path}: expected two lists, got {_kind(images)} and {_kind(same)}")
        if not same or len(images) != 2 * len(same):
            raise DatasetError(f"{self.path}: expected two images a pair, got {len(images)} for {len(same)} pairs")
        for flag in same:
            if not isinstance(flag, (bool, int, np.bool_, np.integer)) or int(flag) not in (0, 1):
                raise DatasetError(f"{self.path}: expected true or false for each pair, got {_kind(flag)}")
        return [self._encoded(place, image) for place, image in enumerate(images)], np.array(same, np.bool_)

    def _encoded(self, place: int, image: Any) -> bytes:
        if isinstance(image, (bytes, bytearray)):
            return bytes(image)
        if isinstance(image, _Array) and image.values.dtype == np.uint8:
            return image.values.tobytes()
        raise DatasetError(f"{self.name_of(place)}: expected the bytes of an image, got {_kind(image)}")


class _PlainUnpickler(pickle.Unpickler):
    """Runs a pickle of plain values, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the pickle stands for, if it is one of the few."""
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}, which no pickle of images needs; it was not called")
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refuse a reference to anything outside."""
        raise pickle.UnpicklingError("a reference to something outside of the file")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand in for ``_codecs.encode``, by which Python 3 writes bytes for Python 2."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes written as {encoding!r}")
    return text.encode("latin1")


def _bytes(*values: Any) -> bytes:
    """Stand in for ``bytes`` and ``bytearray``, but for a number, which would be so many zeros."""
    if any(isinstance(value, int) for value in values):
        raise pickle.UnpicklingError("bytes of a number")
    return bytes(bytearray(*values))


class _Type:
    """A dtype of truth values or whole numbers. What a pickle sets of it is its byte order."""

    def __init__(self, name: str | bytes, *flags: Any) -> None:
        self.dtype = np.dtype(name.decode("ascii") if isinstance(name, bytes) else name)
        if self.dtype.kind not in "biu":
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in (">", b">"):
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """An array. What a pickle sets of it are its numbers."""

    def __init__(self, *nothing: Any) -> None:
        self.values: npt.NDArray[Any] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        self.values = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _from_buffer(raw: Any, kind: _Type, shape: tuple[int, ...], order: str) -> _Array:
    """Stand in for numpy's function of that name, by which protocol 5 writes arrays."""
    array = _Array()
    array.values = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(kind: _Type, raw: bytes) -> Any:
    """Stand in for numpy's function of that name: one number."""
    return np.frombuffer(raw, kind.dtype)[0]


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    **{(module, name): _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    **{(module, "_reconstruct"): _Array for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
    **{(module, "_frombuffer"): _from_buffer for module in _NUMERIC},
}


def _kind(value: Any) -> str:
    kind = "array" if isinstance(value, _Array) else type(value).__name__
    return f"a {kind}" + (f" of {len(value)}" if hasattr(value, "__len__") else f", {value!r:.40}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
