"""Checkpoints: everything that the next step depends on, in one file that is read without executing any of it.

The file is one of torch's (``torch.load`` opens it), and a zip archive as all of those are. Its archive comment, the
last bytes, holds the SHA-256 of all bytes before: a file that was cut off or changed anywhere, by a single bit, is
refused.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from protomem_kernels.training.errors import RunError
from protomem_kernels.training.files import written_whole

FORMAT = "protomem-train"
VERSION = 2

_TITLE = b"protomem-sha256:"
_COMMENT_LENGTH = struct.Struct("<H")  # the last field of a zip archive; torch writes 0
_DIGEST_LENGTH = 64
_TRAILER_LENGTH = _COMMENT_LENGTH.size + len(_TITLE) + _DIGEST_LENGTH
_CHUNK = 1 << 20


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, and dicts or lists of them) to ``path`` in one piece."""
    try:
        with written_whole(path) as temporary, temporary.open("wb+") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            end = file.seek(-_COMMENT_LENGTH.size, 2)
            trailer = _trailer(_digest(file, end))
            file.seek(end)
            file.write(trailer)
    except RuntimeError as error:  # torch's writer, closing after the error of the file below it
        below = error.__context__
        reason = below.strerror if isinstance(below, OSError) else str(error)
        raise RunError(f"cannot write {path}: {reason}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what ``save_checkpoint`` wrote, on the CPU; a file that is not that, to the bit, raises RunError.

    Nothing in the file is executed: it is read with ``weights_only=True``.
    """
    try:
        checked = _checksum_holds(path)
    except OSError as error:
        raise RunError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if checked is False:
        raise RunError(f"{path} is damaged: its checksum is not that of its content; take a copy of it, or start anew")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises half a dozen unrelated types for a damaged file
        raise RunError(f"{path} is damaged or not a checkpoint ({type(error).__name__} while reading)") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{path} was not written by protomem train")
    if content.get("version") != VERSION:
        raise RunError(f"{path} has checkpoint version {content.get('version')}, this protomem reads {VERSION}")
    if checked is None:
        raise RunError(f"{path} is damaged: it has no checksum; take a copy of it, or start anew")
    return content


def check_like(ours: Any, theirs: Any, name: str) -> None:
    """Check that loaded state is made like a run's own: keys, lengths, types, and shape and dtype of tensors.

    Raises:
        ValueError: naming the first place where it is not.
    """
    if isinstance(ours, Tensor):
        if not isinstance(theirs, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(theirs).__name__}")
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise ValueError(
                f"{name} must be {tuple(ours.shape)} of {ours.dtype}, got {tuple(theirs.shape)} of {theirs.dtype}"
            )
    elif isinstance(ours, Mapping):
        if not isinstance(theirs, Mapping) or set(theirs) != set(ours):
            came = sorted(map(str, theirs)) if isinstance(theirs, Mapping) else type(theirs).__name__
            raise ValueError(f"{name} must hold {', '.join(map(str, ours)) or 'nothing'}, got {came}")
        for key, value in ours.items():
            check_like(value, theirs[key], f"{name}.{key}")
    elif isinstance(ours, Sequence) and not isinstance(ours, str):
        if type(theirs) is not type(ours) or len(theirs) != len(ours):
            raise ValueError(f"{name} must be a {type(ours).__name__} of {len(ours)}, got {theirs!r:.80}")
        for place, value in enumerate(ours):
            check_like(value, theirs[place], f"{name}[{place}]")
    elif type(theirs) is not type(ours):
        raise ValueError(f"{name} must be of type {type(ours).__name__}, got {theirs!r:.80}")


def _trailer(digest: str) -> bytes:
    comment = _TITLE + digest.encode()
    return _COMMENT_LENGTH.pack(len(comment)) + comment


def _digest(file: IO[bytes], end: int) -> str:
    """Return the SHA-256 of the first ``end`` bytes."""
    file.seek(0)
    digest, left = hashlib.sha256(), end
    while left and (chunk := file.read(min(left, _CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _checksum_holds(path: Path) -> bool | None:
    """Say whether the file is what its checksum says, or None if it has none."""
    with path.open("rb") as file:
        end = file.seek(0, 2) - _TRAILER_LENGTH
        if end < 0:
            return None
        file.seek(end)
        trailer = file.read()
        if trailer[_COMMENT_LENGTH.size :].startswith(_TITLE):
            return trailer == _trailer(_digest(file, end))
    return None
