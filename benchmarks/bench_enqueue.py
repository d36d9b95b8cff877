"""``enqueue_`` (fifo): how many times faster than vectorised eager PyTorch, and against copying its bytes.

Half of the P = B / 2 identities stand in the memory, the other half is new. The operator reads the memory's identities
(nobody keeps an index beside the memory), the batch, and the rows to be refreshed; it writes P rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import protomem_kernels as pmk
from benchmarks.inputs import Problem, Size, full_memory, identities_half_known, unit_rows
from benchmarks.peers import Peer, eager_enqueue_, synchronize
from benchmarks.ratio import Ratio, compare, copying_seconds, record

ROUNDS = 60  # with the warm-ups at most inputs.CALLS calls


def compare_with_eager(benchmark: Any, peer: Peer, prototypes: torch.Tensor, P: int) -> Ratio:
    """Return eager / ours: how many times faster ours is."""
    M, D = prototypes.shape
    rows = unit_rows(P, D, seed=2).to(prototypes)
    calls = [identities.to(prototypes.device) for identities in identities_half_known(M, P)]

    def repeated(enqueue_: Any) -> Any:
        state, identities = full_memory(prototypes), iter(calls)

        def call() -> None:
            enqueue_(state, rows, next(identities))
            synchronize(rows)

        return call

    with peer.within():
        return compare(benchmark, repeated(pmk.enqueue_), repeated(eager_enqueue_), budget=3, most=ROUNDS).inverse


@pytest.mark.peers
def bench_against_eager(benchmark: Any, size: Size, problem: Problem, peer: Peer, device: str) -> None:
    P = size.B // 2
    ratio = compare_with_eager(benchmark, peer, problem.prototypes, P)
    record(benchmark, ratio, "times faster than eager", size, operator="enqueue_", what=f"P = {P}", peer=peer.name)
    touched = 8 * size.M + 4 * size.D * (P + P // 2 + P)
    benchmark.extra_info["times_the_copying"] = benchmark.stats.stats.median / copying_seconds(touched, device)
