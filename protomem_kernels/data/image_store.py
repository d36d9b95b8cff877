"""Images that were made once and are kept in one file, memory-mapped: whole or not there, and never another set's.

The file holds, one after another: N images as (C, H, W) uint8, N entries of each column, a line of JSON that says what
the images were made of, and 16 bytes that end a whole file: the line's length and ``ENDING``. The line has a checksum
of all that stands before it.
"""

from __future__ import annotations

import json
import mmap
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protomem_kernels import _files
from protomem_kernels.data.errors import DatasetError

FORMAT = 1
ENDING = b"pmimages"
TAIL = 8 + len(ENDING)
PIECE = 1 << 24  # bytes that are summed at a time
ABANDONED = 3600.0  # seconds after which nobody is expected to go on with a half-written file


CUT = "a file that is cut short, or of another kind"


class StoreError(Exception):
    """A file is not the images that were expected. The message says what it is, as in "got ..."."""


class Stored(NamedTuple):
    """What a file holds.

    Attributes:
        images: (N, C, H, W) uint8, read from the file when they are used. Writing to them does not change the file.
        columns: (N,) arrays by name.
        notes: what the maker had to say about them.
    """

    images: Tensor
    columns: dict[str, npt.NDArray[Any]]
    notes: Any


class Writer:
    """Appends images to a file under way."""

    def __init__(self, file: BinaryIO, image: tuple[int, int, int]) -> None:
        self._file, self._image = file, image
        self._sum = 0
        self._columns: dict[str, list[npt.NDArray[Any]]] = {}

    def add(self, images: npt.NDArray[np.uint8], **columns: npt.NDArray[Any]) -> None:
        """Append images (n, C, H, W), and the (n,) entries of each column, the same ones at every call."""
        assert images.shape[1:] == self._image
        assert all(len(column) == len(images) for column in columns.values())
        self._write(images)
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column)

    def end(self, made_of: Any, notes: Any) -> None:
        """Append the columns and the line that ends the file."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        for column in columns.values():
            self._write(column)
        line = {
            "format": FORMAT,
            "made_of": made_of,
            "image": self._image,
            "count": len(next(iter(columns.values()), ())),
            "columns": {name: column.dtype.str for name, column in columns.items()},
            "crc32": self._sum,
            "notes": notes,
        }
        text = json.dumps(line).encode()
        self._file.write(text + len(text).to_bytes(8, "little") + ENDING)

    def _write(self, values: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).data
        self._sum = zlib.crc32(data, self._sum)
        self._file.write(data)


def kept_images(
    path: Path, made_of: Any, image: tuple[int, int, int], make: Callable[[Writer], Any]
) -> tuple[Stored, list[str]]:
    """Return the images of ``path``, which are made first if the file is not there, damaged or made of something else.

    Whoever else reads ``path``, at whatever moment, finds a whole file or none. What a killed process left half-written
    is removed when the images are made again, an hour later or more.

    Args:
        path: the file; its folder is made.
        made_of: all that the images depend on, as JSON has it. A file that was made of anything else is made again.
        image: (C, H, W) of an image.
        make: appends the images to the writer it is given, and returns notes to be kept with them, as JSON has them.

    Returns:
        the images, and a line on why a file that was there had to be made again, if there was one.

    Raises:
        DatasetError: the file cannot be written.
    """
    made_of, lines = json.loads(json.dumps(made_of)), []
    try:
        return _read(path, made_of), []
    except FileNotFoundError:
        pass
    except StoreError as error:
        lines.append(f"{path}: expected images that were kept, got {error}; they are made again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with _files.written_whole(path) as temporary, temporary.open("wb") as file:
            writer = Writer(file, image)
            writer.end(made_of, make(writer))
        return _read(path, made_of), lines
    except BrokenPipeError:  # of whoever is told how far it is; no file raises it
        raise
    except (OSError, StoreError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{path}: expected to write images there, got: {reason}") from error


def _read(path: Path, made_of: Any) -> Stored:
    """Return what a file holds, or raise StoreError; FileNotFoundError where there is none."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < TAIL:  # an empty file cannot be mapped at all
                raise StoreError(CUT)
            # Private: a tensor may be written to, the file is not.
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(error.strerror or error) from error
    if bytes(data[-len(ENDING) :]) != ENDING:
        raise StoreError(CUT)
    start = len(data) - TAIL - int.from_bytes(bytes(data[-TAIL : -len(ENDING)]), "little")
    try:
        line = json.loads(bytes(data[max(start, 0) : -TAIL]))
        if line["format"] != FORMAT:
            raise StoreError(f"a file of format {line['format']}, not {FORMAT}")
        if line["made_of"] != made_of:
            raise StoreError(f"others ({_difference(line['made_of'], made_of)})")
        return _laid_out(data[:start], line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError("a damaged file") from error


def _laid_out(data: npt.NDArray[np.uint8], line: dict[str, Any]) -> Stored:
    """Return the images and columns that the bytes before the line are, or raise ValueError."""
    total = 0
    for start in range(0, len(data), PIECE):
        total = zlib.crc32(data[start : start + PIECE].data, total)
    if total != line["crc32"]:
        raise ValueError("the checksum is another")
    count, image = line["count"], line["image"]
    end = count * int(np.prod(image))
    images, columns = torch.from_numpy(data[:end]).view(count, *image), {}
    for name, dtype in line["columns"].items():
        start, end = end, end + count * np.dtype(dtype).itemsize
        columns[name] = np.frombuffer(data[start:end].tobytes(), dtype)
    return Stored(images, columns, line["notes"])


def _difference(came: Any, expected: Any) -> str:
    """Return what the images of a file were made of otherwise, in a few words."""
    if not isinstance(came, dict):
        return "made of something else"
    return ", ".join(f"different {key}" for key, value in expected.items() if came.get(key) != value)


def _sweep(path: Path) -> None:
    """Remove what killed processes left half-written of this file: nobody has written to it for an hour."""
    for leftover in path.parent.glob(f"{_files.WRITING}*-{path.name}"):
        if time.time() - leftover.stat().st_mtime > ABANDONED:
            leftover.unlink(missing_ok=True)
