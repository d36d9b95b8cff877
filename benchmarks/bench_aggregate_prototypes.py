"""``aggregate_prototypes``: how many times faster than vectorised eager PyTorch, and against copying its bytes.

The operator reads every embedding and writes every prototype, and no less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import protomem_kernels as pmk
from benchmarks.inputs import Size, labels_in_pairs, unit_rows
from benchmarks.peers import Peer, eager_aggregate, eager_aggregate_without_rules, synchronize
from benchmarks.ratio import Ratio, compare, copying_seconds, record

EAGER: dict[str, Callable[[Tensor, Tensor], object]] = {
    "the same in eager PyTorch": eager_aggregate,
    "eager without the rules": eager_aggregate_without_rules,
}


def compare_with_eager(
    benchmark: Any, peer: Peer, B: int, D: int, device: str, theirs: Callable[..., object] = eager_aggregate
) -> Ratio:
    """Return eager / ours: how many times faster ours is."""
    x = unit_rows(B, D, seed=1).to(device)
    labels = labels_in_pairs(B, 10_000_000, seed=2).to(device)

    def ours() -> None:
        pmk.aggregate_prototypes(x, labels)
        synchronize(x)

    def eager() -> None:
        theirs(x, labels)
        synchronize(x)

    with peer.within():
        return compare(benchmark, ours, eager, budget=1.5).inverse


@pytest.mark.peers
@pytest.mark.parametrize("against", EAGER)
def bench_against_eager(benchmark: Any, size: Size, peer: Peer, device: str, against: str) -> None:
    ratio = compare_with_eager(benchmark, peer, size.B, size.D, device, EAGER[against])
    record(benchmark, ratio, f"times faster than {against}", size, operator="aggregate_prototypes", peer=peer.name)
    touched = 4 * size.D * (size.B + size.B // 2)
    benchmark.extra_info["times_the_copying"] = benchmark.stats.stats.median / copying_seconds(touched, device)
