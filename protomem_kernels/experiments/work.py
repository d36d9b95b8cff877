"""The trials of a table, run side by side: each in a process of its own, with one thread, no matter how many."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from protomem_kernels.data.images import DatasetError
from protomem_kernels.experiments.running import run
from protomem_kernels.experiments.table import Method
from protomem_kernels.training.errors import RunError

LOOK = 0.2  # seconds between looks at how far they are
IMPORTED = ["protomem_kernels.experiments.running", "protomem_kernels.data.evaluation"]


def run_all(
    trials: Sequence[tuple[Method, int]],
    *,
    jobs: int,
    ages: bool = False,
    told: Callable[[int], None] = lambda steps: None,
) -> Iterator[tuple[Method, int, dict[str, float]]]:
    """Run trials in ``jobs`` processes at a time, and yield each with its figures as it ends.

    Leaving the iterator ends those that still run.

    Args:
        trials: methods and seeds.
        jobs: how many at a time.
        ages: as :func:`~protomem_kernels.experiments.running.run` has it.
        told: is called now and then with the number of steps that all of them have taken so far; what it raises ends
            them all.

    Raises:
        RunError, DatasetError: a trial cannot be run; those beside it are ended.
    """
    context = _context()
    taken = context.Value("q", 0)
    coming = iter(trials)
    running: dict[Any, tuple[Method, int, Any]] = {}
    try:
        while True:
            for method, seed in _first(coming, jobs - len(running)):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, taken, method.trial, seed, ages), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (method, seed, process)
            if not running:
                return
            for ready in wait(list(running), LOOK):
                method, seed, process = running.pop(ready)
                yield method, seed, _figures(ready, process, f"{method.name}, seed {seed}")
            told(taken.value)
    finally:
        for _, _, process in running.values():
            process.terminate()
            process.join()


def _context() -> Any:
    """Return how processes begin: of a server that has imported what all of them need, where there is one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _first(coming: Iterator[tuple[Method, int]], count: int) -> list[tuple[Method, int]]:
    return list(itertools.islice(coming, max(0, count)))


def _figures(ours: Any, process: Any, name: str) -> dict[str, float]:
    try:
        said = ours.recv()
    except EOFError:
        process.join()
        raise RunError(f"{name}: its process ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(said, Exception):
        raise type(said)(f"{name}: {said}")
    figures: dict[str, float] = said
    return figures


def _work(pipe: Connection, taken: Any, *trial: Any) -> None:
    """Run one trial, and send its figures, or what kept it from one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    torch.set_num_threads(1)
    parent, (what, seed, ages) = os.getppid(), trial

    def told(steps: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody waits any more
        with taken.get_lock():
            taken.value += steps

    try:
        pipe.send(run(what, seed, ages=ages, told=told))
    except (RunError, DatasetError) as error:
        pipe.send(error)
