"""CUDA kernels with one fault at a time, compiled for the CPU and checked in a process of their own.

    fault = Fault("cuda/enqueue.cuh", "if (slot >= M)", "if (slot > M)")
    assert_noticed("enqueue", fault, "plain", tmp_path)

Beside this file is one for each operator: its FAULTS, CUTS, and ``check(operators)``, which fails if there is a fault.

Every mutant is a compilation, and there are dozens: so each has one operator, no debug information, no optimisation,
and of its instantiations those alone that the checks reach (without CUTS). With None for the fault it is the same
without one: there the checks have to pass, or they would prove nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tests.backends.cuda.operators import SOURCES, build_library, open_library
from tests.warm_processes import warm_processes

NAMESPACE = "protomem_mutant"
# The race check sees what is accessed: unoptimised code copies a whole struct to read one of its members.
OPTIMISE = {"plain": ["-O0"], "sanitized": ["-O0"], "race": []}
Edit = tuple[str, str, str]  # in this file of csrc, this text becomes that


class Fault(NamedTuple):
    """``old`` becomes ``new`` in ``file`` of csrc; in ``mode``, the checks must fail."""

    file: str
    old: str
    new: str
    mode: str = "plain"


def without(file: str, *calls: str) -> list[Edit]:
    return [(file, call, "void()") for call in calls]


# What numbers of columns over 128 take.
MATRIX = "cuda/base/matrix.cuh"
OVER_128 = without(
    MATRIX,
    "f(Shape<T, 16, 128, 8, 1, 16, 2, false>())",
    "f(Shape<T, 32, 64, 8, 1, 16, 2, false>())",
    "f(Shape<T, 32, 64, 4, 2, TILE, 3, true>())",
    "f(Shape<T, ROWS, 64, 8, 1, TILE, 2, false>())",
    "f(Shape<T, 32, 128, 8, 1, TILE / 2, 2, false>())",
    "f(Widest())",
)
OVER_128 += [(MATRIX, "with_deepest<Task, Deep, Shallow>(processors, f)", "void(Deep())")]


def faults_of(operator: str) -> ModuleType:
    return importlib.import_module(f"tests.faults.cuda.{operator}")


def _mutate(csrc: Path, edits: list[Edit]) -> None:
    for file, old, new in edits:
        text = (csrc / file).read_text(encoding="utf-8")
        assert old in text, f"not there any more: {old}"
        (csrc / file).write_text(text.replace(old, new), encoding="utf-8")


def _run(operator: str, mode: str, library: Path, begun: Event) -> None:
    """In the new process: the operator's checks, with two orders of blocks and threads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # failures are what is expected here
    if mode == "sanitized":  # AddressSanitizer's too: not among the reports of the process that asks
        ctypes.CDLL(None).__sanitizer_set_report_path(b"stderr")
    operators = open_library(library, NAMESPACE)
    check = faults_of(operator).check
    begun.set()
    for seed in range(2):
        operators.seed(seed)
        check(operators)


def assert_noticed(operator: str, fault: Fault, mode: str, folder: Path) -> None:
    """The body of a test: the checks fail with the fault; skipped in other modes than its own."""
    if fault.mode != mode:
        pytest.skip(f"built for the mode {fault.mode}")
    assert notices(operator, fault, mode, folder)


def assert_quiet(operator: str, mode: str, folder: Path) -> None:
    """The body of a test: the checks pass without a fault; skipped in modes for which the operator has none."""
    if not any(fault.mode == mode for fault in faults_of(operator).FAULTS.values()):
        pytest.skip("has no fault in this mode")
    assert not notices(operator, None, mode, folder)


def notices(operator: str, fault: Fault | None, mode: str, folder: Path) -> bool:
    """Return whether the operator's checks fail with the fault."""
    csrc = folder / "csrc"
    shutil.copytree(SOURCES.parent, csrc, ignore=shutil.ignore_patterns("cpu"))
    for other in (csrc / "cuda").glob("*.cu"):
        if other.stem != operator:
            other.unlink()
    _mutate(csrc, [*faults_of(operator).CUTS, *([] if fault is None else [fault[:3]])])
    library = build_library(mode, csrc / "cuda", folder / "built", NAMESPACE, ["-g0", *OPTIMISE[mode]])

    processes = warm_processes("torch")
    begun = processes.Event()
    process = processes.Process(target=_run, args=(operator, mode, library, begun))
    process.start()
    process.join(timeout=300)  # a fault may also leave a kernel in a loop
    process.kill()
    process.join()
    assert begun.is_set(), "the checks have not begun"
    return process.exitcode != 0
