"""``.rec`` with its ``.idx``: MXNet's RecordIO as insightface packs faces into it, read without MXNet.

A record begins with two little-endian 32-bit numbers: a magic one, and 3 bits that say which part of a record it is
above 29 bits of length; then its bytes, padded to a multiple of 4. Data that hold the magic number are cut there into
parts. The bytes are an image header (flag, label, two ids) and the encoded image; with flag > 0 so many float32 labels
stand between.

The ``.idx`` has a line for each record, its key and offset. Where record 0 has two labels (a, b), it is insightface's:
the images are records 1 to a - 1, and each record from a to b - 1 is an identity, its labels the range of its images.
Elsewhere every record is an image, and its (first) label says whose.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from protomem_kernels.data.errors import DatasetError

MAGIC = 0xCED7230A
_HEADS = struct.Struct("<II")
_IMAGE = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


class RecordFile:
    """The images of a ``.rec``.

    Args:
        path: the ``.rec``; its ``.idx`` lies beside it.

    Attributes:
        keys: of the images' records, ascending; their places are their keys.
        whose: the label of each of them, as text.

    Raises:
        DatasetError: a file is missing, or not of this format.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._offsets = _offsets(self.path.with_suffix(".idx"))
        try:
            with self.path.open("rb") as file:
                self.keys, self.whose = self._listed(file)
        except OSError as error:
            raise DatasetError(f"{self.path}: expected a readable file, got {error.strerror or error}") from error
        except (KeyError, ValueError, struct.error) as error:
            raise DatasetError(f"{self.path}: expected MXNet's RecordIO with faces, got {error}") from error

    def name_of(self, place: int) -> str:
        """Return what an image is called: the file and its key."""
        return f"{self.path.name}/{place}"

    def read(self, place: int) -> bytes:
        """Return one encoded image."""
        with self.path.open("rb") as file:
            return _parts(_record(file, self._offsets[place])).image

    def _listed(self, file: IO[bytes]) -> tuple[list[int], list[str]]:
        first = _parts(_record(file, self._offsets[0])) if 0 in self._offsets else None
        if first is None or len(first.labels) < 2:
            keys = sorted(self._offsets)
            return keys, [f"{_parts(_record(file, self._offsets[key])).labels[0]:g}" for key in keys]
        images, end = (int(label) for label in first.labels[:2])
        keys, whose = [], []
        for identity in range(images, end):
            start, stop = _parts(_record(file, self._offsets[identity])).labels[:2]
            if not 1 <= start <= stop <= images:
                raise ValueError(f"an identity of records {start:g} to {stop:g} of {images}")
            keys += range(int(start), int(stop))
            whose += [str(identity - images)] * (int(stop) - int(start))
        return keys, whose


class _Parts(NamedTuple):
    labels: npt.NDArray[np.float32]
    image: bytes


def _parts(record: bytes) -> _Parts:
    flag, label, _, _ = _IMAGE.unpack_from(record)
    if not flag:
        return _Parts(np.array([label], np.float32), record[_IMAGE.size :])
    end = _IMAGE.size + 4 * flag
    if end > len(record):
        raise ValueError(f"a record of {len(record)} bytes for {flag} labels")
    return _Parts(np.frombuffer(record[_IMAGE.size : end], "<f4"), record[end:])


def _record(file: IO[bytes], offset: int) -> bytes:
    """Return the bytes of the record at an offset, its parts joined."""
    file.seek(offset)
    found = b""
    while True:
        magic, head = _HEADS.unpack(file.read(_HEADS.size))
        part, length = head >> 29, head & (1 << 29) - 1
        if magic != MAGIC or (part in (_WHOLE, _FIRST)) != (found == b"" and file.tell() == offset + _HEADS.size):
            raise ValueError(f"no record at {offset}")
        data = file.read(length)
        if len(data) < length:
            raise ValueError(f"a record at {offset} that is cut off")
        file.seek(-length % 4, os.SEEK_CUR)
        found += data if part in (_WHOLE, _FIRST) else struct.pack("<I", MAGIC) + data
        if part in (_WHOLE, _LAST):
            return found


def _offsets(path: Path) -> dict[int, int]:
    try:
        lines = path.read_text(encoding="ascii").split("\n")
        return {int(key): int(offset) for key, offset in (line.split("\t") for line in lines if line)}
    except OSError as error:
        raise DatasetError(f"{path}: expected the index of a .rec beside it, got {error.strerror or error}") from error
    except ValueError as error:
        raise DatasetError(f"{path}: expected lines of a key and an offset, got {error}") from error
