"""Processes that stay: started once, they form groups of two to four ranks (gloo, one thread each) and take work.

What costs is starting them. A task is a function of some module of the tests, called as ``function(group, *args)`` on
each rank of a group; what it returns comes back by rank, what it raises too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLANTED = "PROTOMEM_MUTANT" in os.environ
TIMEOUT = 15 if PLANTED else 120  # seconds that a task may take


class RankError(Exception):
    """A task raised on some ranks.

    Attributes:
        errors: by rank, (name of the error's class, message), or None.
    """

    def __init__(self, errors: Sequence[tuple[str, str] | None], traces: Sequence[str]) -> None:
        super().__init__("\n".join(traces))
        self.errors = list(errors)


def _coverage_file() -> str | None:
    """Return where the coverage of this process goes, or None if it is not measured."""
    if "coverage" not in sys.modules:
        return None
    import coverage

    current = coverage.Coverage.current()
    return None if current is None else str(current.config.data_file)


def _serve(rank: int, size: int, folder: str, connection: Connection, coverage_file: str | None) -> None:
    """Do what comes in until nothing does."""
    measured: Any = None
    if coverage_file is not None:  # pytest-cov adds up the files that lie beside its own
        import coverage

        measured = coverage.Coverage(coverage_file, data_suffix=True, config_file=str(ROOT / "pyproject.toml"))
        measured.start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    groups = {ranks: dist.new_group(range(ranks)) for ranks in range(1, size + 1)}
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        if task is None:
            break
        function, ranks, seconds, args = task
        try:
            # A group that a task may break is made for it alone; making one takes all processes.
            group = groups[ranks]
            if seconds is not None:
                group = dist.new_group(range(ranks), timeout=timedelta(seconds=seconds))
            answer = "done", function(group, *args) if rank < ranks else None
        except BaseException as error:
            answer = "raised", (type(error).__name__, str(error), f"rank {rank}: {traceback.format_exc()}")
        connection.send_bytes(pickle.dumps(answer))
    if measured is not None:
        measured.stop()
        measured.save()
    os._exit(0)  # a group that a task broke may not end by itself


class Pool:
    """Processes that wait for work."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        # A process that a fault is planted in has torch already, and one thread.
        context = multiprocessing.get_context("fork" if PLANTED else "spawn")
        self.connections, self.processes = [], []
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, size, self._folder.name, theirs, _coverage_file()), daemon=True
                )
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads

    def run(
        self, ranks: int, function: Callable[..., Any], *args: Any, breaks_within: float | None = None
    ) -> list[Any]:
        """Return what ``function(group, *args)`` returned on each of ``ranks`` ranks.

        Args:
            ranks: how many take part.
            function: of a module.
            args: the same for all.
            breaks_within: seconds; the task gets a group of its own with this timeout, which it may break.

        Raises:
            RankError: it raised on some of them.
            TimeoutError: it did not end.
        """
        task = pickle.dumps((function, ranks, breaks_within, args))
        for connection in self.connections:
            connection.send_bytes(task)
        answers = []
        for rank, connection in enumerate(self.connections):
            if not wait([connection], TIMEOUT):
                raise TimeoutError(f"rank {rank} did not end {function.__name__} within {TIMEOUT} s")
            answers.append(pickle.loads(connection.recv_bytes()))
        if any(kind == "raised" for kind, _ in answers):
            errors = [value[:2] if kind == "raised" else None for kind, value in answers]
            raise RankError(errors[:ranks], [value[2] for kind, value in answers if kind == "raised"])
        return [value for _, value in answers][:ranks]

    def close(self) -> None:
        """End the processes."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(pickle.dumps(None))
            connection.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
