"""``aggregate_prototypes``: how many times faster than vectorised eager PyTorch, and against copying its bytes.

The operator reads every embedding and writes every prototype, and no less.
"""

from __future__ import annotations

from typing import Any

import pytest

import protomem_kernels as pmk
from benchmarks.inputs import Size, labels_in_pairs, unit_rows
from benchmarks.peers import Peer, eager_aggregate, synchronize
from benchmarks.ratio import Ratio, compare, copying_seconds, record


def compare_with_eager(benchmark: Any, peer: Peer, B: int, D: int, device: str) -> Ratio:
    """Return eager / ours: how many times faster ours is."""
    x = unit_rows(B, D, seed=1).to(device)
    labels = labels_in_pairs(B, 10_000_000, seed=2).to(device)

    def ours() -> None:
        pmk.aggregate_prototypes(x, labels)
        synchronize(x)

    def eager() -> None:
        eager_aggregate(x, labels)
        synchronize(x)

    with peer.within():
        return compare(benchmark, ours, eager, budget=1.5).inverse


@pytest.mark.peers
def bench_against_eager(benchmark: Any, size: Size, peer: Peer, device: str) -> None:
    ratio = compare_with_eager(benchmark, peer, size.B, size.D, device)
    record(benchmark, ratio, "times faster than eager", size, operator="aggregate_prototypes", peer=peer.name)
    touched = 4 * size.D * (size.B + size.B // 2)
    benchmark.extra_info["times_the_copying"] = benchmark.stats.stats.median / copying_seconds(touched, device)
