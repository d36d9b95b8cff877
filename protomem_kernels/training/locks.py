"""One run at a time in a run's folder: a lock of the operating system, which ends with the process that holds it.

Whatever kills the holder, no stale lock is left; the file ``.lock`` itself stays and only says who held it last.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protomem_kernels.training.errors import RunError

LOCK = ".lock"
OWN = "start a run of its own without --resume"
_held: set[int] = set()

if sys.platform == "win32":
    import msvcrt

    _BEHIND = 1 << 30  # where the locked byte is: others cannot read what is locked

    def _take(number: int) -> None:
        os.lseek(number, _BEHIND, os.SEEK_SET)
        try:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error

else:
    import fcntl

    def _take(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _let_go_in_child() -> None:
        """Close the locks in a process that was forked, such as one that reads images: it may outlive the holder."""
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def locked(folder: Path, instead: str = OWN) -> Iterator[None]:
    """Hold the lock of a folder within the block.

    Where the file system knows no locks, a warning says so and the block runs without.

    Args:
        folder: of a run, or of whatever else is written by one process at a time.
        instead: what whoever finds it in use can do.

    Raises:
        RunError: another process, or another run of this one, holds it; or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from error
    process = os.getpid()
    try:
        _hold(number, folder, instead)
        yield
    finally:
        if os.getpid() == process:  # a forked child has closed it
            _held.discard(number)
            os.close(number)


def _hold(number: int, folder: Path, instead: str) -> None:
    try:
        _take(number)
    except BlockingIOError as error:
        holder = (folder / LOCK).read_text(encoding="utf-8").strip() or "another process"
        raise RunError(f"{folder} is in use by {holder}; wait until it is done or stop it, or {instead}") from error
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror or error}): see that no second run writes into it",
            stacklevel=5,
        )
    _held.add(number)
    try:
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        os.write(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from error
