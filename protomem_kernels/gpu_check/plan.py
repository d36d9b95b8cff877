"""The parts of a check in the order of value, and how much of the time each may take."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from protomem_kernels.gpu_check import correctness, counters, environment, sanitizer, speed, steps, suite
from protomem_kernels.gpu_check.device import stands_in
from protomem_kernels.gpu_check.processes import Task
from protomem_kernels.gpu_check.records import Record


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        title: what it looks at.
        share: of the whole time, at most; what it does not take is left to the later ones.
        at_once: how many of its processes may run side by side: what is timed runs alone.
        tasks: of the part, given the checkout, in the order of value.
        run: does one of them, given where to write, its name, its first case and the checkout; may return an exit code.
        absent: why the part is left out here, or None.
    """

    title: str
    share: float
    at_once: int
    tasks: Callable[[Path], list[Task]]
    run: Callable[[Record, str, int, Path], int | None]
    absent: Callable[[Path], str | None] = lambda checkout: None


PARTS: dict[str, Part] = {
    "environment": Part("the environment", 0.1, 1, environment.tasks, environment.run),
    "correctness": Part("every kernel beside float64", 0.3, 12, correctness.tasks, correctness.run),
    "speed": Part("ceilings and the speed of every operator", 0.35, 1, speed.tasks, speed.run),
    "steps": Part("whole steps, by kernel and as a CUDA graph", 0.1, 1, steps.tasks, steps.run),
    "sanitizer": Part("compute-sanitizer", 0.15, 4, sanitizer.tasks, sanitizer.run, sanitizer.absent),
    "counters": Part("ncu", 0.15, 1, counters.tasks, counters.run, counters.absent),
    "suite": Part("the GPU suite", 1.0, 8, suite.tasks, suite.run, suite.absent),
}


def at_once(part: Part) -> int:
    """Return how many processes of a part run side by side here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(part.at_once, 2 if stands_in() else cores))
