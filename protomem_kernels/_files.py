"""Files that are either whole or not there, and the folder of what is remembered between processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING = ".writing-"  # begins the name of what is not whole yet


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, which takes its place when the block ends well.

    Whoever reads ``path``, at whatever moment, finds the old file or the new one, even if this process is killed. A
    block that raises leaves nothing behind.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return the folder ``PROTOMEM_CACHE_DIR``, or ``protomem_kernels`` in the user's cache folder."""
    chosen = os.environ.get("PROTOMEM_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "protomem_kernels"
