"""Processes that have torch already and whose fresh memory is no friendly zeros: for faults planted in kernels."""

from __future__ import annotations

import multiprocessing
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

import pytest


@cache
def warm_processes(*preloaded: str, environment: tuple[tuple[str, str], ...] = ()) -> ForkServerContext:
    """Return where to start processes: forked from one, of which a process can have one, with these modules imported.

    A fault may leave results unwritten or read past an array's end, and go unnoticed where memory happens to be zero:
    here it holds bytes of 127, huge numbers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preloaded])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MALLOC_PERTURB_", "128"), *environment):
            patch.setenv(name, value)  # when the server starts, which hands it on
        forkserver.ensure_running()
    return context
