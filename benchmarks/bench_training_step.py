"""A whole training step without its encoder, against the number of identities in the data.

``PrototypeMemoryLoss`` (aggregate, enqueue, loss, gradient of the embeddings) against a full memory, and the usual
classifier with one weight row per identity (eager ArcFace and the gradients of embeddings and weights). Unit: G of the
batch against the memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import protomem_kernels as pmk
from benchmarks import inputs
from benchmarks.inputs import IDENTITIES, Problem, Size, labels_in_pairs
from benchmarks.peers import PEERS, WHATS, Peer, synchronize
from benchmarks.ratio import compare_with_g

BATCHES = 64


def memory_step(problem: Problem, identities: int) -> Callable[[], None]:
    """Return a step whose labels come from this many identities; the memory holds as many as ``problem`` has rows."""
    x, w, _ = problem
    head = pmk.PrototypeMemoryLoss(w.shape[1], len(w), dtype=w.dtype, device=x.device)
    head.memory.prototypes.copy_(w)
    head.memory.identities.copy_(torch.arange(len(w)) * (identities // len(w)))
    batches = itertools.cycle([labels_in_pairs(len(x), identities, seed).to(x.device) for seed in range(BATCHES)])

    def step() -> None:
        loss = head(x.detach().requires_grad_(), next(batches))
        loss.backward()
        synchronize(x)

    return step


@pytest.fixture
def memory_problem(request: pytest.FixtureRequest, size: Size, device: str, dtype: str) -> Problem:
    """Return the batch, and as many prototypes as there are identities in the smallest data."""
    capacity = IDENTITIES[request.config.getoption("--sizes")][0]
    return inputs.problem(size._replace(M=capacity), "fresh", device, getattr(torch, dtype))


@pytest.mark.centre
@pytest.mark.peers
def bench_prototype_memory(benchmark: Any, memory_problem: Problem, peer: Peer, identities: int) -> None:
    with peer.within():
        compare_with_g(
            benchmark,
            memory_step(memory_problem, identities),
            memory_problem,
            operator="training step",
            what="prototype memory",
            peer=peer.name,
            identities=identities,
        )


@pytest.mark.centre
def bench_classifier(
    benchmark: Any, memory_problem: Problem, size: Size, identities: int, device: str, dtype: str
) -> None:
    peer, size = PEERS["eager"], size._replace(M=identities)
    if refusal := peer.refusal(size, device):
        pytest.skip(f"{peer.name}, a classifier with one row per identity: {refusal}")
    compare_with_g(
        benchmark,
        peer.step(inputs.problem(size, "fresh", device, getattr(torch, dtype)), WHATS[-1]),
        memory_problem,
        operator="training step",
        what="classifier",
        peer=peer.name,
        identities=identities,
    )
