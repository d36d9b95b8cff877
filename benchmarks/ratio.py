"""Time one thing in units of another, so that the figure holds on a noisy machine.

The two run in turn in one process: unit, target, unit, target, ..., unit. Each run of the target is divided by the mean
of its two neighbouring units, and the median of these ratios is the figure. pytest-benchmark times the target itself,
so that its own fields stay useful.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.inputs import Problem, Size
from benchmarks.peers import synchronize, tiled_product

Action = Callable[[], object]


class Ratio(NamedTuple):
    """Target / unit, and the unit's own time."""

    median: float
    low: float
    high: float
    unit_seconds: float  # median

    @property
    def inverse(self) -> Ratio:
        """How many times faster the target is than the unit."""
        return Ratio(1 / self.median, 1 / self.high, 1 / self.low, self.unit_seconds)


def seconds(action: Action) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def neighbours_ratios(units: list[float], targets: list[float]) -> Ratio:
    """Return the ratios of n targets, each to the mean of the units before and after it (n + 1 of them).

    >>> neighbours_ratios([1.0, 1.0, 3.0], [2.0, 2.0])
    Ratio(median=1.5, low=1.0, high=2.0, unit_seconds=1.0)
    """
    around = [(before + after) / 2 for before, after in itertools.pairwise(units)]
    ratios = [target / unit for target, unit in zip(targets, around, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), statistics.median(units))


def compare(
    benchmark: Any,
    target: Action,
    unit: Action,
    *,
    budget: float = 6.0,
    least: int = 3,
    most: int = 200,
    rounds: int | None = None,
) -> Ratio:
    """Warm both up, then run them in turn for about ``budget`` seconds, ``least`` to ``most`` rounds.

    With ``rounds``, exactly that many, and only the unit is warmed up: for a slow target that shares the unit's code.
    """
    if rounds is None:
        pair_seconds = seconds(unit) + seconds(target)
        rounds = max(least, min(most, int(budget / pair_seconds)))
    else:
        unit()
    units: list[float] = []
    benchmark.pedantic(target, setup=lambda: units.append(seconds(unit)), rounds=rounds)
    units.append(seconds(unit))
    return neighbours_ratios(units, benchmark.stats.stats.data)


def compare_with_g(benchmark: Any, target: Action, problem: Problem, regime: str = "fresh", **facts: Any) -> None:
    """Measure and record the target in units of G, the tiled matrix product of the same problem."""
    x, w, _ = problem
    ratio = compare(benchmark, target, lambda: tiled_product(x, w))
    record(benchmark, ratio, "G", Size(len(x), *w.shape), regime=regime, **facts)


def record(benchmark: Any, ratio: Ratio, unit: str, size: Size, **facts: Any) -> None:
    """Store the ratio and the facts of the measurement with pytest-benchmark's own figures."""
    benchmark.extra_info.update(
        unit=unit,
        ratio=ratio.median,
        ratio_min=ratio.low,
        ratio_max=ratio.high,
        unit_seconds=ratio.unit_seconds,
        **size._asdict(),
        **facts,
    )


def copying_seconds(touched: int, device: str = "cpu") -> float:
    """Return the median time of a copy that reads and writes this many bytes, half of them each."""
    source = torch.ones(touched // 8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        synchronize(target)

    copy()
    return statistics.median(seconds(copy) for _ in range(50))
