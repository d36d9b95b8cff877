"""Files that are either whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from protomem_kernels.cli.errors import CommandError

FORMAT = "protomem-train"
VERSION = 1


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, which takes its place when the block ends well.

    Whoever reads ``path``, at whatever moment, finds the old file or the new one, even if this process is killed. A
    block that raises leaves nothing behind.
    """
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``."""
    for leftover in folder.glob(".writing-*"):
        leftover.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, and dicts or lists of them) to ``path`` in one piece."""
    try:
        with written_whole(path) as temporary:
            torch.save({"format": FORMAT, "version": VERSION, **content}, temporary)
    except RuntimeError as error:  # torch's way to report a full disk or a folder that is gone
        raise CommandError(f"cannot write {path}: {error}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what ``save_checkpoint`` wrote, on the CPU; a file that is not that raises CommandError.

    Nothing in the file is executed: it is read with ``weights_only=True``.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises half a dozen unrelated types for a damaged file
        raise CommandError(f"{path} is damaged or not a checkpoint ({type(error).__name__} while reading)") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CommandError(f"{path} was not written by protomem train")
    if content.get("version") != VERSION:
        raise CommandError(f"{path} has checkpoint version {content.get('version')}, this protomem reads {VERSION}")
    return content
