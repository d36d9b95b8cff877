"""``hardest_negatives`` (k = 64) against eager topk, in units of G."""

from __future__ import annotations

from typing import Any

import pytest

import protomem_kernels as pmk
from benchmarks.inputs import Problem
from benchmarks.peers import Peer, eager_hardest, synchronize
from benchmarks.ratio import compare_with_g


@pytest.mark.peers("eager")
def bench_top_k(benchmark: Any, problem: Problem, peer: Peer) -> None:
    (x, w, targets), k = problem, 64

    def search() -> None:
        if peer.name == "eager":
            eager_hardest(x, w, targets, k)
        else:
            pmk.hardest_negatives(x, w, targets, k=k)
        synchronize(x)

    with peer.within():
        compare_with_g(benchmark, search, problem, operator="hardest_negatives", what=f"k = {k}", peer=peer.name)
