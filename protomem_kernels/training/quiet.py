"""Other libraries' loggers, kept from telling what is of no use to whoever trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_alone(logger: str) -> Iterator[None]:
    """Have the logger of this name say errors alone, within the block or the decorated function."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
