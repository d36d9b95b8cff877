"""The figures that the project holds itself to: what they must be, and what they aim at.

``python -m benchmarks --quick`` measures them: B = 512, M = 100,000, D = 512, float32, ArcFace, fresh data. Under two
minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import protomem_kernels as pmk
from benchmarks import bench_aggregate_prototypes, bench_enqueue, inputs
from benchmarks.bench_training_step import memory_step
from benchmarks.inputs import IDENTITIES, Problem, Size
from benchmarks.memory import peak_extra_bytes
from benchmarks.peers import MARGIN, SCALE, WHATS, Peer, tiled_product
from benchmarks.ratio import Ratio, compare

FORWARD, EMBEDDINGS, PROTOTYPES = WHATS
pytestmark = [pytest.mark.centre]


def record(benchmark: Any, figure: str, value: float, unit: str, must: float, aim: float, **more: float) -> None:
    """Store a figure; it has to be at most ``must``, or at least if ``aim`` lies above."""
    benchmark.extra_info.update(figure=figure, value=value, unit=unit, must=must, aim=aim, **more)


def spread(ratio: Ratio) -> dict[str, float]:
    return {"value_min": ratio.low, "value_max": ratio.high}


def logits(problem: Problem) -> Callable[[], object]:
    x, w, targets = problem
    return lambda: pmk.margin_softmax_logits(x, w, targets, margin=pmk.ArcFace(MARGIN), scale=SCALE)


IN_G = {
    "forward": (1.08, 0.80, lambda ours, problem: ours.step(problem, FORWARD)),
    "forward + embeddings' gradient": (2.10, 1.60, lambda ours, problem: ours.step(problem, EMBEDDINGS)),
    "+ prototypes' gradient": (3.40, 2.60, lambda ours, problem: ours.step(problem, PROTOTYPES)),
    "HardestNegatives(64), forward + embeddings' gradient": (
        1.25,
        0.95,
        lambda ours, problem: ours.mining(pmk.HardestNegatives(64)).step(problem, EMBEDDINGS),
    ),
    "margin_softmax_logits, forward": (1.35, 1.10, lambda ours, problem: logits(problem)),
}


@pytest.mark.parametrize("figure", IN_G)
def bench_in_units_of_g(benchmark: Any, problem: Problem, ours: Peer, figure: str) -> None:
    must, aim, action = IN_G[figure]
    x, w, _ = problem
    with ours.within():
        # Eleven at least: the first rounds of what allocates much meet new pages.
        ratio = compare(benchmark, action(ours, problem), lambda: tiled_product(x, w), budget=5, least=11)
    record(benchmark, figure, ratio.median, "G", must, aim, **spread(ratio))


def bench_extra_memory(benchmark: Any, size: Size, ours: Peer, device: str, threads: int) -> None:
    large = size._replace(M=10 * size.M)
    sizes: list[int] = []
    benchmark.pedantic(lambda: sizes.append(peak_extra_bytes(ours.name, large, EMBEDDINGS, device, threads)))
    record(benchmark, f"extra memory at M = {large.M:,}", sizes[0] / 2**20, "MiB", 100, 32)


@pytest.mark.parametrize("share", [1 / 4, 1, 8])
def bench_aggregate(benchmark: Any, size: Size, ours: Peer, share: float, device: str) -> None:
    B = int(share * size.B)
    ratio = bench_aggregate_prototypes.compare_with_eager(benchmark, ours, B, size.D, device)
    figure = f"aggregate_prototypes against eager, B = {B:,}"
    record(benchmark, figure, ratio.median, "times faster", 5, 10, **spread(ratio))


def bench_enqueue_(benchmark: Any, size: Size, ours: Peer, device: str) -> None:
    P, large = size.B // 2, size._replace(M=10 * size.M)
    prototypes = inputs.problem(large, "fresh", device).prototypes
    ratio = bench_enqueue.compare_with_eager(benchmark, ours, prototypes, P)
    figure = f"enqueue_ against eager, P = {P}, M = {large.M:,}"
    record(benchmark, figure, ratio.median, "times faster", 5, 20, **spread(ratio))


def bench_linear_in_m(benchmark: Any, size: Size, problem: Problem, ours: Peer, device: str) -> None:
    large = size._replace(M=10 * size.M)
    more = ours.step(inputs.problem(large, "fresh", device), EMBEDDINGS)
    ratio = compare(benchmark, more, ours.step(problem, EMBEDDINGS), rounds=3)
    figure = f"time(M = {large.M:,}) / time(M = {size.M:,})"
    record(benchmark, figure, ratio.median, "times", 10.5, 10.0, **spread(ratio))


def bench_identities(benchmark: Any, size: Size, ours: Peer, device: str, request: pytest.FixtureRequest) -> None:
    few, *_, many = IDENTITIES[request.config.getoption("--sizes")]
    problem = inputs.problem(size._replace(M=few), "fresh", device)
    with ours.within():
        ratio = compare(benchmark, memory_step(problem, many), memory_step(problem, few), budget=4)
    figure = f"step with {many:,} identities / with {few:,}"
    record(benchmark, figure, ratio.median, "times", 1.05, 1.0, **spread(ratio))
