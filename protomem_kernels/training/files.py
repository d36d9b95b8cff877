"""A run's files, either whole or not there: what cannot be written ends the run in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protomem_kernels import _files
from protomem_kernels.training.errors import RunError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path as ``_files.written_whole`` does.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with _files.written_whole(path) as temporary:
            yield temporary
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``."""
    for leftover in folder.rglob(f"{_files.WRITING}*"):
        leftover.unlink(missing_ok=True)
