"""CUDA kernels with one fault at a time, compiled for the CPU and checked in a process of their own.

    fault = Fault("enqueue", "cuda/enqueue.cuh", "if (slot >= M)", "if (slot > M)")
    assert_noticed("tests.cuda_host.test_batch_mutants", fault, "plain", tmp_path)

Every mutant is a compilation, and there are dozens: so each has one operator, no debug information, and of its
instantiations those alone that the checks reach (``CUTS``). With None for the fault it is the same without one: there
the checks have to pass, or they would prove nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
from collections.abc import Callable, Iterable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_host.operators import SOURCES, build_library, open_library
from tests.warm_processes import warm_processes

NAMESPACE = "protomem_mutant"


class Fault(NamedTuple):
    """``old`` becomes ``new`` in ``file`` of csrc; in ``mode``, the checks must fail for csrc/cuda/``operator``.cu."""

    operator: str
    file: str
    old: str
    new: str
    mode: str = "plain"


def _without(file: str, *calls: str) -> list[tuple[str, str, str]]:
    return [(file, call, "void()") for call in calls]


_MATRIX = "cuda/matrix.cuh"
_OVER_128 = _without(
    _MATRIX,
    "f(Shape<T, 16, 128, 8, 1, 16, 2, true>())",
    "f(Shape<T, 16, 128, 8, 1, 16, 2, false>())",
    "f(Shape<T, 32, 64, 8, 1, 16, 2, false>())",
    "f(Shape<T, 32, 64, 8, 1, TILE, 2, true>())",
    "f(Deep())",
    "f(Shape<T, 32, 64, 4, 2, TILE, 3, true>())",
    "f(Shape<T, ROWS, 64, 8, 1, TILE, 2, true>())",
    "f(Shape<T, ROWS, 64, 8, 1, TILE, 2, false>())",
    "f(Shape<T, 32, 128, 8, 1, TILE / 2, 2, true>())",
    "f(Shape<T, 32, 128, 8, 1, TILE / 2, 2, false>())",
    "f(Widest())",
)
# By operator, what stands in no mutant: dtypes and numbers of columns that no check uses.
CUTS = {
    "aggregate_prototypes": _without("cuda/tensors.cuh", "f(double())", "f(float16())"),
    "enqueue": _without("cuda/tensors.cuh", "f(double())", "f(float16())", "f(bfloat16())"),
    "negative_logsumexp": _OVER_128 + _without(_MATRIX, "f(float16())", "f(Shape<T, 32, 64, 2, 4, 16, 2, false>())"),
    "hardest_negatives": _OVER_128 + _without(_MATRIX, "f(float16())"),
    "margin_softmax_logits": _OVER_128
    + _without(
        _MATRIX,
        "f(float())",
        "f(Shape<T, 32, 64, 2, 4, 16, 2, false>())",
        "f(Shape<T, 32, 64, 2, 4, TILE, 2, false>())",
    ),
}


def _mutate(csrc: Path, edits: list[tuple[str, str, str]]) -> None:
    for file, old, new in edits:
        text = (csrc / file).read_text(encoding="utf-8")
        assert old in text, f"not there any more: {old}"
        (csrc / file).write_text(text.replace(old, new), encoding="utf-8")


def _run(checks: str, operator: str, mode: str, library: Path, begun: Event) -> None:
    """In the new process: the checks of a test module, with two orders of blocks and threads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # failures are what is expected here
    if mode == "sanitized":  # AddressSanitizer's too: not among the reports of the process that asks
        ctypes.CDLL(None).__sanitizer_set_report_path(b"stderr")
    operators = open_library(library, NAMESPACE)
    check: Callable[..., None] = importlib.import_module(checks).check
    begun.set()
    for seed in range(2):
        operators.seed(seed)
        check(operator, operators)


def assert_noticed(checks: str, fault: Fault, mode: str, folder: Path) -> None:
    """The body of a test: the checks fail with the fault; skipped in other modes than its own."""
    if fault.mode != mode:
        pytest.skip(f"built for the mode {fault.mode}")
    assert notices(checks, fault.operator, fault, mode, folder)


def assert_quiet(checks: str, operator: str, faults: Iterable[Fault], mode: str, folder: Path) -> None:
    """The body of a test: the checks pass without a fault; skipped in modes for which the operator has none."""
    if not any((fault.operator, fault.mode) == (operator, mode) for fault in faults):
        pytest.skip("has no fault in this mode")
    assert not notices(checks, operator, None, mode, folder)


def notices(checks: str, operator: str, fault: Fault | None, mode: str, folder: Path) -> bool:
    """Return whether ``check(operator, operators)`` of the module ``checks`` fails for the operator with the fault."""
    csrc = folder / "csrc"
    shutil.copytree(SOURCES.parent, csrc, ignore=shutil.ignore_patterns("cpu"))
    for other in (csrc / "cuda").glob("*.cu"):
        if other.stem != operator:
            other.unlink()
    _mutate(csrc, [*CUTS[operator], *([] if fault is None else [fault[1:4]])])
    library = build_library(mode, csrc / "cuda", folder / "built", NAMESPACE, ["-g0"])

    processes = warm_processes("torch")
    begun = processes.Event()
    process = processes.Process(target=_run, args=(checks, operator, mode, library, begun))
    process.start()
    process.join(timeout=300)  # a fault may also leave a kernel in a loop
    process.kill()
    process.join()
    assert begun.is_set(), "the checks have not begun"
    return process.exitcode != 0
