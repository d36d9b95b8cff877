"""``margin_softmax_loss`` against everybody, in units of G, and what it costs in memory."""

from __future__ import annotations

from typing import Any

import pytest

import protomem_kernels as pmk
from benchmarks.inputs import Problem, Size
from benchmarks.memory import peak_extra_bytes
from benchmarks.peers import WHATS, Peer
from benchmarks.ratio import compare_with_g

FORWARD, EMBEDDINGS, PROTOTYPES = WHATS
OPERATOR = "margin_softmax_loss"


@pytest.mark.centre
def bench_forward(benchmark: Any, problem: Problem, peer: Peer) -> None:
    step = peer.step(problem, FORWARD)
    compare_with_g(benchmark, step, problem, operator=OPERATOR, what=FORWARD, peer=peer.label)


def bench_embeddings_gradient(
    benchmark: Any, problem: Problem, peer: Peer, size: Size, device: str, threads: int, dtype: str
) -> None:
    step = peer.step(problem, EMBEDDINGS)
    compare_with_g(benchmark, step, problem, operator=OPERATOR, what=EMBEDDINGS, peer=peer.label)
    benchmark.extra_info["peak_extra_bytes"] = peak_extra_bytes(peer.name, size, EMBEDDINGS, device, threads, dtype)


@pytest.mark.centre
def bench_prototypes_gradient(benchmark: Any, problem: Problem, peer: Peer) -> None:
    step = peer.step(problem, PROTOTYPES)
    compare_with_g(benchmark, step, problem, operator=OPERATOR, what=PROTOTYPES, peer=peer.label)


@pytest.mark.centre
@pytest.mark.regimes
@pytest.mark.peers
@pytest.mark.parametrize("mining", [None, pmk.HardestNegatives(64), pmk.MVSoftmax()], ids=["all", "hardest", "mv"])
def bench_mining(benchmark: Any, problem: Problem, peer: Peer, regime: str, mining: Any) -> None:
    step = peer.mining(mining).step(problem, EMBEDDINGS)
    what = f"{EMBEDDINGS}, {mining or 'all negatives'}"
    compare_with_g(benchmark, step, problem, operator=OPERATOR, what=what, peer=peer.label, regime=regime)
