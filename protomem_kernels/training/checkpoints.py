"""Checkpoints: everything that the next step depends on, in one file that is read without executing any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from protomem_kernels.training.errors import RunError
from protomem_kernels.training.files import written_whole

FORMAT = "protomem-train"
VERSION = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, and dicts or lists of them) to ``path`` in one piece."""
    try:
        with written_whole(path) as temporary:
            torch.save({"format": FORMAT, "version": VERSION, **content}, temporary)
    except RuntimeError as error:  # torch's way to report a full disk or a folder that is gone
        raise RunError(f"cannot write {path}: {error}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what ``save_checkpoint`` wrote, on the CPU; a file that is not that raises RunError.

    Nothing in the file is executed: it is read with ``weights_only=True``.
    """
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
    return content
